"""Parts of an inverted file: runs of datastore rows, coded and grouped by list.

An index is one part as built and one for each run of rows appended since. The arrays of a part
have the same names in memory and in its file: those of the fields of `Part`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf.file import ArrayWriter
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.partition import InMemory, OnDisk
from knnlm.index.ivf.records import Recorder, Records, record_dtype
from knnlm.progress import SILENT, Progress
from knnlm.threads import workers

_WRITTEN_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class Part:
    """A run of datastore rows, list by list: starts[l] to starts[l + 1] is list l.

    codes, steps, half_norms: see `Codes`. keys: None where they are read from the datastore.
    """

    starts: Int[Tensor, " lists_plus_1"]
    rows: Int[Tensor, " n"]
    codes: Int8[Tensor, "n code_dim"] | UInt8[Tensor, "n half_code_dim"]
    steps: Float[Tensor, " n"]
    half_norms: Float[Tensor, " n"]
    keys: Float[Tensor, "n dim"] | None = None

    @classmethod
    def in_memory(cls, store: Datastore, lists: Lists, first: int) -> "Part":
        """Code the rows from `first` on without a file: the few appended since the last build."""
        waiting = InMemory(Recorder(store, lists, first), 0, SILENT)
        (placed,) = waiting.sorted()
        arrays = _arrays(placed.records[placed.order])
        return cls(starts=waiting.starts, **arrays)

    def arrays(self) -> dict[str, Tensor]:
        """Return the part's arrays by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    def to(self, device: torch.device) -> "Part":
        """Return the part on a device."""
        return Part(**{name: array.to(device) for name, array in self.arrays().items()})

    def of_lists(self, lists: range) -> "Part":
        """Return the part with the members of some lists only; the others are empty."""
        first, stop = int(self.starts[lists.start]), int(self.starts[lists.stop])
        members = {name: array[first:stop] for name, array in self.arrays().items()}
        return Part(**members | {"starts": self.starts.clamp(first, stop) - first})

    def masked(self, alive: Bool[Tensor, " rows"]) -> "Part":
        """Return the part with forgotten entries infinitely far away."""
        live = alive[self.rows]
        if bool(live.all()):
            return self
        return replace(self, half_norms=self.half_norms.masked_fill(~live, torch.inf))


def planned_part(rows: int, stop: int, lists: Lists) -> Part:
    """Return a part's dtypes and shapes, without contents, to lay out its file.

    rows: how many. stop: all of them are before it.
    """
    record = _arrays(np.empty(1, record_dtype(lists, stop)))
    with torch.device("meta"):
        arrays = {
            name: torch.empty(rows, *array.shape[1:], dtype=array.dtype)
            for name, array in record.items()
        }
        return Part(starts=torch.empty(len(lists.centroids) + 1, dtype=torch.int64), **arrays)


def write_part(
    writer: ArrayWriter,
    waiting: InMemory | OnDisk,
    progress: Progress,
    placed: Callable[[], None] = lambda: None,
) -> None:
    """Write all arrays of a part, a bounded number of keys at a time.

    placed: called when all records of some whole lists are written. Raises DatastoreWriteError.
    """
    writer.write("starts", waiting.starts)
    with progress.task("write the index", waiting.left, "keys") as advance:
        for ordered in waiting.sorted():

            def pick(
                run: tuple[int, NDArray[np.int64]], records: Records = ordered.records
            ) -> tuple[int, dict[str, Tensor]]:
                return run[0], _arrays(records[run[1]])

            for first, arrays in workers().in_turn(pick, ordered.runs(_WRITTEN_BYTES)):
                for name, array in arrays.items():
                    writer.write(name, array, first)
                advance(len(arrays["rows"]))
            writer.flush()
            placed()


def _arrays(records: Records) -> dict[str, Tensor]:
    """Return the arrays of a part that records hold, in their order."""
    names = [name for name in records.dtype.names or () if name != "list"]
    return {name: torch.from_numpy(np.ascontiguousarray(records[name])) for name in names}
