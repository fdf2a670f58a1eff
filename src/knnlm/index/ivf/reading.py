"""Reading the files of an inverted file, and refusing what a search could not rely on.

The search's compiled loops trust their arrays. So shapes, row numbers and the bounds of the lists
are checked when a file is opened, and the arrays that every search reads whole by a digest. Codes,
keys and norms are left to `knnlm verify`, which rereads every byte.
"""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import check_file
from knnlm.datastore.stored_index import IndexFile
from knnlm.errors import DatastoreCorruptError
from knnlm.index.ivf.codes import Coder
from knnlm.index.ivf.file import read_arrays
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.parts import Part

_CHECKED_AT_ONCE = 1 << 22
_KEY_DTYPES = (torch.float16, torch.float32)


def identity(lists: Lists, starts: Int[Tensor, " lists_plus_1"]) -> str:
    """Return a digest of the lists that a file is coded for, and of where they start in it."""
    digest = hashlib.sha256(f"{lists.key_dtype}".encode())
    for array in (*lists.arrays().values(), starts):
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def read_base(store: Datastore, file: IndexFile) -> tuple[Part, Lists]:
    """Map the file of an index as it was built. Raises DatastoreCorruptError."""
    path = store.path / file.name
    metadata, arrays = _read(store, file)
    missing = {"centroids", *(field.name for field in fields(Coder))} - arrays.keys()
    if missing:
        raise damaged_index(path, f"{min(missing)} is missing", store)
    dim = store.settings.dimension
    nlist, code_dim = (len(arrays[name]) for name in ("centroids", "projection"))
    shapes = {
        "centroids": (nlist, dim),
        "center": (dim,),
        "projection": (code_dim, dim),
        "rest": (code_dim,),
    }
    for name, shape in shapes.items():
        _check(store, path, name, arrays[name], shape, torch.float32)
    keys = arrays.get("keys")
    lists = Lists.from_arrays(arrays, None if keys is None else keys.dtype)
    return _part(store, file, lists, metadata, arrays), lists


def read_part(store: Datastore, file: IndexFile, lists: Lists) -> Part:
    """Map a file of appended rows. Raises DatastoreCorruptError."""
    return _part(store, file, lists, *_read(store, file))


def damaged_index(path: Path, problem: object, store: Datastore) -> DatastoreCorruptError:
    """Return the error for a file of an index that cannot be relied on, with the remedy."""
    reason = "".join(str(problem).splitlines()[:1])
    return DatastoreCorruptError(f"{path} is damaged ({reason}); run: knnlm index {store.path}")


def _read(store: Datastore, file: IndexFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = store.path / file.name
    check_file(path, file.size_bytes, f"run: knnlm index {store.path}")
    return read_arrays(path)


def _check(
    store: Datastore,
    path: Path,
    name: str,
    array: Tensor,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
) -> None:
    if tuple(array.shape) != shape or array.dtype not in dtypes:
        found = f"{name} is {array.dtype} {tuple(array.shape)}, expected {dtypes[0]} {shape}"
        raise damaged_index(path, found, store)


def _part(
    store: Datastore,
    file: IndexFile,
    lists: Lists,
    metadata: dict[str, Any],
    arrays: dict[str, Tensor],
) -> Part:
    path, count = store.path / file.name, file.stop - file.first
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "starts": ((len(lists.centroids) + 1,), torch.int64),
        "rows": ((count,), torch.int64),
        "codes": ((count, lists.coder.code_dim), torch.int8),
        "steps": ((count,), torch.float32),
        "half_norms": ((count,), torch.float32),
    }
    if lists.key_dtype is not None:
        expected["keys"] = ((count, store.settings.dimension), lists.key_dtype)
    for name, (shape, dtype) in expected.items():
        if name not in arrays:
            raise damaged_index(path, f"{name} is missing", store)
        _check(store, path, name, arrays[name], shape, dtype)
    part = Part(**{name: arrays[name] for name in expected})
    if problem := _problem(part, file, lists, metadata):
        raise damaged_index(path, problem, store)
    return part


def _problem(part: Part, file: IndexFile, lists: Lists, metadata: dict[str, Any]) -> str | None:
    if metadata.get("identity") != identity(lists, part.starts):
        return "its lists differ from their checksum"
    starts = part.starts
    if int(starts[0]) != 0 or int(starts[-1]) != len(part.rows) or bool((starts.diff() < 0).any()):
        return "the bounds of its lists cannot be right"
    seen = torch.zeros(len(part.rows), dtype=torch.bool)
    for rows in torch.split(part.rows, _CHECKED_AT_ONCE):
        places = rows - file.first
        if bool(((places < 0) | (places >= len(seen))).any()):
            return "a row is out of range"
        seen[places] = True
    if not bool(seen.all()):
        return "a row is there twice"
    for norms in (part.steps, part.half_norms):
        if not all(bool(some.isfinite().all()) for some in torch.split(norms, _CHECKED_AT_ONCE)):
            return "a norm is not finite"
    return None
