"""Bringing the records of keys into lists: in memory, or through files, each for some of the lists.

Keys are read once, in their order. Where their records are more than fit in memory, each is
appended to the file of its list's range, a *bucket*; then one bucket after another is sorted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.files import writing
from knnlm.index.ivf.begun import Begun
from knnlm.index.ivf.records import Recorder, Records, list_order
from knnlm.progress import Progress
from knnlm.threads import workers

_CHECKPOINT_BYTES = 2 << 30  # of records


class Sorted(NamedTuple):
    """The records of whole lists. records[order] are in the order of the index.

    first: the position of the first of them in the index.
    """

    first: int
    records: Records
    order: NDArray[np.int64]

    def runs(self, size_bytes: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the position in the index and the places in `records` of some at a time."""
        rows = max(1, size_bytes // self.records.itemsize)
        for start in range(0, len(self.order), rows):
            yield self.first + start, self.order[start : start + rows]


def starts_of(counts: NDArray[np.int64]) -> Int[Tensor, " lists_plus_1"]:
    """Return where lists of some sizes start, and the end of the last."""
    return torch.from_numpy(np.concatenate([[0], counts.cumsum()]))


class InMemory:
    """All records of a part, in memory."""

    def __init__(self, recorder: Recorder, seed: int, progress: Progress) -> None:
        self._seed = seed
        self._records = np.empty(recorder.store.rows - recorder.first, recorder.dtype)
        filled = 0
        for records in recorder.chunks(recorder.first, lambda made: made, progress):
            self._records[filled : filled + len(records)] = records
            filled += len(records)
        nlist = len(recorder.lists.centroids)
        counts = np.bincount(self._records["list"], minlength=nlist)
        self.starts = starts_of(counts)

    @property
    def left(self) -> int:
        """How many records `sorted` yields."""
        return len(self._records)

    def sorted(self) -> Iterator[Sorted]:
        """Yield all of them."""
        yield Sorted(0, self._records, list_order(self._records, self._seed))


class OnDisk:
    """The records of a part in files, one for each range of lists; see `Begun` for what stays.

    edges: the first list of each range, and the number of lists. memory: for one bucket, in bytes;
    a larger one is read from its mapped file.
    """

    def __init__(
        self, recorder: Recorder, begun: Begun, edges: NDArray[np.int64], seed: int, memory: int
    ) -> None:
        self._recorder, self._begun, self._edges = recorder, begun, edges
        self._seed, self._memory = seed, memory
        self._counts = np.zeros(len(recorder.lists.centroids), np.int64)
        if begun.counts:
            self._counts[:] = begun.counts

    def _path(self, bucket: int) -> Path:
        return self._begun.folder / f"bucket-{bucket:05d}"

    @property
    def starts(self) -> Int[Tensor, " lists_plus_1"]:
        """Where the lists start."""
        return starts_of(self._counts)

    def fill(self, progress: Progress) -> None:
        """Append the records of all keys that are in no bucket yet. Raises DatastoreWriteError."""
        begun, total = self._begun, self._recorder.store.rows
        row = max(begun.rows, self._recorder.first)
        if row == total:
            return
        sizes = begun.sizes or [0] * (len(self._edges) - 1)
        with writing(begun.folder):
            files = [
                self._path(bucket).open("r+b" if size else "wb")
                for bucket, size in enumerate(sizes)
            ]
            try:
                for file, size in zip(files, sizes, strict=True):
                    file.seek(size)
                    file.truncate()
                unsaved = 0
                for records, stops, counts in self._recorder.chunks(row, self._by_bucket, progress):
                    start = 0
                    for file, stop in zip(files, stops.tolist(), strict=True):
                        file.write(records[start:stop].tobytes())
                        start = stop
                    self._counts += counts
                    row += len(records)
                    unsaved += records.nbytes
                    if unsaved >= _CHECKPOINT_BYTES and not begun.is_saving:
                        unsaved = 0
                        self._save(row, files)
                begun.wait()
                self._save(row, files)
                begun.wait()
            finally:
                for file in files:
                    file.close()

    def _save(self, row: int, files: list[BinaryIO]) -> None:
        for file in files:
            file.flush()
        self._begun.save(
            [Path(file.name) for file in files],
            rows=row,
            sizes=[file.tell() for file in files],
            counts=self._counts.tolist(),
        )

    def _by_bucket(self, records: Records) -> tuple[Records, NDArray[np.int64], NDArray[np.int64]]:
        """Return records bucket by bucket, where each bucket's end, and the sizes of the lists."""
        counts = np.bincount(records["list"], minlength=len(self._counts))
        ends = counts.cumsum()
        of_list = np.repeat(np.arange(len(self._edges) - 1, dtype=np.uint16), np.diff(self._edges))
        order = of_list[records["list"]].argsort(kind="stable")
        return records[order], ends[self._edges[1:] - 1], counts

    @property
    def left(self) -> int:
        """How many records `sorted` yields."""
        starts = self.starts
        return int(starts[-1] - starts[self._edges[self._begun.placed]])

    def sorted(self) -> Iterator[Sorted]:
        """Yield the records of each bucket that is not `placed` yet; the next is read meanwhile."""
        starts = self.starts
        item_bytes = self._recorder.dtype.itemsize

        def read(bucket: int) -> Sorted:
            first, stop = starts[self._edges[bucket : bucket + 2]].tolist()
            records: Records
            if (stop - first) * item_bytes <= self._memory:
                records = np.fromfile(self._path(bucket), self._recorder.dtype)
            else:
                records = np.memmap(self._path(bucket), self._recorder.dtype, "r")
            return Sorted(first, records, list_order(records, self._seed))

        left = range(self._begun.placed, len(self._edges) - 1)
        return workers().in_turn(read, left, ahead=1)

    def place(self, written: Path) -> None:
        """Note that the records of one more bucket are in a file, and delete that bucket."""
        bucket = self._begun.placed
        self._begun.save([written], [self._path(bucket)], placed=bucket + 1)


def bucket_edges(sizes: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    """Split lists of these sizes into ranges about as large; see `OnDisk`."""
    ends = np.concatenate([[0], sizes.cumsum()])
    wanted = np.linspace(0, ends[-1], buckets + 1)
    edges = np.searchsorted(ends, wanted)
    edges[0], edges[-1] = 0, len(sizes)
    return np.unique(edges)
