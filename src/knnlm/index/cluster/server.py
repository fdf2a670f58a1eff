"""What listens in an actor: each client has a connection and a thread that answers it.

Knows sockets; what is asked goes to a `ShareSearcher`. No thread hands a search to another.
"""

import hmac
import logging
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from knnlm.index.cluster.messages import (
    GREETING,
    MOST_BYTES,
    REQUEST_BYTES,
    SECRET_BYTES,
    Answer,
    RequestHeader,
)
from knnlm.index.cluster.scoring import search_share
from knnlm.index.cluster.searcher import ShareSearcher

_LOG = logging.getLogger(__name__)
_GREETING_SECONDS = 10.0
_IDLE_SECONDS = 30  # until it is asked whether a silent client's machine still lives
_PROBES, _PROBE_SECONDS = 3, 10


class Endpoint(NamedTuple):
    """Where an actor listens, and what a client must say to be heard."""

    host: str
    port: int
    secret: bytes


class ShareServer:
    """Answers questions about a share, one search at a time, until the process ends.

    host: the address to listen at; the port is any that is free.
    """

    def __init__(self, searcher: ShareSearcher, host: str) -> None:
        self._searcher = searcher
        self._searching = threading.Lock()
        self.searches = 0
        """How many were answered."""
        self._socket = socket.create_server((host, 0), family=_family(host))
        port = self._socket.getsockname()[1]
        self.endpoint = Endpoint(host, port, secrets.token_bytes(SECRET_BYTES))
        threading.Thread(target=self._accept, name="knnlm-accept", daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.1)  # no more files may be open, for now
                continue
            threading.Thread(
                target=self._serve, args=(client,), name="knnlm-client", daemon=True
            ).start()

    def _serve(self, client: socket.socket) -> None:
        """Answer one client until it goes."""
        with client, suppress(OSError, EOFError):
            keep_alive(client)
            client.settimeout(_GREETING_SECONDS)
            greeting = GREETING + self.endpoint.secret
            if not hmac.compare_digest(_read(client, len(greeting)), greeting):
                return
            client.settimeout(None)
            while True:
                request = RequestHeader.read(_read(client, REQUEST_BYTES))
                until = time.monotonic() + request.seconds
                if request.body_bytes > MOST_BYTES:
                    return
                body = _read(client, request.body_bytes)
                queries = np.frombuffer(body, np.float32).reshape(request.shape)
                answer = self._answer(request, queries, until)
                if answer is not None:
                    for part in answer.parts():
                        client.sendall(part)

    def _answer(self, request: RequestHeader, queries: np.ndarray, until: float) -> Answer | None:
        """Return the answer, None where nobody waits for it any more."""
        try:
            held, index = self._searcher.opened(request.state)
            answer = Answer(request.number, held.state, held.entries or 0)
            if index is None:
                return answer
            with self._searching:
                if time.monotonic() >= until:
                    return None
                found = search_share(index, torch.from_numpy(queries), request.k)
                self.searches += bool(len(queries))
            return answer._replace(found=found)
        except Exception as error:  # the client is told, and goes on elsewhere or raises it
            _LOG.warning("a search failed: %r", error)
            return Answer(request.number, request.state, 0, error=error)


def keep_alive(connection: socket.socket) -> None:
    """Send small messages at once, and notice when the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_SECONDS),
        ("TCP_KEEPINTVL", _PROBE_SECONDS),
        ("TCP_KEEPCNT", _PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _read(connection: socket.socket, size: int) -> bytearray:
    """Read a number of bytes; raises EOFError where the client goes."""
    body = bytearray(size)
    view = memoryview(body)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return body
