"""The file of an inverted-file index: safetensors, written in pieces and memory-mapped.

Knows bytes, not searches. Keys lie list by list. `safetensors` itself can only write what is in
memory whole; its format is a length, a JSON header and the plain arrays, so this writes those.
"""

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int, Int8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knnlm.datastore.shards import ASIDE, publish, writing
from knnlm.errors import DatastoreCorruptError

FORMAT = "1"
_HEADER_BYTES = 1 << 20  # room for the shard table of a datastore with thousands of shards
_SAFETENSORS_NAMES = {
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}


@dataclass(frozen=True, slots=True)
class IVFReport:
    """What an index is and what it was measured to give when it was built.

    kind: the dtype of the stored keys, or "compressed": codes only. recall: of the k true nearest
    among `recall_queries` queries, the part found. generation: of the datastore, when built.
    """

    kind: str
    nlist: int
    nprobe: int
    code_dim: int
    rows: int
    generation: int
    k: int
    recall: float
    target_recall: float
    recall_queries: int
    milliseconds_per_query: float
    bytes_per_entry: float


@dataclass(frozen=True, slots=True)
class Part:
    """A run of datastore rows, list by list; `starts[l]` to `starts[l + 1]` are list l.

    keys: in the same order; None where they are read from the datastore.
    """

    starts: Int[Tensor, " lists_plus_1"]
    rows: Int[Tensor, " n"]
    codes: Int8[Tensor, "n code_dim"]
    steps: Float[Tensor, " n"]
    half_norms: Float[Tensor, " n"]
    keys: Float[Tensor, "n dim"] | None


Shape = tuple[torch.dtype, tuple[int, ...]]


class PartWriter:
    """Writes the arrays of one file a run of rows at a time; published whole, or not at all."""

    def __init__(self, path: Path, arrays: dict[str, Shape]) -> None:
        self._path = path
        self._aside = path.with_name(path.name + ASIDE)
        self._entries: dict[str, Any] = {}
        self._row_bytes: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in arrays.items():
            row_bytes = dtype.itemsize
            for size in shape[1:]:
                row_bytes *= size
            begin, end = end, end + row_bytes * shape[0]
            self._row_bytes[name] = row_bytes
            self._entries[name] = {
                "dtype": _SAFETENSORS_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        self.size_bytes = end

    def __enter__(self) -> "PartWriter":
        with writing(self._path.parent):
            self._path.parent.mkdir(exist_ok=True)
            self._file: BinaryIO = self._aside.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is not None:
            self._aside.unlink(missing_ok=True)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Write rows `first` … of an array. Raises DatastoreWriteError."""
        begin = self._entries[name]["data_offsets"][0]
        with writing(self._path.parent):
            self._file.seek(8 + _HEADER_BYTES + begin + first * self._row_bytes[name])
            # bytes, because numpy knows not every dtype
            self._file.write(memoryview(values.contiguous().view(torch.uint8).numpy()).cast("B"))

    def publish(self, metadata: dict[str, str]) -> None:
        """Write the header and give the file its name, durably."""
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        if len(header) > _HEADER_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        with writing(self._path.parent):
            self._file.seek(0)
            self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
            self._file.truncate(8 + _HEADER_BYTES + self.size_bytes)
            self._file.close()
            publish(self._aside, self._path)


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Map a file; return its metadata and arrays. Raises DatastoreCorruptError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(value) for name, value in file.metadata().items()}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DatastoreCorruptError(
            f"{path} cannot be read ({error}); run: knnlm index {path.parent.parent}"
        ) from error
    return metadata, arrays


def part_of(arrays: dict[str, Tensor]) -> Part:
    """Pick the arrays of a part out of a file's."""
    names = ("starts", "rows", "codes", "steps", "half_norms")
    return Part(*(arrays[name] for name in names), keys=arrays.get("keys"))


def as_json(report: IVFReport) -> dict[str, str]:
    """Return a report as a file's metadata."""
    return {"report": json.dumps(asdict(report))}
