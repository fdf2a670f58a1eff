"""A running server: it opens the model, listens, and shuts down in order."""

import asyncio
import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from knnlm.apps.engine.engine import Engine, ModelFacts
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.server.app import create_app
from knnlm.apps.server.listening import listen as listen
from knnlm.apps.server.middleware import is_loopback
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM

_LAST_RESPONSES_SECONDS = 5
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:[0-9]+)?|[a-z]+://\[[0-9a-f:]+\](:[0-9]+)?"
)
_FORCED_SECONDS = 1.0  # for an end in order when told a second time


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse to listen on a public address without a key; raises InvalidArgumentError."""
    if api_key is not None and (not api_key.isascii() or not api_key.strip()):
        raise InvalidArgumentError("api_key must be ASCII and not empty: choose another, or none")
    if api_key is None and not is_loopback(host):
        raise InvalidArgumentError(
            f"host {host or repr('')} can be reached by others and needs a key: set --api-key or "
            "KNNLM_API_KEY, or listen on 127.0.0.1"
        )


def check_origin(origin: str) -> str:
    """Allow what a browser may send as the origin of a page; raises InvalidArgumentError."""
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise InvalidArgumentError(
            f"cors_origins must be like https://example.org or http://localhost:3000, in small "
            f"letters and without a path, or '*' for all; got {origin!r}"
        )
    return origin


class _Protocol(H11Protocol):
    """HTTP with a time limit for the head of a request."""

    head_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the clock when the head has arrived; start it again for the next request."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch()
        else:
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._end_if_headless)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_if_headless(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Service(uvicorn.Server):
    """An engine behind HTTP.

    When told to stop (SIGTERM, SIGINT, `stop`), it refuses new requests with 503, finishes those
    that it has within the limits' grace, and ends. Told a second time, it fails those that are
    left and ends at once. cors_origins: those of web pages from elsewhere that may use it, "*" for
    all; raises InvalidArgumentError for what is none. drafts: see `Worker`.
    """

    def __init__(
        self,
        open_model: Callable[[], KNNLM],
        *,
        name: str,
        limits: Limits | None = None,
        api_key: str | None = None,
        cors_origins: Sequence[str] = (),
        drafts: bool = True,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.engine = Engine(open_model, self.limits, self.metrics, drafts=drafts)
        self._name = name
        self._api_key = api_key
        self._cors_origins = [check_origin(origin) for origin in cors_origins]
        self._on_start = on_start
        self._stop_by: float | None = None
        self._told = False  # by a signal

    def open(self) -> ModelFacts:
        """Open the model; raises the errors of `open_model`."""
        facts = self.engine.start()
        app = create_app(
            self.engine,
            facts,
            name=self._name,
            limits=self.limits,
            metrics=self.metrics,
            api_key=self._api_key,
            cors_origins=self._cors_origins,
        )
        protocol = type("Protocol", (_Protocol,), {"head_seconds": self.limits.request_seconds})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_RESPONSES_SECONDS,
            )
        )
        return facts

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and call `on_start`."""
        await super().startup(sockets)
        self._on_start()

    def stop(self) -> None:
        """Shut down in order; safe to call in a signal handler and in any thread."""
        if self._stop_by is None:
            self._stop_by = time.monotonic() + self.limits.grace_seconds
            self.engine.drain()
        else:
            self._stop_by = 0.0
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Check, ten times a second, whether it is time to end."""
        if self._stop_by is not None and (self.engine.is_idle or time.monotonic() >= self._stop_by):
            patience = (_FORCED_SECONDS,) if self.force_exit else ()
            await asyncio.to_thread(self.engine.close, *patience)
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Make SIGTERM and SIGINT call `stop`, and the exit status 0.

        A second signal ends the process within 2 seconds, whatever its threads are doing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self._told = True
            self.stop()
            if self.force_exit:  # in order if possible, but not later
                last_resort = threading.Timer(1.5 * _FORCED_SECONDS, _end_process)
                last_resort.daemon = True
                last_resort.start()

        before: dict[signal.Signals, Any] = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, _at_the_end if self._told else handler)
                if self._told:  # the status stays 0 while the interpreter shuts down
                    atexit.register(signal.signal, number, signal.SIG_IGN)
        if self._stop_by is not None and self.engine.is_running:
            _end_process()


def _at_the_end(number: int, frame: FrameType | None) -> None:
    _end_process()


def _end_process() -> None:
    """End the process with status 0, while the model thread is still at work.

    Python cannot end a thread that is inside torch. If the interpreter shut down around it, the
    thread would die in C++ code that allows no exception, and the process with it, by SIGABRT. The
    system closes the sockets, and a server holds no lock and writes no file.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(0)
