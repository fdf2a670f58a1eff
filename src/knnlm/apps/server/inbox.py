"""How a request waits for the model thread, and what happens if its client leaves."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from knnlm.apps.engine.engine import Engine, ModelFacts, QueueFullError, UnavailableError
from knnlm.apps.engine.jobs import Event, Failed, Job, ModelCall, Overrides, Returned
from knnlm.apps.engine.turns import Turns
from knnlm.apps.server.http_errors import HTTPError, job_error
from knnlm.knn_lm import KNNLM

Value = TypeVar("Value")


class Inbox:
    """The events of one request's jobs, on their way from the model thread to the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()

    def post(self, number: int, event: Event) -> None:
        """Take an event of the job with this number; called in the model thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs; raises HTTPError."""
        self._jobs = jobs
        try:
            self._engine.submit(jobs)
        except QueueFullError as error:
            raise HTTPError(429, str(error), headers={"Retry-After": "1"}) from error
        except UnavailableError as error:
            raise HTTPError(503, str(error), headers={"Retry-After": "5"}) from error

    async def next_event(self) -> tuple[int, Event]:
        """Wait for the next event; returns the number of its job too."""
        return await self._events.get()

    def cancel(self) -> None:
        """Cancel the jobs that are not finished."""
        for job in self._jobs:
            job.cancel()
        self._engine.wake()


async def call_model(
    engine: Engine,
    request: Request,
    function: Callable[[KNNLM], Turns[Any]],
    overrides: Overrides | None = None,
) -> Returned | None:
    """Do work in the model thread, in turns; returns None if the client leaves before its end.

    Raises HTTPError.
    """
    inbox = Inbox(engine)
    inbox.submit([ModelCall(partial(inbox.post, 0), overrides or Overrides(), function)])
    received = await unless_left(request, inbox.next_event(), inbox)
    if received is None:
        return None
    _, event = received
    if isinstance(event, Failed):
        raise job_error(event)
    assert isinstance(event, Returned)
    return event


async def newest_facts(engine: Engine, seconds: float) -> ModelFacts:
    """Return what the next request will see; the latest that is known if that takes longer."""
    loop, looked = asyncio.get_running_loop(), asyncio.Event()

    def done() -> None:
        with suppress(RuntimeError):  # as in `Inbox.post`
            loop.call_soon_threadsafe(looked.set)

    engine.look(done)
    with suppress(TimeoutError):
        await asyncio.wait_for(looked.wait(), seconds)
    return engine.facts


async def unless_left(
    request: Request, result: Awaitable[Value], inbox: Inbox | None = None
) -> Value | None:
    """Return a result, or None if the client leaves first; without a result, cancel the jobs."""
    waiting = asyncio.ensure_future(result)
    leaving = asyncio.ensure_future(_wait_for_departure(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        for task in (waiting, leaving):
            task.cancel()
        is_missing = not waiting.done() or waiting.cancelled() or waiting.exception() is not None
        if is_missing and inbox is not None:
            inbox.cancel()


async def _wait_for_departure(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
