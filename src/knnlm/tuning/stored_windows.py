"""Windows of stored text, as the build read them: their tokens are the datastore's values."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from knnlm.choices import Boundary
from knnlm.datastore.datastore import Datastore
from knnlm.text.windows import Window

_MORE = 1.25  # windows are drawn, as their sizes differ; what is too much is left out


@dataclass(frozen=True, slots=True, eq=False)
class StoredWindow:
    """A window whose new positions are the entries from `row` on.

    begin: the first row that a continuous cache may remember: that of the window's document; in a
    stream the first that no forgotten one follows.
    """

    row: int
    begin: int
    window: Window


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a window's new positions are: their first row, and how many. context: see `Window`."""

    row: int
    count: int
    context: int
    begin: int


def sample_windows(
    store: Datastore, start_token: int, max_tokens: int, seed: int
) -> list[StoredWindow]:
    """Choose windows from all over a datastore, in row order; at most `max_tokens` new tokens.

    All of them, if they have no more. Forgotten text is in none, not even as context. Of a stream
    with context, the first entries are left out, as the text before them is not stored. The same
    seed chooses the same windows.
    """
    values, alive = store.values.numpy(), store.alive.numpy()
    streaming = store.windowing.boundary == Boundary.stream
    places = list(_stream_places(store, alive) if streaming else _document_places(store))
    sizes = np.array([place.count for place in places], np.int64)
    chosen, left = [], max_tokens
    for number in _spread(sizes, max_tokens, seed).tolist():
        place = places[number]
        count = min(place.count, left)
        if count == 0:
            break
        left -= count
        first, stop = place.row - place.context, place.row + count
        if first == place.begin:  # the window begins its document
            tokens = np.concatenate([np.array([start_token], np.int32), values[first:stop]])
        else:
            tokens = values[first - 1 : stop].copy()
        chosen.append(StoredWindow(place.row, place.begin, Window(tokens, place.context, ())))
    return sorted(chosen, key=lambda window: window.row)


def _spread(
    sizes: Int64[np.ndarray, " window"], max_tokens: int, seed: int
) -> Int64[np.ndarray, " chosen"]:
    """Return numbers of windows in random order: one from each of many equal parts of the text."""
    generator = np.random.default_rng(seed % (1 << 64))
    total = int(sizes.sum())
    if total <= max_tokens:
        return np.arange(len(sizes))
    # a token drawn at random is in a window of this size
    typical = float((sizes.astype(np.float64) ** 2).sum()) / total
    count = int(np.ceil(_MORE * max_tokens / typical))
    tokens = (np.arange(count) + generator.random(count)) / count * total
    numbers = np.searchsorted(sizes.cumsum(), tokens, side="right").clip(max=len(sizes) - 1)
    return generator.permutation(np.unique(numbers))


def _document_places(store: Datastore) -> Iterator[_Place]:
    window, context = store.windowing.window, store.windowing.context
    for document in store.documents():
        row, room, again = document.start, window, 0
        while row < document.stop:
            count = min(room, document.stop - row)
            yield _Place(row, count, again, document.start)
            row += count
            room, again = window - context, context


def _stream_places(store: Datastore, alive: Bool[np.ndarray, " rows"]) -> Iterator[_Place]:
    """Yield the windows of a stream: every shard begins with one."""
    window, context = store.windowing.window, store.windowing.context
    dead = np.concatenate([[0], (~alive).cumsum()])
    # where the live rows begin that come right before each row
    begins = np.maximum.accumulate(np.where(alive, 0, np.arange(len(alive)) + 1))
    for shard in store.shards:
        for row in range(shard.start, shard.stop, window - context):
            first = row - context - 1
            count = min(window - context, shard.stop - row)
            if (first >= 0 or row == context == 0) and dead[max(first, 0)] == dead[row + count]:
                yield _Place(row, count, context, int(begins[row]))


def inputs_before(
    store: Datastore, start_token: int, window: StoredWindow, most: int
) -> tuple[Int64[np.ndarray, " entry"], Int32[np.ndarray, " entry"]]:
    """Return up to `most` rows before a window, and the token read at the position of each."""
    rows = np.arange(max(window.begin, window.row - most), window.row)
    inputs = store.values.numpy()[rows - 1]
    if len(rows) and rows[0] == window.begin:
        inputs[0] = start_token
    return rows, inputs
