"""Model calls in progress: explanations and analyses, a part of each at every turn.

Knows jobs and their generators; knows no model.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from knnlm.apps.engine.jobs import Job, ModelCall, Returned
from knnlm.apps.engine.turns import Turns

_TURN_SECONDS = 0.05
"""How long calls may go on while completions wait for their next token; a begun part is ended."""


class Calls:
    """The model calls that were begun; `fail` is told of those that raise an error."""

    def __init__(self, fail: Callable[[Job, Exception], None]) -> None:
        self._fail = fail
        self._running: deque[tuple[ModelCall, Turns[Any]]] = deque()

    @property
    def jobs(self) -> set[Job]:
        """The calls that are neither finished nor dropped."""
        return {job for job, _ in self._running}

    def begin(self, job: ModelCall, turns: Turns[Any]) -> None:
        """Add a call, whose work begins at the next turn."""
        self._running.append((job, turns))

    def turn(self) -> None:
        """Do some parts of the call that has waited longest, then of the next, until time is up."""
        stop = time.perf_counter() + _TURN_SECONDS
        while self._running and time.perf_counter() < stop:
            job, turns = self._running.popleft()
            if self._go_on(job, turns, stop):
                self._running.append((job, turns))

    def _go_on(self, job: ModelCall, turns: Turns[Any], stop: float) -> bool:
        """Return whether a call goes on when the time is up."""
        while not job.cancelled:
            try:
                next(turns)
            except StopIteration as end:
                job.post(Returned(end.value))
                return False
            except Exception as error:
                self._fail(job, error)
                return False
            if time.perf_counter() >= stop:
                return True
        turns.close()  # nobody listens
        return False

    def drop_cancelled(self) -> None:
        """Drop the calls that nobody waits for."""
        for job, turns in self._running:
            if job.cancelled:
                turns.close()
        self._running = deque(one for one in self._running if not one[0].cancelled)
