"""One question to every share of a cluster: the first answer of any of its replicas counts.

Knows when whom to ask; knows neither the network, nor what is asked, nor what is answered.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Place = tuple[int, int]
"""A share and a replica."""
LATE = 4.0
"""An actor is late after this many times as long as the first answer took, …"""
LEAST_LATE_SECONDS = 0.02
"""… and at least this long."""
_AGAIN_SECONDS = 0.05  # until an actor that failed is asked again
_REFUSALS = 2  # of a share; then it has no answer


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an actor says instead of an answer."""

    reason: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that an actor itself has met: it will not do better, but a replica may."""

    error: Exception


@dataclass
class Answers:
    """What came back of a question, by share.

    refusals: the last of shares without an answer. failures: what went wrong with the others.
    asked_again: how often another replica was asked, or the same once more.
    """

    by_share: dict[int, Any] = field(default_factory=dict)
    refusals: dict[int, Refusal] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    asked_again: int = 0


class Question:
    """Asks one replica of each share, and another where it is late, fails or refuses.

    preferred: of each share the replica to ask first; becomes the one that answered. ask: asks the
    actor at a place, within some seconds; raises ConnectionError. wait: returns what has come of
    that, waiting for at most some seconds: an answer, a `Refusal`, a `Failure`, or the
    ConnectionError of a connection that broke.
    """

    def __init__(
        self,
        preferred: list[int],
        replicas: int,
        ask: Callable[[Place, float], None],
        wait: Callable[[float], Iterable[tuple[Place, Any]]],
    ) -> None:
        self._preferred, self._replicas = preferred, replicas
        self._ask, self._wait = ask, wait
        self._shares = range(len(preferred))
        self._tried = dict.fromkeys(self._shares, 0)
        self._next: dict[int, float] = {}  # when to ask the next replica of a share
        self._refused = dict.fromkeys(self._shares, 0)
        self._answers = Answers()

    def answers(self, seconds: float) -> Answers:
        """Ask, and return when every share has answered or the time is over.

        Raises the error that the actors themselves met, where no replica does better.
        """
        started = time.monotonic()
        self._deadline = started + seconds
        self._patience = seconds / (self._replicas + 1)  # without another answer to compare with
        for share in self._shares:
            self._send(share)
        is_first = True
        while self._open and (now := time.monotonic()) < self._deadline:
            for share in [share for share, at in self._next.items() if at <= now]:
                self._answers.asked_again += 1
                self._send(share)
            until = min([self._deadline, *self._next.values()])
            for (share, replica), answer in self._wait(max(0.0, until - now)):
                if share not in self._answers.by_share:
                    self._receive(share, replica, answer)
            if is_first and self._answers.by_share:
                is_first = False
                took = time.monotonic() - started
                late = started + max(LATE * took, LEAST_LATE_SECONDS)
                self._next = {share: min(at, late) for share, at in self._next.items()}
        for share in self._open:
            self._answers.failures.setdefault(share, f"no answer within {seconds:.3g} s")
        return self._answers

    @property
    def _open(self) -> list[int]:
        """The shares that may still answer."""
        answered = self._answers.by_share
        return [s for s in self._shares if s not in answered and self._refused[s] < _REFUSALS]

    def _send(self, share: int) -> None:
        replica = (self._preferred[share] + self._tried[share]) % self._replicas
        self._tried[share] += 1
        self._next.pop(share, None)
        now = time.monotonic()
        try:
            self._ask((share, replica), self._deadline - now)
        except ConnectionError as error:
            self._fail(share, error)
            return
        if self._tried[share] < self._replicas:
            self._next[share] = now + self._patience

    def _receive(self, share: int, replica: int, answer: Any) -> None:
        if isinstance(answer, ConnectionError):
            self._fail(share, answer)
        elif isinstance(answer, Failure):
            if self._tried[share] >= self._replicas:
                raise answer.error
            self._fail(share, answer.error)
        elif isinstance(answer, Refusal):
            self._refused[share] += 1
            self._answers.refusals[share] = answer
            self._next.pop(share, None)
            if self._refused[share] < _REFUSALS:
                self._next[share] = time.monotonic() + _AGAIN_SECONDS
        else:
            self._answers.by_share[share] = answer
            self._answers.refusals.pop(share, None)
            self._answers.failures.pop(share, None)
            self._next.pop(share, None)
            self._preferred[share] = replica

    def _fail(self, share: int, error: Exception) -> None:
        self._answers.failures[share] = "".join(str(error).splitlines()[:1])[:200]
        others = self._tried[share] < self._replicas
        self._next[share] = time.monotonic() + (0.0 if others else _AGAIN_SECONDS)
