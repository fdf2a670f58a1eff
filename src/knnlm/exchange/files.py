"""The files in which other tools keep a datastore: found, checked for their size, and opened.

What a file holds is read from the file: its size has to fit the shape, and the shape the name.
Raises DatastoreNotFoundError for files that are not there, DatastoreCorruptError for those that
cannot be what they should be, InvalidArgumentError where something has to be said.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.choices import ArrayFormat
from knnlm.errors import DatastoreCorruptError, DatastoreNotFoundError, InvalidArgumentError
from knnlm.exchange.arrow import open_arrow
from knnlm.exchange.entries import Entries, MappedEntries
from knnlm.rules import check_whole

_NAMED = re.compile(r"dstore_(?P<model>.+)_(?P<rows>\d+)_(?P<dimension>\d+)_keys\.npy")
_KEYS, _VALUES = ("<f2", "<f4"), ("<i2", "<i4", "<i8")
_NPY_MAGIC = b"\x93NUMPY"
_LOOKED_AT = 1 << 16
_HIGHEST_PART = 3  # of ids below 262,144, above their lower 16 bits


@dataclass(frozen=True, slots=True)
class PeerFiles:
    """The files of another tool's datastore: the one of keys and the one of values, or Arrow's."""

    format: ArrayFormat
    paths: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.paths[0].parent

    def states(self) -> list[dict[str, Any]]:
        """Return path, size_bytes and time_ns (last change) of each file as it is now."""
        return [
            {"path": str(path.resolve()), "size_bytes": state.st_size, "time_ns": state.st_mtime_ns}
            for path, state in ((path, path.stat()) for path in self.paths)
        ]

    def open(self, dimension: int | None) -> Entries:
        """Map the files; dimension: of a key, where neither name nor file says it."""
        if self.format is ArrayFormat.arrow:
            entries: Entries = open_arrow(self.paths)
        elif self.format is ArrayFormat.npy:
            entries = _open_npy(*self.paths)
        else:
            entries = self._open_raw(dimension)
        if dimension is not None and entries.dimension != dimension:
            raise InvalidArgumentError(
                f"dimension must be that of the keys in {self.paths[0]}, {entries.dimension}, got "
                f"{dimension}: leave it out, or give the model and the key that they are of"
            )
        return entries

    def _open_raw(self, dimension: int | None) -> Entries:
        keys, values = self.paths
        for path in self.paths:
            _refuse_header(path)
        if self.format is ArrayFormat.knn_box:
            return _open_knn_box(keys, values)
        if (named := _NAMED.fullmatch(keys.name)) and self.format is ArrayFormat.knn_transformers:
            return _open_sized(keys, values, int(named["rows"]), int(named["dimension"]))
        if dimension is None:
            raise InvalidArgumentError(
                f"dimension must be given for {keys}, which has neither a header nor the name "
                "dstore_MODEL_ROWS_DIMENSION_keys.npy: for instance 1024"
            )
        return _open_guessed(keys, values, check_whole("dimension", dimension))


def find_files(files: Sequence[str | Path], source: ArrayFormat) -> PeerFiles:
    """Find the files of a datastore: given by name, or in the folder that is given."""
    given = [Path(file) for file in files]
    if not given:
        raise InvalidArgumentError("files must name the files to import, or their folder, got none")
    for path in given:
        if not path.exists():
            raise DatastoreNotFoundError(f"{path} must be a file or a folder to import: no such")
    ending = "*.arrow" if source is ArrayFormat.arrow else "*.npy"
    found = sorted(given[0].glob(ending)) if given[0].is_dir() else given
    if len(given) > 1 and any(path.is_dir() for path in given):
        raise InvalidArgumentError("files must be files, or one folder that holds them")
    if source is ArrayFormat.arrow:
        if not found:
            raise DatastoreNotFoundError(f"{given[0]} must hold .arrow files, but holds none")
        return PeerFiles(source, tuple(found))
    return PeerFiles(source, (_the_one(found, "keys", given[0]), _the_one(found, "vals", given[0])))


def _the_one(paths: Sequence[Path], kind: str, place: Path) -> Path:
    fitting = [path for path in paths if path.stem.endswith(kind)]
    if len(fitting) != 1:
        names = ", ".join(path.name for path in fitting[:3]) or "none"
        raise DatastoreNotFoundError(
            f"{place} must hold one file of {kind} (keys.npy and vals.npy, or …_keys.npy and "
            f"…_vals.npy), but it holds {names}: name both files"
        )
    return fitting[0]


def _refuse_header(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_NPY_MAGIC)) == _NPY_MAGIC:
            raise InvalidArgumentError(
                f"{path} must be a raw array, but it begins with NumPy's header: import it as npy"
            )


def _size(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        raise DatastoreCorruptError(f"{path} must hold entries, but it is empty")
    return size


def _mapped(path: Path, dtype: str, *shape: int) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _open_sized(keys: Path, values: Path, rows: int, dimension: int) -> Entries:
    """Map raw arrays of a known shape; their sizes say which dtypes they have."""
    return MappedEntries(
        _mapped(keys, _dtype_by_size(keys, rows * dimension, _KEYS), rows, dimension),
        _mapped(values, _dtype_by_size(values, rows, _VALUES), rows),
    )


def _dtype_by_size(path: Path, numbers: int, dtypes: Sequence[str]) -> str:
    size = _size(path)
    for dtype in dtypes:
        if size == numbers * np.dtype(dtype).itemsize:
            return dtype
    sizes = ", ".join(f"{numbers * np.dtype(d).itemsize} ({np.dtype(d).name})" for d in dtypes)
    raise DatastoreCorruptError(
        f"{path} must have the bytes of {numbers} numbers, {sizes}, but it has {size}: it was cut, "
        "or its name or its JSON is of another file"
    )


def _open_guessed(keys: Path, values: Path, dimension: int) -> Entries:
    """Map raw arrays of which only the dimension is known."""
    fitting = []
    for key_dtype in _KEYS:
        rows, rest = divmod(_size(keys), dimension * np.dtype(key_dtype).itemsize)
        fitting += [
            (key_dtype, value_dtype, rows)
            for value_dtype in _VALUES
            if rest == 0 and _size(values) == rows * np.dtype(value_dtype).itemsize
        ]
    if not fitting:
        raise DatastoreCorruptError(
            f"{keys} ({_size(keys)} bytes) and {values} ({_size(values)} bytes) must hold as many "
            f"keys of dimension {dimension} (float16 or float32) as values (int16, int32 or "
            "int64), but no number of rows fits: another dimension, or a file was cut"
        )
    # the same sizes fit several pairs: what lies between the ids tells them apart
    fitting.sort(key=lambda each: -np.dtype(each[1]).itemsize)
    whole = [each for each in fitting[:-1] if _are_whole_ids(values, each[1])]
    key_dtype, value_dtype, rows = [*whole, fitting[-1]][0]
    return MappedEntries(
        _mapped(keys, key_dtype, rows, dimension), _mapped(values, value_dtype, rows)
    )


def _are_whole_ids(path: Path, dtype: str) -> bool:
    """Return whether a file holds ids of a dtype, and not twice as many of half its size."""
    half = f"<u{np.dtype(dtype).itemsize // 2}"
    numbers = np.fromfile(path, dtype=half, count=_LOOKED_AT)
    return bool((numbers[1::2] <= _HIGHEST_PART).all())


def _open_knn_box(keys: Path, values: Path) -> Entries:
    path = keys.parent / "config.json"
    try:
        infos: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["data_infos"]
        rows, dimension = infos["keys"]["shape"]
        (value_rows, *_) = infos["vals"]["shape"]
    except FileNotFoundError as error:
        raise DatastoreNotFoundError(
            f"{path} must be beside the arrays, as knn-box writes it: no such file"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreCorruptError(
            f'{path} must give "data_infos" with the shapes of keys [rows, dimension] and vals '
            f"[rows], but it does not ({error})"
        ) from error
    if not all(type(n) is int and n > 0 for n in (rows, dimension)) or value_rows != rows:
        raise DatastoreCorruptError(
            f"{path} must give as many keys as values, but its shapes are {infos['keys']['shape']} "
            f"and {infos['vals']['shape']}"
        )
    return _open_sized(keys, values, rows, dimension)


def _open_npy(keys: Path, values: Path) -> Entries:
    arrays = []
    for path in (keys, values):
        try:
            arrays.append(np.load(path, mmap_mode="r"))
        except (ValueError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise DatastoreCorruptError(f"{path} must be a .npy array, but: {reason}") from error
    key_array, value_array = arrays
    is_column = value_array.ndim == 1 or (value_array.ndim == 2 and value_array.shape[1] == 1)
    if (
        key_array.ndim != 2
        or key_array.dtype.str not in _KEYS
        or not is_column
        or value_array.dtype.kind not in "iu"
        or len(value_array) != len(key_array)
        or not key_array.size
    ):
        raise DatastoreCorruptError(
            f"{keys} must be float16 or float32 [rows, dimension] and {values} whole numbers "
            f"[rows], but they are {key_array.dtype} {list(key_array.shape)} and "
            f"{value_array.dtype} {list(value_array.shape)}"
        )
    return MappedEntries(key_array, value_array)
