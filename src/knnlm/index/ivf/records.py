"""Keys on their way into lists: each with its row, its list and its code, as one record.

Knows how the records of some keys are made and ordered; where they wait is `partition`'s.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import check_keys
from knnlm.index.ivf.codes import Codes
from knnlm.index.ivf.groups import Groups
from knnlm.index.ivf.lists import Lists
from knnlm.progress import Progress
from knnlm.threads import workers

Records = NDArray[Any]
Result = TypeVar("Result")

_NUMBERS_AT_ONCE = 1 << 22  # of keys, for a thread
_LEAST_ROWS_AT_ONCE = 512
CHUNKS_HELD = 5  # for two threads: those that are computed, wait, or are being written


def record_dtype(lists: Lists, stop: int) -> np.dtype[Any]:
    """Return a record's fields: `list`, `rows`, those of `Codes`, and `keys` where copied.

    stop: all rows are before it.
    """
    dim = lists.centroids.shape[1]
    code = lists.coder.encode_keys(torch.zeros(1, dim))
    parts: list[Any] = [("list", np.int32), ("rows", np.int32 if stop <= 1 << 31 else np.int64)]
    for field in fields(Codes):
        array = getattr(code, field.name).numpy()
        parts.append((field.name, array.dtype, array.shape[1:]))
    if lists.key_dtype is not None:
        parts.append(("keys", torch.empty(0, dtype=lists.key_dtype).numpy().dtype, (dim,)))
    return np.dtype(parts, align=True)


class Recorder:
    """Makes the records of a datastore's rows, from `first` on, in their order.

    memory: for the chunks in work, in bytes; None for no limit.
    """

    def __init__(
        self, store: Datastore, lists: Lists, first: int, memory: int | None = None
    ) -> None:
        self.store, self.lists, self.first = store, lists, first
        self.dtype = record_dtype(lists, store.rows)
        dim = store.settings.dimension
        self.rows_at_once = max(1, _NUMBERS_AT_ONCE // dim)
        if memory is not None:
            fitting = memory // (
                chunk_row_bytes(lists, store.rows) * (CHUNKS_HELD - 2 + workers().threads)
            )
            self.rows_at_once = max(_LEAST_ROWS_AT_ONCE, min(self.rows_at_once, fitting))

    @cached_property
    def groups(self) -> Groups:
        """The centroids, to find the nearest."""
        return Groups(self.lists.centroids, self.store.rows - self.first)

    def chunks(
        self, start: int, finish: Callable[[Records], Result], progress: Progress
    ) -> Iterator[Result]:
        """Yield the records of chunks of keys from row `start` on, in the order of their rows.

        finish: done to each chunk by the thread that made it. Raises DatastoreCorruptError for a
        key that is not `measurable`.
        """
        groups = self.groups  # made by all threads

        def record(block: tuple[int, Float[Tensor, "n dim"]]) -> tuple[int, Result]:
            return len(block[1]), finish(self.records(*block, groups))

        with progress.task("code the keys", self.store.rows - start, "keys") as advance:
            blocks = self.store.key_blocks(self.rows_at_once, start)
            for rows, finished in workers().in_turn(record, blocks):
                yield finished
                advance(rows)

    def records(self, start: int, stored: Float[Tensor, "n dim"], groups: Groups) -> Records:
        """Return the records of a run of keys, as stored."""
        rows = torch.arange(start, start + len(stored))
        keys = stored.float()
        check_keys(self.store, keys, rows)
        records = np.empty(len(keys), self.dtype)
        records["list"] = groups.nearest(keys).numpy()
        records["rows"] = rows.numpy()
        codes = self.lists.coder.encode_keys(keys)
        for field in fields(Codes):
            records[field.name] = getattr(codes, field.name).numpy()
        if self.lists.key_dtype is not None:
            records["keys"] = stored.to(self.lists.key_dtype).numpy()
        return records


def chunk_row_bytes(lists: Lists, stop: int) -> int:
    """Return about how much memory a key takes while its record is made."""
    dim, code_dim = lists.centroids.shape[1], lists.coder.code_dim
    return 12 * dim + 20 * code_dim + 2 * record_dtype(lists, stop).itemsize + 128


def list_order(records: Records, seed: int) -> NDArray[np.int64]:
    """Return where the records of whole lists are, list by list, in random order within each.

    The order is the same however many other lists there are.
    """
    from knnlm.index.ivf import kernels_build  # numba takes half a second to import

    keys = np.empty(len(records), np.uint64)
    kernels_build.sort_keys(records["list"], records["rows"], seed & 0x7FFF_FFFF, keys)
    return keys.argsort()
