"""The files of an inverted-file index: safetensors, written in pieces and memory-mapped.

Knows bytes, not searches. `safetensors` itself can only write arrays that are whole in memory; its
format is a length, a JSON header and the plain arrays, so this writes those.
"""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knnlm.datastore.files import ASIDE, publish, writing
from knnlm.errors import DatastoreCorruptError

_HEADER_BYTES = 1 << 16
_SAFETENSORS_NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}


class ArrayWriter:
    """Writes the arrays of one file a run of rows at a time; published whole, or not at all.

    arrays: their names, dtypes and shapes; the contents are ignored. kept: the file to write, which
    stays when writing is interrupted, and is gone on with where it is there; None: one beside
    `path`, which does not stay.
    """

    def __init__(self, path: Path, arrays: dict[str, Tensor], kept: Path | None = None) -> None:
        self._path, self._stays = path, kept is not None
        self.aside = kept or path.with_name(path.name + ASIDE)
        self._entries: dict[str, Any] = {}
        self._row_bytes: dict[str, int] = {}
        end = 0
        for name, array in arrays.items():
            begin, end = end, end + array.nbytes
            self._row_bytes[name] = array.element_size() * math.prod(array.shape[1:])
            self._entries[name] = {
                "dtype": _SAFETENSORS_NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [begin, end],
            }
        self.size_bytes = end

    def __enter__(self) -> "ArrayWriter":
        with writing(self._path.parent):
            self._path.parent.mkdir(exist_ok=True)
            goes_on = self._stays and self.aside.exists()
            self._file: BinaryIO = self.aside.open("r+b" if goes_on else "wb")
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
        with suppress(OSError):  # the file is discarded, or what is not in it is written again
            self._file.close()
        if not self._stays:
            self.aside.unlink(missing_ok=True)

    def flush(self) -> None:
        """Hand what was written to the system. Raises DatastoreWriteError."""
        with writing(self._path.parent):
            self._file.flush()

    def write(self, name: str, values: Tensor, first: int = 0) -> None:
        """Write the rows of an array from `first` on. Raises DatastoreWriteError."""
        begin = self._entries[name]["data_offsets"][0]
        with writing(self._path.parent):
            self._file.seek(8 + _HEADER_BYTES + begin + first * self._row_bytes[name])
            self._file.write(values.contiguous().numpy().tobytes())

    def write_header(self, metadata: dict[str, Any]) -> None:
        """Make the file readable under its temporary name; call again to change the metadata."""
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
        """Give the file its final name, durably."""
        with writing(self._path.parent):
            publish(self.aside, self._path)


def _first_line(error: Exception) -> str:
    return "".join(str(error).splitlines()[:1])[:200]


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Map a file; return its metadata and arrays. Raises DatastoreCorruptError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DatastoreCorruptError(
            f"{path} cannot be read ({_first_line(error)}); run: knnlm index {path.parent.parent}"
        ) from error
    return metadata, arrays
