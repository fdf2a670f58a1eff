"""The request guard: checks every request before a route sees it, and counts and times it."""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.explorer.page import PAGE_PATHS
from knnlm.apps.server.http_errors import CLIENT_LEFT, HTTPError

_NEED_NO_KEY = {"/health", *PAGE_PATHS}  # the explorer's page is empty until it has the key
_MAX_DISCARDED_BYTES = 64 << 20  # read from too large a body, so that its sender sees the error


@dataclass(kw_only=True)
class RequestGuard:
    """The outermost layer of the app.

    api_key: the key that requests must carry; None to serve this machine alone, without a key.
    paths: those of the routes, counted under their own names. json_paths: those that take a JSON
    body. is_stopping: whether new requests are refused.
    """

    app: ASGIApp
    limits: Limits
    metrics: Metrics
    api_key: str | None
    paths: frozenset[str]
    json_paths: frozenset[str]
    is_stopping: Callable[[], bool]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = CLIENT_LEFT

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, send_counted)
        except Exception:
            status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in _NEED_NO_KEY:
                self._check_key(scope)
            if self.is_stopping() and scope["method"] == "POST":
                raise HTTPError(503, "the server is stopping", headers={"Retry-After": "5"})
            if scope["method"] == "POST" and scope["path"] in self.json_paths:
                _check_content_type(scope)
            body = await self._read(scope, receive)
        except HTTPError as error:
            await error.response()(scope, receive, send)
            return
        except _ClientLeftError:
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None:
            _check_host(scope)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        is_right = hmac.compare_digest(key.strip(), self.api_key.encode())
        if scheme.lower() != b"bearer" or not is_right:
            raise HTTPError(
                401,
                "the request must carry this server's key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body, within the limits of size and time."""
        limit = self.limits.max_body_bytes
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeftError
                    size += len(message.get("body", b""))
                    if size <= limit:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False) or size > _MAX_DISCARDED_BYTES:
                        break
        except TimeoutError:
            raise HTTPError(
                408,
                f"the request must arrive within {self.limits.request_seconds:g} seconds",
                headers={"Connection": "close"},
            ) from None
        if size > limit:
            raise HTTPError(
                413,
                f"a request's body must have at most {limit} bytes",
                headers={"Connection": "close"},
            )
        return b"".join(parts)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host, given by name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_host(scope: Scope) -> None:
    """Refuse DNS rebinding: a web page whose own host name was pointed at this machine."""
    given = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1")
    name = given.rpartition("]")[0][1:] if given.startswith("[") else given.partition(":")[0]
    if not is_loopback(name):
        raise HTTPError(
            403,
            f"a server without a key answers to localhost and 127.0.0.1 only, not to {name!r}: "
            "start it with --api-key",
        )


def _check_content_type(scope: Scope) -> None:
    """Take only JSON, which a web page from elsewhere cannot send to this machine."""
    given = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if given != b"application/json":
        raise HTTPError(415, "the request must have the header Content-Type: application/json")


class _ClientLeftError(Exception):
    """The client closed the connection before its request was whole."""
