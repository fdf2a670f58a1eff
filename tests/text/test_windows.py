import itertools
import random
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from conftest import refusal

from knnlm.errors import InvalidArgumentError
from knnlm.text.windows import (
    Span,
    Window,
    Windowing,
    document_windows,
    limit_windows,
    stream_windows,
)

SIZES = [(1, 0), (2, 0), (2, 1), (5, 0), (5, 2), (5, 4), (8, 3), (16, 4)]


def cut(tokens: np.ndarray, generator: random.Random) -> Iterator[np.ndarray]:
    """Yield the tokens in pieces of random sizes, some of them empty."""
    while len(tokens):
        size = generator.choice([0, 1, 2, 3, 10, 40])
        yield tokens[:size]
        tokens = tokens[size:]
    yield tokens


def random_tokens(length: int, generator: random.Random) -> np.ndarray:
    return np.array([generator.randrange(50_000) for _ in range(length)], np.int32)


# What a window says, in comparable form: tokens, context, spans as one document a new position.
Plain = tuple[list[int], int, list[int]]


def plain(windows: Iterable[Window]) -> list[Plain]:
    listed = []
    for window in windows:
        documents = [span.document for span in window.spans for _ in range(span.count)]
        assert all(span.count > 0 for span in window.spans)
        assert [span.document for span in window.spans] == [
            k for k, _ in itertools.groupby(documents)
        ]
        assert window.tokens.dtype == np.int32
        assert window.positions == len(window.tokens) - 1
        assert window.new == window.positions - window.context == len(documents)
        assert window.inputs.tolist() == window.tokens.tolist()[:-1]
        assert window.targets.tolist() == window.tokens.tolist()[-window.new :]
        listed.append((window.tokens.tolist(), window.context, documents))
    return listed


def reference_windows(
    sequence: list[int], owners: list[int], first: int, window: int, context: int, whole_first: bool
) -> list[Plain]:
    """Walk position by position; `owners[p]` is the document of sequence[p]."""
    windows: list[Plain] = []
    new: list[int] = []
    for position in range(first, len(sequence) - 1):
        new.append(position)
        room = window if whole_first and not windows else window - context
        if len(new) == room or position == len(sequence) - 2:
            start = max(0, new[0] - context)
            predicted = [owners[p + 1] for p in new]
            windows.append((sequence[start : position + 2], new[0] - start, predicted))
            new = []
    return windows


@pytest.mark.parametrize(("window", "context"), SIZES)
def test_document_windows_match_the_reference(window: int, context: int) -> None:
    generator = random.Random(window * 100 + context)
    for length in range(60):
        tokens = random_tokens(length, generator)
        sequence = [7, *tokens.tolist()]
        expected = reference_windows(sequence, [3] * len(sequence), 0, window, context, True)
        windows = plain(document_windows(3, cut(tokens, generator), 7, Windowing(window, context)))
        assert windows == expected
        predicted = [token for read, again, _ in windows for token in read[again + 1 :]]
        assert predicted == tokens.tolist(), "a token is not predicted exactly once"


@pytest.mark.parametrize(("window", "context"), SIZES)
def test_document_windows_go_on_after_any_window_and_after_no_other_token(
    window: int, context: int
) -> None:
    generator = random.Random(window * 100 + context)
    for length in [0, 1, 2, 5, 16, 17, 40]:
        tokens = random_tokens(length, generator)

        def run(skip: int, tokens: np.ndarray = tokens) -> list[Plain]:
            pieces = cut(tokens, generator)
            return plain(document_windows(3, pieces, 7, Windowing(window, context), skip=skip))

        whole = run(0)
        ends = list(itertools.accumulate((len(new) for _, _, new in whole), initial=0))
        for skip in range(-3, length + 4):
            if skip in ends:
                assert run(skip) == whole[ends.index(skip) :]
            else:
                with refusal(
                    InvalidArgumentError, "skip must be the end of a window", f"got {skip}:"
                ):
                    run(skip)


def test_document_windows_read_no_further_than_needed() -> None:
    taken = 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.arange(10, dtype=np.int32)

    windows = document_windows(0, pieces(), 0, Windowing(25, 5))
    for count in range(1, 20):
        next(windows)
        assert taken == -(-(25 + 20 * (count - 1)) // 10)


def test_windows_own_their_tokens() -> None:
    piece = np.arange(20, dtype=np.int32)
    windows = document_windows(0, [piece], 99, Windowing(10, 4))
    first = next(windows)
    assert first.tokens.tolist() == [99, *range(10)]
    first.tokens[:] = 0
    assert next(windows).tokens.tolist() == list(range(5, 16))
    assert piece.tolist() == list(range(20))


@pytest.mark.parametrize(("window", "context"), SIZES)
def test_stream_windows_match_the_reference(window: int, context: int) -> None:
    generator = random.Random(window * 100 + context)
    for lengths in [[], [0], [1], [2], [0, 1, 0, 1], [1] * 30, [40], [3, 0, 17, 1, 1, 30], [9, 9]]:
        for history_length in [0, 1, 2, context, context + 1, context + 5]:
            history = random_tokens(history_length, generator)
            texts = [random_tokens(length, generator) for length in lengths]
            documents = [(10 + n, cut(text, generator)) for n, text in enumerate(texts)]
            sequence = [token for part in [history, *texts] for token in part.tolist()]
            owners = [-1] * history_length
            owners += [10 + n for n, length in enumerate(lengths) for _ in range(length)]
            first = max(0, history_length - 1)
            expected = reference_windows(sequence, owners, first, window, context, False)
            windows = stream_windows(documents, Windowing(window, context), history)
            assert plain(windows) == expected


def test_without_context_a_stream_is_cut_into_equal_blocks() -> None:
    x = np.arange(100, 141, dtype=np.int32)
    empty = np.empty(0, np.int32)
    windows = list(stream_windows([(0, [x])], Windowing(8, 0), empty))
    for i, window in enumerate(windows):
        assert window.inputs.tolist() == x[i * 8 : (i + 1) * 8].tolist()
        assert window.targets.tolist() == x[i * 8 + 1 : (i + 1) * 8 + 1].tolist()
    assert [window.new for window in windows] == [8] * 5


@pytest.mark.parametrize(("window", "context"), SIZES)
def test_stream_windows_go_on_after_any_block(window: int, context: int) -> None:
    generator = random.Random(window * 100 + context)
    tokens = random_tokens(50, generator)
    empty = np.empty(0, np.int32)
    whole = plain(stream_windows([(4, cut(tokens, generator))], Windowing(window, context), empty))
    end = 1
    for index, (_, _, new) in enumerate(whole):
        history = tokens[max(0, end - context - 1) : end]
        rest = [(4, cut(tokens[end:], generator))]
        resumed = plain(stream_windows(rest, Windowing(window, context), history))
        assert resumed == whole[index:]
        end += len(new)
    assert end == len(tokens)


def test_stream_windows_read_no_further_than_needed() -> None:
    taken = 0

    def documents() -> Iterator[tuple[int, Iterable[np.ndarray]]]:
        nonlocal taken
        for taken in itertools.count(1):
            yield taken, iter([np.arange(10, dtype=np.int32)])

    windows = stream_windows(documents(), Windowing(25, 5), np.empty(0, np.int32))
    for count in range(1, 20):
        next(windows)
        assert taken == -(-(1 + 20 * count) // 10)


@pytest.mark.parametrize(
    ("window", "context", "parts"),
    [
        (0, 0, ["window must be at least 1", "got 0", "choose"]),
        (-3, 0, ["window must be at least 1", "got -3", "choose"]),
        (4, 4, ["context must be", "less than window (4)", "got 4", "choose"]),
        (4, -1, ["context must be at least 0", "got -1", "choose"]),
    ],
)
def test_bad_window_sizes_are_refused(window: int, context: int, parts: list[str]) -> None:
    with refusal(InvalidArgumentError, *parts):
        Windowing(window, context)
    Windowing(1, 0)
    Windowing(4, 3)


@pytest.mark.parametrize(("window", "context"), SIZES)
def test_limited_windows_are_the_first_new_positions(window: int, context: int) -> None:
    generator = random.Random(window * 100 + context)
    parts = [(n, [random_tokens(length, generator)]) for n, length in enumerate([5, 1, 20, 9])]
    windows = list(stream_windows(parts, Windowing(window, context), np.empty(0, np.int32)))
    flat = [
        (read[: again + 1 + i + 1], again, owner)
        for read, again, owners in plain(windows)
        for i, owner in enumerate(owners)
    ]
    assert plain(limit_windows(windows, None)) == plain(windows)
    for max_new in range(len(flat) + 3):
        limited = [
            (read[: again + 1 + i + 1], again, owner)
            for read, again, owners in plain(limit_windows(windows, max_new))
            for i, owner in enumerate(owners)
        ]
        assert limited == flat[:max_new]


def test_a_limit_takes_no_window_it_does_not_need() -> None:
    def windows(count: int) -> Iterator[Window]:
        for number in range(count):
            yield Window(np.arange(5, dtype=np.int32), 1, (Span(number, 1), Span(number + 50, 2)))
        pytest.fail("asked for one window too many")

    assert list(limit_windows(windows(0), 0)) == []
    assert [window.new for window in limit_windows(windows(2), 6)] == [3, 3]
    assert [window.spans for window in limit_windows(windows(2), 5)] == [
        (Span(0, 1), Span(50, 2)),
        (Span(1, 1), Span(51, 1)),
    ]
    with refusal(InvalidArgumentError, "max_new must be at least 0", "got -1", "None"):
        list(limit_windows([], -1))
