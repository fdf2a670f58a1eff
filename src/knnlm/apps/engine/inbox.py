"""Where the events of a request's jobs arrive on the event loop, and what if its client leaves."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request

from knnlm.apps.engine.engine import Engine, QueueFullError, UnavailableError
from knnlm.apps.engine.jobs import Event, Failed, Job
from knnlm.apps.server.http_errors import RefusalError
from knnlm.apps.server.responses import refusal_of


class Inbox:
    """The events of one request's jobs, on their way from the model thread to the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()

    def post(self, number: int, event: Event) -> None:
        """Take an event; called in the model thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs; raises RefusalError."""
        self._jobs = jobs
        try:
            self._engine.submit(jobs)
        except QueueFullError as error:
            raise RefusalError(429, str(error), headers={"Retry-After": "1"}) from error
        except UnavailableError as error:
            raise RefusalError(503, str(error), headers={"Retry-After": "5"}) from error

    async def next_event(self) -> tuple[int, Event]:
        """Wait for the next event."""
        return await self._events.get()

    def cancel(self) -> None:
        """Free the places of what is not finished."""
        for job in self._jobs:
            job.cancel()
        self._engine.wake()


async def _wait_for_departure(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def ask_once(request: Request, inbox: Inbox, job: Job) -> Event | None:
    """Return what one job answers, None if the client leaves before; raises RefusalError."""
    inbox.submit([job])
    received = await unless_left(request, inbox, inbox.next_event())
    if received is None:
        return None
    event: Event = received[1]
    if isinstance(event, Failed):
        raise refusal_of(event)
    return event


async def unless_left(request: Request, inbox: Inbox, answer: Any) -> Any:
    """Return what `answer` gives, or None, having given it up, if the client leaves before."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_wait_for_departure(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for task in (answering, leaving):
            task.cancel()
        if not answering.done() or answering.cancelled():
            inbox.cancel()
