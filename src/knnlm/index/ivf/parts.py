"""Parts of an inverted file: runs of datastore rows, coded and grouped by list.

An index is one part as built and one for each run of rows appended since. The arrays of a part
have the same names in memory and in its file: those of the fields of `Part`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf.codes import Codes
from knnlm.index.ivf.file import ArrayWriter
from knnlm.index.ivf.lists import Lists, Placement
from knnlm.progress import SILENT, Progress
from knnlm.threads import workers

_BLOCK_ROWS = 8192
_GATHERED_BYTES = 1 << 30


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
    def in_memory(cls, store: Datastore, lists: Lists, placement: Placement) -> "Part":
        """Code some rows without a file: for the few that were appended since the last build."""
        placed = [(codes, keys) for _, keys, codes in _placed_keys(store, lists, placement, SILENT)]
        return cls(
            placement.starts,
            placement.rows.to(row_dtype(store.rows)),
            torch.cat([codes.codes for codes, _ in placed]),
            torch.cat([codes.steps for codes, _ in placed]),
            torch.cat([codes.half_norms for codes, _ in placed]),
            torch.cat([keys.to(lists.key_dtype) for _, keys in placed])
            if lists.key_dtype is not None
            else None,
        )

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


def row_dtype(stop: int) -> torch.dtype:
    """Return the dtype in which an index keeps the rows before `stop`."""
    return torch.int32 if stop <= 1 << 31 else torch.int64


def planned_part(rows: int, stop: int, lists: Lists) -> Part:
    """Return a part's dtypes and shapes, without contents, to lay out its file.

    rows: how many. stop: all of them are before it.
    """
    nlist, dim = lists.centroids.shape
    with torch.device("meta"):
        return Part(
            torch.empty(nlist + 1, dtype=torch.int64),
            torch.empty(rows, dtype=row_dtype(stop)),
            lists.coder.no_codes(rows),
            torch.empty(rows),
            torch.empty(rows),
            None if lists.key_dtype is None else torch.empty(rows, dim, dtype=lists.key_dtype),
        )


def write_part(
    writer: ArrayWriter,
    store: Datastore,
    lists: Lists,
    placement: Placement,
    progress: Progress,
) -> None:
    """Write all arrays of a part, a bounded number of keys at a time.

    Raises DatastoreWriteError.
    """
    writer.write("starts", placement.starts)
    writer.write("rows", placement.rows.to(row_dtype(store.rows)))
    for first, keys, codes in _placed_keys(store, lists, placement, progress):
        for field in fields(codes):
            writer.write(field.name, getattr(codes, field.name), first)
        if lists.key_dtype is not None:
            writer.write("keys", keys.to(lists.key_dtype), first)


def _placed_keys(
    store: Datastore, lists: Lists, placement: Placement, progress: Progress
) -> Iterator[tuple[int, Float[Tensor, "n dim"], Codes]]:
    """Yield (first position, keys, codes) over a placement, a bounded number of keys at a time."""
    rows = placement.rows
    size = max(1, _GATHERED_BYTES // (store.key_dtype.itemsize * store.settings.dimension))
    with progress.task("write the index", len(rows), "keys") as advance:
        for start in range(0, len(rows), size):
            keys = store.keys_at(rows[start : start + size])
            chunks = workers().chunks(len(keys), _BLOCK_ROWS)

            def encode(chunk: range, keys: Tensor = keys) -> Codes:
                return lists.coder.encode_keys(keys[chunk.start : chunk.stop].float())

            for chunk, codes in zip(chunks, workers().map(encode, chunks), strict=True):
                yield start + chunk.start, keys[chunk.start : chunk.stop], codes
                advance(len(chunk))
