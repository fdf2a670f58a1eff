"""Building the file of an inverted file's part, in bounded memory, so that it can be gone on with.

The lists are learned on a sample; then keys are read once, in their order, coded, and brought into
their lists. Up to a size that happens in memory; beyond it in files, and a build that was killed
goes on where it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf.begun import Begun
from knnlm.index.ivf.file import ArrayWriter
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.partition import InMemory, OnDisk, bucket_edges
from knnlm.index.ivf.parts import planned_part, write_part
from knnlm.index.ivf.records import Recorder
from knnlm.progress import Progress

IN_MEMORY_BYTES = 1 << 30
"""Records of at most so many bytes are brought into lists in memory."""
_LEAST_BUCKET_BYTES = 256 << 20
_BUCKETS = 64
_MOST_BUCKETS = 512  # that many files are open
_EDGES = "bucket_edges"
_FORMAT = 1  # of what an unfinished build leaves


class Learned(NamedTuple):
    """Lists, and how large each of them will be in proportion to the others."""

    lists: Lists
    sizes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """How to build: on what the result depends, and within which limits.

    options: what tells this build from others of the same entries. key_dtype: as in `Lists`.
    size_bytes: of all records. memory: for buffers, in bytes.
    """

    options: dict[str, Any]
    key_dtype: torch.dtype | None
    size_bytes: int
    memory: int
    seed: int
    progress: Progress

    @property
    def in_memory(self) -> bool:
        """Whether records are brought into lists in memory."""
        return self.size_bytes <= min(IN_MEMORY_BYTES, self.memory // 2)

    @property
    def buckets(self) -> int:
        """Into how many files the records go, where they do."""
        wanted = max(_LEAST_BUCKET_BYTES, self.size_bytes // _BUCKETS)
        bucket_bytes = max(1, min(wanted, self.memory // 8))
        return min(_MOST_BUCKETS, -(-self.size_bytes // bucket_bytes))


class CodedFile(NamedTuple):
    """A part's file, written but for its header; see `ArrayWriter`."""

    writer: ArrayWriter
    lists: Lists
    starts: Int[Tensor, " lists_plus_1"]


@contextmanager
def coded_file(
    store: Datastore, path: Path, first: int, learn: Callable[[], Learned], work: Work
) -> Iterator[CodedFile]:
    """Write the rows from `first` on into a file, with the lists where these are all rows.

    learn: what the lists are; not called where an earlier run has learned them. Raises
    DatastoreWriteError, and DatastoreCorruptError for a key that is not `measurable`.
    """
    with _records_in_lists(store, first, learn, work) as (lists, waiting, kept):
        planned = planned_part(store.rows - first, store.rows, lists).arrays()
        list_arrays = {} if first else lists.arrays()
        with ArrayWriter(path, list_arrays | planned, kept) as writer:
            for name, array in list_arrays.items():
                writer.write(name, array)

            def placed() -> None:
                if isinstance(waiting, OnDisk):
                    waiting.place(writer.aside)

            write_part(writer, waiting, work.progress, placed)
            yield CodedFile(writer, lists, waiting.starts)


@contextmanager
def _records_in_lists(
    store: Datastore, first: int, learn: Callable[[], Learned], work: Work
) -> Iterator[tuple[Lists, InMemory | OnDisk, Path | None]]:
    """Yield the lists, their records, and the file to write these to if it is to stay."""
    if work.in_memory:
        lists = learn().lists
        recorder = Recorder(store, lists, first, work.memory // 2)
        yield lists, InMemory(recorder, work.seed, work.progress), None
        return
    options = {**work.options, "first": first, "seed": work.seed, "format": _FORMAT}
    with Begun(store, options | {"buckets": work.buckets}) as begun:
        if not begun.learned:
            learned = learn()
            edges = bucket_edges(learned.sizes, work.buckets)
            begun.save_learned(learned.lists.arrays() | {_EDGES: torch.from_numpy(edges)})
        lists = Lists.from_arrays(begun.learned, work.key_dtype)
        edges = begun.learned[_EDGES].numpy()
        recorder = Recorder(store, lists, first, work.memory // 2)
        waiting = OnDisk(recorder, begun, edges, work.seed, work.memory // 6)
        waiting.fill(work.progress)
        yield lists, waiting, begun.written
