"""The file of an inverted-file index: safetensors, written in pieces and memory-mapped.

Knows bytes, not searches. Keys lie list by list. `safetensors` itself can only write what is in
memory whole; its format is a length, a JSON header and the plain arrays, so this writes those.
"""

import errno
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int, Int8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knnlm.datastore.files import ASIDE, publish, writing
from knnlm.errors import DatastoreCorruptError
from knnlm.index.measure import Measured

_HEADER_BYTES = 1 << 16
_SAFETENSORS_NAMES = {
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}


@dataclass(frozen=True, slots=True)
class IVFReport:
    """What an index is and what it was measured to give when it was built.

    kind: the dtype of the stored keys, or "compressed": codes only. numbering: of the datastore's
    rows, when built.
    """

    kind: str
    nlist: int
    nprobe: int
    code_dim: int
    rows: int
    numbering: int
    bytes_per_entry: float
    measured: Measured


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
        self.aside = path.with_name(path.name + ASIDE)
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
            self._file: BinaryIO = self.aside.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            with writing(self._path.parent):
                self._file.close()
            return
        with suppress(OSError):  # what is still to be written does not matter any more
            self._file.close()
        self.aside.unlink(missing_ok=True)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Write rows `first` … of an array. Raises DatastoreWriteError."""
        begin = self._entries[name]["data_offsets"][0]
        with writing(self._path.parent):
            self._file.seek(8 + _HEADER_BYTES + begin + first * self._row_bytes[name])
            self._file.write(values.contiguous().numpy().tobytes())

    def describe(self, metadata: dict[str, Any]) -> None:
        """Write the header, so that the file can be read aside; again, to change the metadata."""
        encoded = {name: json.dumps(value) for name, value in metadata.items()}
        header = json.dumps({"__metadata__": encoded, **self._entries}).encode()
        with writing(self._path.parent):
            if len(header) > _HEADER_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            self._file.seek(0)
            self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
            self._file.truncate(8 + _HEADER_BYTES + self.size_bytes)
            self._file.flush()

    def publish(self) -> None:
        """Give the described file its name, durably."""
        with writing(self._path.parent):
            publish(self.aside, self._path)


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


def report_of(metadata: dict[str, Any]) -> IVFReport:
    """Return the report in a file's metadata."""
    report = metadata["report"]
    return IVFReport(**report | {"measured": Measured(**report["measured"])})


def part_of(arrays: dict[str, Tensor]) -> Part:
    """Pick the arrays of a part out of a file's."""
    return Part(
        arrays["starts"],
        arrays["rows"],
        arrays["codes"],
        arrays["steps"],
        arrays["half_norms"],
        arrays.get("keys"),
    )
