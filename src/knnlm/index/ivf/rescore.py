"""Exact distances of a compressed index's candidates, from the datastore's own keys.

Candidates of all queries are grouped by blocks of rows, so that memory and the disk are read
forwards. Where the keys do not fit into memory, the pages that a block's candidates need are asked
for some blocks ahead, in runs; for a few queries, all of them at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf import kernels
from knnlm.index.ivf.kernels import Pairs
from knnlm.index.ivf.read_ahead import read_ahead
from knnlm.threads import workers

_BLOCK_BITS = 11  # 2,048 rows: their keys fit into a core's cache
_BLOCKS_AT_ONCE = 4
_ROWS_AT_ONCE = _BLOCKS_AT_ONCE << _BLOCK_BITS
_TASKS_AHEAD = 8
_GAP_BYTES = 1 << 17  # read along: takes less time than another request


def key_bits(keys: Float[Tensor, "n dim"]) -> NDArray[Any]:
    """Return keys as the kernels want them: float32, or the 16 bits of a narrower dtype."""
    names = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}
    return keys.view(names.get(keys.dtype, keys.dtype)).numpy()


class _Task(NamedTuple):
    """Candidates that lie in some blocks of a shard: from place `start` to `stop`."""

    keys: NDArray[Any]
    first_row: int
    start: int
    stop: int


class DatastoreKeys:
    """The keys of a datastore's snapshot, mapped. short: whether memory cannot hold them all."""

    def __init__(self, store: Datastore, short: bool) -> None:
        self._store, self._short = store, short
        self._shards: list[tuple[int, NDArray[Any]]] | None = None

    def measure(self, pairs: Pairs, distances: NDArray[np.float32], *, parallel: bool) -> None:
        """Write the squared distance of each pair of a query and a row.

        parallel: on all workers, for many pairs, from a thread that is none of them.
        """
        if self._shards is None:  # a damaged shard is an error of the search that needs it
            blocks = self._store.key_blocks(max(1, self._store.rows))
            self._shards = [(first, key_bits(keys)) for first, keys in blocks]
        blocks_in_all = (self._store.rows >> _BLOCK_BITS) + 1
        starts, places = kernels.by_block(pairs.rows, _BLOCK_BITS, blocks_in_all)
        tasks = self._tasks(starts, _BLOCKS_AT_ONCE if parallel else blocks_in_all)
        ahead = _TASKS_AHEAD if parallel else len(tasks)

        def ask(task: _Task) -> None:
            needed = np.zeros(len(task.keys), np.bool_)
            rows = pairs.rows[places[task.start : task.stop]] - task.first_row
            needed[rows[(rows >= 0) & (rows < len(needed))]] = True
            read_ahead(task.keys, np.flatnonzero(needed), _GAP_BYTES if parallel else 0)

        def measure(number: int) -> None:
            if self._short and number + ahead < len(tasks):
                ask(tasks[number + ahead])
            keys, first_row, start, stop = tasks[number]
            some = places[start:stop]
            if parallel:  # so that many that have a key in common follow each other
                rows = (pairs.rows[some] & _ROWS_AT_ONCE - 1).astype(np.uint16)  # sorts by radix
                some = some[rows.argsort(kind="stable")]
            kernels.exact_at(pairs, some, keys, first_row, distances)

        if self._short:
            for task in tasks[:ahead]:
                ask(task)
        run: Callable[..., Any] = workers().map if parallel else map
        list(run(measure, range(len(tasks))))

    def _tasks(self, starts: NDArray[np.int64], blocks_at_once: int) -> list[_Task]:
        tasks = []
        for first_row, keys in self._shards or ():
            first = first_row >> _BLOCK_BITS
            end = (first_row + len(keys) - 1 >> _BLOCK_BITS) + 1
            edges = [*range(first, end, blocks_at_once), end]
            for start, stop in zip(starts[edges[:-1]], starts[edges[1:]], strict=True):
                if stop > start:
                    tasks.append(_Task(keys, first_row, int(start), int(stop)))
        return tasks
