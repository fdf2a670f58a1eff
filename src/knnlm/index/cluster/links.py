"""A client's connections to the actors of a cluster: one to each, opened again where it breaks.

Knows sockets and where actors listen is told to it; does not know what is asked, nor Ray.
"""

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm.index.cluster.asking import Place
from knnlm.index.cluster.messages import (
    ANSWER_BYTES,
    GREETING,
    MOST_BYTES,
    Answer,
    AnswerHeader,
    Request,
)
from knnlm.index.cluster.server import Endpoint, keep_alive
from knnlm.index.cluster.states import State

_CONNECT_SECONDS = 5.0
_AGAIN_SECONDS = 0.2
_GIVE_UP_SECONDS = 60.0  # until somebody asks again


class Arrived(NamedTuple):
    """What came of a question to an actor: its answer, or why there will be none."""

    place: Place
    answer: Answer | Exception


class Link:
    """The connection to one actor. `send` and `receive` are called by one thread.

    find: asks where the actor listens, which may take long; raises OSError where it is not there.
    Another thread connects, so that no question to others waits for it.
    """

    def __init__(self, place: Place, find: Callable[[], Endpoint]) -> None:
        self.place, self._find = place, find
        self._connecting: threading.Thread | None = None
        self._problem: Exception = ConnectionError("it was not connected in time")
        self._ended = False
        self.socket: socket.socket | None = None
        self._forget()
        self.connect()

    def _forget(self) -> None:
        self._unsent: deque[memoryview] = deque()
        self._header: AnswerHeader | None = None
        self._body = bytearray(ANSWER_BYTES)
        self._filled = 0

    def connect(self) -> None:
        """Begin to connect, if that is needed and not begun yet."""
        if self._connecting is None:
            name = "knnlm-connect-{}-{}".format(*self.place)
            self._connecting = threading.Thread(target=self._connect, name=name, daemon=True)
            self._connecting.start()

    def _connect(self) -> None:
        give_up = time.monotonic() + _GIVE_UP_SECONDS
        while not self._ended:
            try:
                found = self._find()
                opened = socket.create_connection((found.host, found.port), _CONNECT_SECONDS)
                keep_alive(opened)
                opened.sendall(GREETING + found.secret)
                opened.setblocking(False)
            except OSError as error:
                self._problem = error
                if time.monotonic() >= give_up:
                    break
                time.sleep(_AGAIN_SECONDS)
                continue
            if self._ended:
                opened.close()
            else:
                self.socket = opened
            return
        self._connecting = None  # whoever asks next begins again

    def ask(self, request: Request) -> None:
        """Send a request, or the first part of it; raises ConnectionError."""
        if self.socket is None:
            problem = self._problem
            self.connect()
            raise ConnectionError("".join(str(problem).splitlines()[:1])[:200])
        queries = request.queries.reshape(-1).view(np.uint8).data
        self._unsent += [memoryview(request.header), queries]
        self.send()

    @property
    def events(self) -> int:
        """What to wait for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def send(self) -> None:
        """Send what the connection takes without waiting; raises ConnectionError."""
        assert self.socket is not None
        try:
            while self._unsent:
                sent = self.socket.send(self._unsent[0])
                if sent == len(self._unsent[0]):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = self._unsent[0][sent:]
        except BlockingIOError:
            return
        except OSError as error:
            raise self._broken(error) from error

    def receive(self) -> list[Answer]:
        """Return the answers that have arrived as a whole; raises ConnectionError."""
        assert self.socket is not None
        answers: list[Answer] = []
        while True:
            try:
                view = memoryview(self._body)[self._filled :]
                received = self.socket.recv_into(view) if view else 0
            except BlockingIOError:
                return answers
            except OSError as error:
                raise self._broken(error) from error
            if view and not received:
                raise self._broken(ConnectionError("connection closed"))
            self._filled += received
            if self._filled < len(self._body):
                continue
            if self._header is None:
                self._header = AnswerHeader.read(self._body)
                if self._header.body_bytes > MOST_BYTES:
                    raise self._broken(ConnectionError("it sends something else than answers"))
                self._body, self._filled = bytearray(self._header.body_bytes), 0
            if self._filled == len(self._body):
                answers.append(self._header.answer(self._body))
                self._header, self._filled = None, 0
                self._body = bytearray(ANSWER_BYTES)

    def _broken(self, error: Exception) -> ConnectionError:
        broken = ConnectionError(f"its actor has ended: {error}")
        self.reconnect(broken)
        return broken

    def reconnect(self, why: Exception) -> None:
        """Give the connection up, with what was asked on it, and begin to open another."""
        self._problem = why
        self._close()
        self._forget()
        self._connecting = None
        self.connect()

    def end(self) -> None:
        """End the connection for good."""
        self._ended = True
        self._close()

    def _close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


class Links:
    """Connections to all actors of a cluster. A question at a time: `asking` is held meanwhile.

    find: returns where the actor at a place listens; see `Link`.
    """

    def __init__(self, finders: Mapping[Place, Callable[[], Endpoint]]) -> None:
        self._links = {place: Link(place, find) for place, find in finders.items()}
        self._numbers = count()
        self._asked: dict[int, Place] = {}
        self.asking = threading.Lock()

    def __del__(self) -> None:
        for link in self._links.values():
            link.end()

    def ask(
        self, place: Place, state: State, queries: NDArray[np.float32], k: int, seconds: float
    ) -> None:
        """Ask an actor; `wait` brings the answer. Raises ConnectionError."""
        number = next(self._numbers)
        self._links[place].ask(Request(number, seconds, state, queries, k))
        self._asked[number] = place

    def wait(self, seconds: float) -> list[Arrived]:
        """Return what has arrived, when something has or the time is over."""
        arrived: list[Arrived] = []
        with selectors.DefaultSelector() as selector:
            for place in {*self._asked.values()}:
                link = self._links[place]
                if link.socket is not None:
                    selector.register(link.socket, link.events, link)
            for key, events in selector.select(seconds):
                link = key.data
                try:
                    if events & selectors.EVENT_WRITE:
                        link.send()
                    if events & selectors.EVENT_READ:
                        for answer in link.receive():
                            if self._asked.pop(answer.number, None) is not None:
                                arrived.append(Arrived(link.place, answer))
                except ConnectionError as error:
                    self._drop(link.place)
                    arrived.append(Arrived(link.place, error))
        return arrived

    def _drop(self, place: Place) -> None:
        self._asked = {number: at for number, at in self._asked.items() if at != place}

    def forget(self) -> None:
        """Wait no more for what was asked: answers that come later are dropped."""
        self._asked.clear()

    def renew(self, share: int) -> None:
        """Connect anew to the actors of a share that has not answered in its time.

        Another actor may stand in the place of one whose machine is gone without a word.
        """
        for place, link in self._links.items():
            if place[0] == share and link.socket is not None:
                link.reconnect(TimeoutError("it has not answered in time"))
