"""Requests and answers as bytes: a header of fixed size, then arrays as they lie in memory.

Knows no sockets. Everything is little-endian. Nothing that arrives is executed: there are numbers,
and the text of an error.
"""

import json
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import knnlm.errors
from knnlm.errors import ClusterError, KNNLMError
from knnlm.index.cluster.states import State

GREETING = b"knnlm-share-1:"
"""What a client says first, followed by the actor's secret."""
SECRET_BYTES = 32
MOST_BYTES = 1 << 30
"""Of a message's body: more is no message of ours."""
_NUMBER, _SECONDS, _STATE, _COUNT, _BYTES = "Q", "d", "q32s", "I", "Q"
_REQUEST = struct.Struct("<" + _NUMBER + _SECONDS + _STATE + 3 * _COUNT)
_ANSWER = struct.Struct("<" + _NUMBER + "B" + _STATE + "q" + 2 * _COUNT + _BYTES)
REQUEST_BYTES, ANSWER_BYTES = _REQUEST.size, _ANSWER.size
"""Of the headers."""
_NEAREST, _SCORED, _OTHER_STATE, _FAILED = range(4)


class Nearest(NamedTuple):
    """The nearest entries of each query in a share, ascending; see `Neighbors`."""

    rows: NDArray[np.int64]  # [query, k]
    squared_distances: NDArray[np.float32]  # [query, k]


class Scored(NamedTuple):
    """What may be a candidate of each query, in a share of an inverted file.

    Queries follow each other, and within a query the parts of the index. counts: how many there are
    of a query in a part. wanted: how many a whole index would choose, at least. margins: how much
    worse the scores of those may be that it would choose too.
    """

    rows: NDArray[np.int64]  # [candidate]
    counts: NDArray[np.int64]  # [query, part]
    wanted: NDArray[np.int64]  # [1]
    margins: NDArray[np.float64]  # [query, part]
    squared_distances: NDArray[np.float32]  # [candidate]
    scores: NDArray[np.float32]  # [candidate]


class Request(NamedTuple):
    """What a client asks: to search a state, or, with no queries, to open it.

    number: chosen by the client, repeated in the answer. seconds: after which nobody waits for the
    answer. queries: [query, dim].
    """

    number: int
    seconds: float
    state: State
    queries: NDArray[np.float32]
    k: int

    @property
    def header(self) -> bytes:
        """All but the queries, which follow."""
        state = self.state.generation, bytes.fromhex(self.state.fingerprint)
        return _REQUEST.pack(self.number, self.seconds, *state, *self.queries.shape, self.k)


class RequestHeader(NamedTuple):
    """A request before its queries have arrived."""

    number: int
    seconds: float
    state: State
    shape: tuple[int, int]
    k: int

    @classmethod
    def read(cls, header: bytes | bytearray) -> "RequestHeader":
        """Read a header."""
        number, seconds, generation, fingerprint, count, dimension, k = _REQUEST.unpack(header)
        return cls(number, seconds, State(generation, fingerprint.hex()), (count, dimension), k)

    @property
    def body_bytes(self) -> int:
        """How many bytes follow."""
        return 4 * self.shape[0] * self.shape[1]


class Answer(NamedTuple):
    """What an actor answers.

    state: that it has searched; another than the one asked for where it does not have that one,
    and then found is None. entries: live ones of the state in the actor's share. error: what it has
    met instead.
    """

    number: int
    state: State
    entries: int
    found: Nearest | Scored | None = None
    error: Exception | None = None

    def parts(self) -> list[bytes | memoryview]:
        """Return the bytes to send: a header, and what follows it."""
        shape, body, kind = (0, 0), list[bytes | memoryview](), _OTHER_STATE
        if self.error is not None:
            kind = _FAILED
            told = {"error": type(self.error).__name__, "message": str(self.error)}
            body = [json.dumps(told).encode()]
        elif self.found is not None:
            if isinstance(self.found, Nearest):
                kind, shape = _NEAREST, self.found.rows.shape
            else:
                kind, shape = _SCORED, self.found.counts.shape
            body = [np.ascontiguousarray(one).reshape(-1).view(np.uint8).data for one in self.found]
        state = self.state.generation, bytes.fromhex(self.state.fingerprint)
        size = sum(len(part) for part in body)
        return [_ANSWER.pack(self.number, kind, *state, self.entries, *shape, size), *body]


class AnswerHeader(NamedTuple):
    """An answer before its body has arrived."""

    number: int
    kind: int
    state: State
    entries: int
    shape: tuple[int, int]
    body_bytes: int

    @classmethod
    def read(cls, header: bytes | bytearray) -> "AnswerHeader":
        """Read a header."""
        number, kind, generation, print_, entries, count, k, body_bytes = _ANSWER.unpack(header)
        state = State(generation, print_.hex())
        return cls(number, kind, state, entries, (count, k), body_bytes)

    def answer(self, body: bytearray) -> Answer:
        """Return the whole answer, whose arrays are those bytes."""
        answer = Answer(self.number, self.state, self.entries)
        if self.kind == _FAILED:
            return answer._replace(error=_error(json.loads(body)))
        if self.kind == _OTHER_STATE:
            return answer
        return answer._replace(found=self._found(body))

    def _found(self, body: bytearray) -> Nearest | Scored:
        """Return the arrays that a body holds, the wider numbers first."""
        size, read = self.shape[0] * self.shape[1], 0

        def take(dtype: type[np.generic], count: int) -> NDArray[Any]:
            nonlocal read
            array = np.frombuffer(body, dtype, count, read)
            read += array.nbytes
            return array

        if self.kind == _NEAREST:
            rows, distances = take(np.int64, size), take(np.float32, size)
            return Nearest(rows.reshape(self.shape), distances.reshape(self.shape))
        count = (len(body) - 16 * size - 8) // 16
        rows, counts, wanted = (take(np.int64, number) for number in (count, size, 1))
        margins = take(np.float64, size).reshape(self.shape)
        distances, scores = take(np.float32, count), take(np.float32, count)
        return Scored(rows, counts.reshape(self.shape), wanted, margins, distances, scores)


def _error(told: dict[str, str]) -> Exception:
    """Return an actor's error: one of ours as it was, another as ClusterError with its name."""
    kind = getattr(knnlm.errors, told["error"], None)
    if isinstance(kind, type) and issubclass(kind, KNNLMError):
        return kind(told["message"])
    return ClusterError(f"an actor failed: {told['error']}: {told['message']}")
