"""Tokens → windows, which a model reads at once; every token is new in exactly one of them.

Knows token ids; neither text nor models. Holds no more than a window and a piece in memory.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int32

from knnlm.choices import Boundary, parse_choice
from knnlm.errors import InvalidArgumentError
from knnlm.rules import LARGEST, check_flag, check_whole

Tokens = Int32[np.ndarray, " _"]  # any number of token ids

DEFAULT_WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Windowing:
    """How text is cut into windows.

    window: positions that the model reads at once. context: how many of them the previous window
    has already scored. boundary: "document" (each document starts afresh) or "stream" (all
    documents are one stream, as in Khandelwal et al. 2020). control_tokens: whether a text that has
    `</s>` or the like means the tokenizer's control tokens; else they are text like any other.

    Raises InvalidArgumentError.
    """

    window: int = DEFAULT_WINDOW
    context: int = DEFAULT_WINDOW // 4
    boundary: str = Boundary.document
    control_tokens: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", check_whole("window", self.window))
        object.__setattr__(self, "context", check_whole("context", self.context, least=0))
        if self.context >= self.window:
            raise InvalidArgumentError(
                f"context must be at least 0 and less than window ({self.window}), got "
                f"{self.context}: choose a smaller context or a larger window"
            )
        parse_choice(Boundary, "boundary", self.boundary)
        check_flag("control_tokens", self.control_tokens)

    def check_positions(self, max_positions: int | None, model_name: str) -> None:
        """Refuse windows longer than a model's positions (None: unlimited); InvalidArgumentError.

        model_name: for the message.
        """
        if max_positions is not None and self.window > max_positions:
            raise InvalidArgumentError(
                f"window must be at most {max_positions} for {model_name}, got {self.window}: "
                "the model has no more positions"
            )


def choose_windowing(
    max_positions: int | None,
    model_name: str,
    *,
    window: int | None = None,
    context: int | None = None,
    boundary: str | None = None,
    control_tokens: bool | None = None,
    default: Windowing | None = None,
) -> Windowing:
    """Complete the given settings from `default`, else 1,024 positions, a quarter of them context.

    Default sizes shrink to fit the model's positions and a smaller window. Raises
    InvalidArgumentError, also for a window longer than the model's positions (None: unlimited).
    """
    if default is None:
        size = min(DEFAULT_WINDOW, max_positions or DEFAULT_WINDOW)
        default = Windowing(size, size // 4)
    if window is None:
        window = default.window
    if context is None:
        context = min(default.context, window // 4)
    if boundary is None:
        boundary = default.boundary
    if control_tokens is None:
        control_tokens = default.control_tokens
    chosen = Windowing(window, context, boundary, control_tokens)
    chosen.check_positions(max_positions, model_name)
    return chosen


@dataclass(frozen=True, slots=True)
class Span:
    """The new positions of a window that predict tokens of one document."""

    document: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Tokens that the model reads at once; the positions after the first `context` are new.

    stored: which of the new positions become entries of a datastore; None for all.
    """

    tokens: Tokens
    context: int
    spans: tuple[Span, ...]
    stored: Bool[np.ndarray, " new"] | None = None

    @property
    def positions(self) -> int:
        """How many positions the model reads."""
        return len(self.tokens) - 1

    @property
    def new(self) -> int:
        """How many positions no earlier window has scored."""
        return self.positions - self.context

    @property
    def rows(self) -> int:
        """How many of the new positions become entries."""
        return self.new if self.stored is None else int(self.stored.sum())

    @property
    def inputs(self) -> Tokens:
        """The tokens that the model reads."""
        return self.tokens[:-1]

    @property
    def targets(self) -> Tokens:
        """The tokens that the new positions predict."""
        return self.tokens[1 + self.context :]

    @property
    def values(self) -> Tokens:
        """Those of them that become entries."""
        return self.targets if self.stored is None else self.targets[self.stored]


def with_stored(
    windows: Iterable[Window], stored: Bool[np.ndarray, " token"], skip: int = 0
) -> Iterator[Window]:
    """Yield a document's windows, of which only some tokens are stored; see `document_windows`."""
    for window in windows:
        yield replace(window, stored=stored[skip : skip + window.new])
        skip += window.new


class _Sequence:
    """A token sequence that arrives in pieces, read from left to right."""

    def __init__(self, pieces: Iterable[Tokens]) -> None:
        self._pieces = iter(pieces)
        self._held = np.empty(0, np.int32)  # the tokens read ahead; they end at read_tokens
        self.read_tokens = 0

    def slice(self, start: int, stop: int) -> Tokens:
        """Return the tokens in [start, stop) that exist, and drop everything before `start`."""
        parts = [self._held[max(0, len(self._held) - (self.read_tokens - start)) :]]
        while self.read_tokens < stop and (piece := next(self._pieces, None)) is not None:
            self.read_tokens += len(piece)
            if self.read_tokens > start:
                parts.append(piece[start - self.read_tokens :])
        self._held = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return self._held[: stop - start].copy()


def document_windows(
    document: int,
    pieces: Iterable[Tokens],
    start_token: int,
    windowing: Windowing,
    *,
    skip: int = 0,
) -> Iterator[Window]:
    """Yield windows in which each of the document's tokens is predicted as new exactly once.

    The first window scores all its positions, each later one rereads `context` of them. The first
    `skip` tokens are already scored: the windows continue as in the run that scored them.
    """
    window, context = windowing.window, windowing.context
    sequence = _Sequence(itertools.chain([np.array([start_token], np.int32)], pieces))
    sequence.slice(max(0, skip - context), skip + 2)
    beyond = sequence.read_tokens - (skip + 1)
    ends_window = skip == 0 or (skip >= window and (skip - window) % (window - context) == 0)
    if beyond < 0 or (beyond > 0 and not ends_window):
        raise InvalidArgumentError(
            f"skip must be the end of a window (window {window}, context {context}) of document "
            f"{document}, got {skip}: pass the number of tokens already scored, and the same sizes"
        )
    room = window if skip == 0 else window - context
    for tokens, again in _cut(sequence, windowing, skip, room):
        yield Window(tokens, again, (Span(document, len(tokens) - 1 - again),))


def stream_windows(
    documents: Iterable[tuple[int, Iterable[Tokens]]], windowing: Windowing, history: Tokens
) -> Iterator[Window]:
    """Yield the blocks of all documents as one stream, each with `window - context` new positions.

    `history` precedes the stream; if it is empty, the stream's first token is never predicted.
    """
    arrived: deque[Span] = deque()  # tokens that no window has taken yet, by document

    def pieces() -> Iterator[Tokens]:
        yield history
        for document, document_pieces in documents:
            for piece in document_pieces:
                if len(piece):
                    arrived.append(Span(document, len(piece)))
                yield piece

    sequence = _Sequence(pieces())
    if len(history) == 0 and len(sequence.slice(0, 1)):
        _take(arrived, 1)
    room = windowing.window - windowing.context
    for tokens, again in _cut(sequence, windowing, max(0, len(history) - 1), room):
        yield Window(tokens, again, _take(arrived, len(tokens) - 1 - again))


def _cut(
    sequence: _Sequence, windowing: Windowing, scored: int, room: int
) -> Iterator[tuple[Tokens, int]]:
    """Yield the tokens of each window, and how many of its positions are not new.

    scored: the positions before the first window's new ones. room: how many new ones it may have.
    """
    while True:
        again = min(windowing.context, scored)
        tokens = sequence.slice(scored - again, scored + room + 1)
        new = len(tokens) - 1 - again
        if new < 1:
            return
        yield tokens, again
        scored += new
        room = windowing.window - windowing.context


def _take(arrived: deque[Span], count: int) -> tuple[Span, ...]:
    """Remove the first `count` tokens; return them as one span per document."""
    taken: list[Span] = []
    while count:
        span = arrived.popleft()
        if span.count > count:
            arrived.appendleft(Span(span.document, span.count - count))
            span = Span(span.document, count)
        count -= span.count
        if taken and taken[-1].document == span.document:
            span = Span(span.document, taken.pop().count + span.count)
        taken.append(span)
    return tuple(taken)


def limit_windows(windows: Iterable[Window], max_new: int | None) -> Iterator[Window]:
    """Yield windows until they hold `max_new` new positions (None: all); the last is cut short."""
    if max_new is None:
        yield from windows
        return
    check_whole("max_new", max_new, least=0, most=LARGEST, remedy="use None for no limit")
    left = max_new
    for window in windows if left else ():
        if window.new >= left:
            spans = _take(deque(window.spans), left)
            stored = None if window.stored is None else window.stored[:left]
            yield Window(window.tokens[: window.context + 1 + left], window.context, spans, stored)
            return
        yield window
        left -= window.new
