"""Asking replicas: the late, the failing and the refusing; the actors are a few lines."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from knnlm.errors import DatastoreCorruptError
from knnlm.index.cluster.asking import Answers, Failure, Place, Question, Refusal

NEVER = object()
"""What a stopped actor answers."""


def ask(
    outcome: Callable[[int, int, int], Any],
    *,
    shares: int = 2,
    replicas: int = 2,
    seconds: float = 0.3,
    preferred: list[int] | None = None,
) -> tuple[Answers, list[Place]]:
    """Ask; outcome: of a share, a replica, and how often it was asked before.

    A ConnectionRefusedError is met when asking, another error arrives later.
    """
    asked, arriving = list[Place](), list[tuple[Place, Any]]()

    def submit(place: Place, seconds_left: float) -> None:
        assert 0.0 < seconds_left <= seconds
        answer = outcome(*place, asked.count(place))
        asked.append(place)
        if isinstance(answer, ConnectionRefusedError):
            raise answer
        if answer is not NEVER:
            arriving.append((place, answer))

    def wait(seconds: float) -> list[tuple[Place, Any]]:
        if not arriving:
            time.sleep(seconds)
        return [arriving.pop(0) for _ in arriving[:1]]

    first = [0] * shares if preferred is None else preferred
    return Question(first, replicas, submit, wait).answers(seconds), asked


def test_each_share_is_asked_once_where_all_answer() -> None:
    answers, asked = ask(lambda share, replica, _: f"{share}{replica}", preferred=[0, 1])
    assert answers.by_share == {0: "00", 1: "11"}
    assert asked == [(0, 0), (1, 1)]
    assert answers.asked_again == 0


def test_a_late_one_is_asked_elsewhere_and_then_no_more() -> None:
    preferred = [0, 0]
    answers, asked = ask(
        lambda share, replica, _: NEVER if (share, replica) == (1, 0) else "here",
        seconds=30.0,  # the other share's answer tells that it is late
        preferred=preferred,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    assert asked == [(0, 0), (1, 0), (1, 1)]
    assert answers.asked_again == 1
    assert preferred == [0, 1]


def test_an_only_share_is_late_after_its_part_of_the_time() -> None:
    answers, asked = ask(lambda _, replica, __: "here" if replica else NEVER, shares=1)
    assert answers.by_share == {0: "here"}
    assert asked == [(0, 0), (0, 1)]


@pytest.mark.parametrize("error", [ConnectionError, ConnectionRefusedError])
def test_a_dead_one_is_replaced_at_once(error: type[ConnectionError]) -> None:
    answers, asked = ask(
        lambda share, replica, _: "here" if share or replica else error("it died"),
        seconds=30.0,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    assert (0, 1) in asked


def test_the_only_replica_is_asked_again_when_it_is_back() -> None:
    answers, asked = ask(
        lambda share, _, times: "here" if share or times else ConnectionError("it died"),
        replicas=1,
        seconds=30.0,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    assert asked.count((0, 0)) == 2


def test_what_does_not_answer_in_time_is_told() -> None:
    answers, _ = ask(lambda share, *_: "here" if share else NEVER, replicas=1, seconds=0.05)
    assert answers.by_share == {1: "here"}
    assert answers.failures == {0: "no answer within 0.05 s"}
    answers, _ = ask(
        lambda share, *_: "here" if share else ConnectionError("it died\nlong story"), seconds=0.2
    )
    assert answers.failures == {0: "it died"}


def test_a_refusal_is_retried_once_and_then_stands() -> None:
    answers, asked = ask(
        lambda share, _, times: "here" if share or times else Refusal("other state"),
        replicas=1,
        seconds=30.0,
    )
    assert answers.by_share == {0: "here", 1: "here"}
    answers, asked = ask(
        lambda share, *_: "here" if share else Refusal("other state"), seconds=30.0
    )
    assert answers.by_share == {1: "here"}
    assert answers.refusals == {0: Refusal("other state")}
    assert sorted(asked) == [(0, 0), (0, 1), (1, 0)]


def test_an_actors_own_error_is_raised_if_no_replica_does_better() -> None:
    damaged = Failure(DatastoreCorruptError("shard 3 is damaged"))
    answers, _ = ask(lambda _, replica, __: "here" if replica else damaged)
    assert answers.by_share == {0: "here", 1: "here"}
    with pytest.raises(DatastoreCorruptError, match="shard 3 is damaged"):
        ask(lambda *_: damaged)
