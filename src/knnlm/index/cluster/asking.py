"""One question to every share of a cluster: the first answer of any of its replicas counts.

Knows Ray's futures; knows neither what is asked nor what is answered.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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

    preferred: of each share the replica to ask first; becomes the one that answered. ask: asks a
    replica of a share, and returns Ray's future. receive: returns an answer as it is to count, or a
    `Refusal`.
    """

    def __init__(
        self,
        ray: Any,
        preferred: list[int],
        replicas: int,
        ask: Callable[[int, int], Any],
        receive: Callable[[Any], Any],
    ) -> None:
        self._ray, self._preferred, self._replicas = ray, preferred, replicas
        self._ask, self._receive = ask, receive
        self._shares = range(len(preferred))
        self._pending: dict[Any, tuple[int, int]] = {}
        self._tried = dict.fromkeys(self._shares, 0)
        self._next: dict[int, float] = {}  # when to ask the next replica of a share
        self._refused = dict.fromkeys(self._shares, 0)
        self._answers = Answers()

    def answers(self, seconds: float) -> Answers:
        """Ask, and return when every share has answered or the time is over.

        Raises the error that the actors themselves met, where no replica does better.
        """
        started = time.monotonic()
        deadline = started + seconds
        self._patience = seconds / (self._replicas + 1)  # without another answer to compare with
        for share in self._shares:
            self._send(share)
        is_first = True
        while self._open and (now := time.monotonic()) < deadline:
            for share in [share for share, at in self._next.items() if at <= now]:
                self._answers.asked_again += 1
                self._send(share)
            until = min([deadline, *self._next.values()])
            self._wait(max(0.0, until - now), one=is_first or self._answers.asked_again > 0)
            if is_first and self._answers.by_share:
                is_first = False
                took = time.monotonic() - started
                late = started + max(LATE * took, LEAST_LATE_SECONDS)
                self._next = {share: min(at, late) for share, at in self._next.items()}
        for future in self._pending:
            self._ray.cancel(future)
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
        try:
            self._pending[self._ask(share, replica)] = share, replica
        except self._ray.exceptions.RayError as error:  # so many calls wait that it takes no more
            self._fail(share, error)
            return
        if self._tried[share] < self._replicas:
            self._next[share] = time.monotonic() + self._patience

    def _wait(self, seconds: float, *, one: bool) -> None:
        """Receive what arrives in some time; one: return with the first answer."""
        pending = [*self._pending]
        if not pending:
            time.sleep(seconds)
            return
        count = 1 if one else len(pending)
        for future in self._ray.wait(pending, num_returns=count, timeout=seconds)[0]:
            share, replica = self._pending.pop(future)
            if share in self._answers.by_share:
                continue
            try:
                answer = self._receive(self._ray.get(future))
            except self._ray.exceptions.RayError as error:
                self._fail(share, error)
                continue
            if isinstance(answer, Refusal):
                self._refused[share] += 1
                self._answers.refusals[share] = answer
                self._next.pop(share, None)
                if self._refused[share] < _REFUSALS:
                    self._next[share] = time.monotonic() + _AGAIN_SECONDS
                continue
            self._answers.by_share[share] = answer
            self._answers.refusals.pop(share, None)
            self._answers.failures.pop(share, None)
            self._next.pop(share, None)
            self._preferred[share] = replica

    def _fail(self, share: int, error: Exception) -> None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):  # the actor's own: it will not do better
            if self._tried[share] >= self._replicas:
                raise cause
            error = cause
        self._answers.failures[share] = "".join(str(error).splitlines()[:1])[:200]
        others = self._tried[share] < self._replicas
        self._next[share] = time.monotonic() + (0.0 if others else _AGAIN_SECONDS)
