"""Datastores as Arrow files with the columns `keys` and `vals`.

Raises MissingDependencyError without pyarrow, DatastoreCorruptError for files that cannot be right.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.errors import DatastoreCorruptError, import_optional

_FILE_MARK = b"ARROW1"


class ArrowEntries:
    """Entries in batches of Arrow, which stay mapped files; see `Entries`."""

    def __init__(self, batches: Sequence[Any], dimension: int, key_dtype: torch.dtype) -> None:
        self._batches = batches
        self._starts = list(accumulate((batch.num_rows for batch in batches), initial=0))
        self.rows: int = self._starts[-1]
        """How many entries there are."""
        self.dimension, self.key_dtype = dimension, key_dtype

    def keys(self, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        """Return the keys of the rows start to stop."""
        parts = [
            column.flatten().to_numpy(zero_copy_only=False)
            for column in self._columns("keys", start, stop)
        ]
        keys = np.concatenate([np.empty(0, parts[0].dtype if parts else np.float16), *parts])
        if len(keys) != (stop - start) * self.dimension:
            raise DatastoreCorruptError(
                f"keys must have {self.dimension} numbers each, but those of the rows {start} to "
                f"{stop - 1} of the Arrow files have {len(keys)} together"
            )
        return torch.from_numpy(keys).view(-1, self.dimension)

    def values(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Return the token ids of the rows start to stop, int64."""
        parts = [
            column.to_numpy(zero_copy_only=False).astype(np.int64)
            for column in self._columns("vals", start, stop)
        ]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))

    def _columns(self, name: str, start: int, stop: int) -> list[Any]:
        columns = []
        for number in range(bisect_right(self._starts, start) - 1, len(self._batches)):
            first = self._starts[number]
            if first >= stop:
                break
            low, high = max(start - first, 0), stop - first
            columns.append(self._batches[number].column(name)[low:high])
        return columns


def open_arrow(paths: Sequence[Path]) -> ArrowEntries:
    """Map Arrow files, as streams or with a footer; their entries follow each other."""
    arrow = import_optional("pyarrow", "the format arrow", "data")
    ipc = import_optional("pyarrow.ipc", "the format arrow", "data")
    batches: list[Any] = []
    kinds = set()
    for path in paths:
        try:
            mapped = arrow.memory_map(str(path), "r")
            with path.open("rb") as file:
                has_footer = file.read(len(_FILE_MARK)) == _FILE_MARK
            if has_footer:
                reader = ipc.open_file(mapped)
                read = [reader.get_batch(n) for n in range(reader.num_record_batches)]
            else:
                reader = ipc.open_stream(mapped)
                read = list(reader)
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise DatastoreCorruptError(f"{path} must be an Arrow file, but: {reason}") from error
        kinds.add(_kind(arrow, path, reader.schema, read))
        batches += [batch for batch in read if batch.num_rows]
    if len(kinds) != 1 or not batches or min(kinds, key=str)[0] < 1:
        raise DatastoreCorruptError(
            f"{paths[0]} must hold entries, and further files the same kind of them, but the kinds "
            f"are {sorted(map(str, kinds))} and the batches with rows {len(batches)}"
        )
    ((dimension, key_dtype),) = kinds
    return ArrowEntries(batches, dimension, key_dtype)


def _kind(arrow: Any, path: Path, schema: Any, batches: Sequence[Any]) -> tuple[int, torch.dtype]:
    """Return the dimension and the dtype of a file's keys."""
    dtypes = {arrow.float16(): torch.float16, arrow.float32(): torch.float32}
    names = set(schema.names)
    keys = schema.field("keys").type if "keys" in names else arrow.null()
    values = schema.field("vals").type if "vals" in names else arrow.null()
    is_fixed = arrow.types.is_fixed_size_list(keys)
    is_list = is_fixed or arrow.types.is_list(keys)
    if not is_list or keys.value_type not in dtypes or not arrow.types.is_integer(values):
        raise DatastoreCorruptError(
            f"{path} must have a column keys, lists of float16 or float32 of one length, and a "
            f"column vals of whole numbers, but it has the columns "
            f"{', '.join(f'{field.name}: {field.type}' for field in schema) or 'none'}"
        )
    dimension = keys.list_size if is_fixed else 0
    for batch in batches:
        lengths = batch.column("keys").value_lengths()
        if batch.column("keys").null_count or batch.column("vals").null_count:
            raise DatastoreCorruptError(
                f"{path} must have keys and values in all rows, but lacks some"
            )
        if not is_fixed and len(lengths):
            found = set(np.unique(lengths.to_numpy(zero_copy_only=False)).tolist())
            if found - {dimension or min(found)}:
                raise DatastoreCorruptError(
                    f"{path} must have keys of one length, but it has the lengths {sorted(found)}"
                )
            dimension = found.pop()
    return dimension, dtypes[keys.value_type]
