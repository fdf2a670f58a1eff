"""Asking replicas: the late, the failing and the refusing. Ray is played by a few lines."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from knnlm.errors import DatastoreCorruptError
from knnlm.index.cluster.asking import Answers, Question, Refusal


class _ActorDiedError(Exception):
    cause: Exception | None = None


class _Future:
    """Is ready at once, or never; holds an answer or an error."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


class _Never:
    """What a stopped actor answers."""


class FakeRay:
    class exceptions:  # noqa: N801
        RayError = _ActorDiedError

    def __init__(self) -> None:
        self.cancelled: list[_Future] = []

    def wait(
        self, futures: Sequence[_Future], num_returns: int, timeout: float
    ) -> tuple[list[_Future], list[_Future]]:
        ready = [one for one in futures if not isinstance(one.outcome, _Never)]
        if len(ready) < num_returns:
            time.sleep(timeout)
        return ready[:num_returns], []

    def get(self, future: _Future) -> Any:
        if isinstance(future.outcome, Exception):
            raise future.outcome
        return future.outcome

    def cancel(self, future: _Future) -> None:
        self.cancelled.append(future)


def ask(
    outcome: Callable[[int, int, int], Any],
    *,
    shares: int = 2,
    replicas: int = 2,
    seconds: float = 0.3,
    preferred: list[int] | None = None,
) -> tuple[Answers, list[tuple[int, int]], FakeRay]:
    """Ask; outcome: of a share, a replica, and how often it was asked before."""
    ray, asked = FakeRay(), list[tuple[int, int]]()

    def submit(share: int, replica: int) -> _Future:
        answer = outcome(share, replica, asked.count((share, replica)))
        asked.append((share, replica))
        return _Future(answer)

    first = [0] * shares if preferred is None else preferred
    question = Question(ray, first, replicas, submit, lambda answer: answer)
    return question.answers(seconds), asked, ray


def test_each_share_is_asked_once_where_all_answer() -> None:
    answers, asked, _ = ask(lambda share, replica, _: f"{share}{replica}", preferred=[0, 1])
    assert answers.by_share == {0: "00", 1: "11"}
    assert asked == [(0, 0), (1, 1)]
    assert answers.asked_again == 0


def test_a_late_one_is_asked_elsewhere_and_then_no_more() -> None:
    preferred = [0, 0]
    answers, asked, ray = ask(
        lambda share, replica, _: _Never() if (share, replica) == (1, 0) else "here",
        seconds=30.0,  # the other share's answer tells that it is late
        preferred=preferred,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    assert asked == [(0, 0), (1, 0), (1, 1)]
    assert answers.asked_again == 1
    assert preferred == [0, 1]
    assert len(ray.cancelled) == 1


def test_an_only_share_is_late_after_its_part_of_the_time() -> None:
    answers, asked, _ = ask(lambda _, replica, __: "here" if replica else _Never(), shares=1)
    assert answers.by_share == {0: "here"}
    assert asked == [(0, 0), (0, 1)]


def test_a_dead_one_is_replaced_at_once() -> None:
    answers, asked, _ = ask(
        lambda share, replica, _: "here" if share or replica else _ActorDiedError("it died"),
        seconds=30.0,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    assert (0, 1) in asked


def test_the_only_replica_is_asked_again_when_it_is_back() -> None:
    answers, asked, _ = ask(
        lambda share, _, times: "here" if share or times else _ActorDiedError("it died"),
        replicas=1,
        seconds=30.0,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    assert asked.count((0, 0)) == 2


def test_what_does_not_answer_in_time_is_told() -> None:
    answers, *_ = ask(lambda share, *_: "here" if share else _Never(), replicas=1, seconds=0.05)
    assert answers.by_share == {1: "here"}
    assert answers.failures == {0: "no answer within 0.05 s"}
    answers, *_ = ask(
        lambda share, *_: "here" if share else _ActorDiedError("it died\nlong story"), seconds=0.2
    )
    assert answers.failures == {0: "it died"}


def test_a_refusal_is_retried_once_and_then_stands() -> None:
    answers, asked, _ = ask(
        lambda share, _, times: "here" if share or times else Refusal("other state"),
        replicas=1,
        seconds=30.0,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    answers, asked, _ = ask(
        lambda share, *_: "here" if share else Refusal("other state"), seconds=30.0
    )
    assert answers.by_share == {1: "here"}
    assert answers.refusals == {0: Refusal("other state")}
    assert sorted(asked) == [(0, 0), (0, 1), (1, 0)]


def test_an_actors_own_error_is_raised_if_no_replica_does_better() -> None:
    damaged = _ActorDiedError("a remote traceback")
    damaged.cause = DatastoreCorruptError("shard 3 is damaged")
    answers, *_ = ask(lambda _, replica, __: "here" if replica else damaged)
    assert answers.by_share == {0: "here", 1: "here"}
    with pytest.raises(DatastoreCorruptError, match="shard 3 is damaged"):
        ask(lambda *_: damaged)
