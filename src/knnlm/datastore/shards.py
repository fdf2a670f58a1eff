"""Shard files: keys and values in safetensors. The only owner of fsync and rename.

Knows nothing of documents or models. A shard is written aside, synced, renamed and its folder
synced, so that a file with its final name is always whole.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from knnlm.errors import (
    DatastoreChangedError,
    DatastoreCorruptError,
    DatastoreWriteError,
    KNNLMError,
)

ASIDE = ".part"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What the catalog remembers of a shard's file."""

    name: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard's memory-mapped contents."""

    keys: Float[Tensor, "rows dim"]
    values: Int[Tensor, " rows"]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one DatastoreWriteError line."""
    try:
        yield
    except KNNLMError:
        raise  # some are OSErrors too, and say already what is wrong
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            rule = "the disk is full; free some space and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            rule = "the folder is not writable; change its permissions or choose another"
        else:
            rule = f"{error.strerror or error}"
        raise DatastoreWriteError(f"cannot write {path}: {rule}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Give a file written aside its final name, durably."""
    _sync(aside)
    aside.rename(path)
    _sync(path.parent)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(
    folder: Path, name: str, keys: Float[Tensor, "rows dim"], values: Int[Tensor, " rows"]
) -> ShardFile:
    """Write one shard durably and return what the catalog needs of it.

    Raises DatastoreWriteError, leaving no partial file behind, when the disk refuses.
    """
    path = folder / name
    aside = folder / (name + ASIDE)
    data = save({"keys": keys.contiguous(), "values": values.contiguous()})
    with writing(folder):
        try:
            aside.write_bytes(data)
            publish(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    return ShardFile(name, len(values), len(data), hashlib.sha256(data).hexdigest())


def open_shard(folder: Path, name: str) -> Shard:
    """Map a shard's file; nothing is read until it is used.

    Raises DatastoreChangedError if the file is gone, DatastoreCorruptError if it is malformed.
    """
    path = folder / name
    try:
        with safe_open(path, "pt") as file:
            return Shard(file.get_tensor("keys"), file.get_tensor("values"))
    except FileNotFoundError as error:
        raise DatastoreChangedError(
            f"{path} is gone: the datastore was compacted since it was opened; open it again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise DatastoreCorruptError(
            f"{path} cannot be read ({error}); run: knnlm verify"
        ) from error


def shard_problem(folder: Path, expected: ShardFile) -> str | None:
    """Reread a whole shard against its checksum; return what is wrong with it, if anything."""
    path = folder / expected.name
    if not path.exists():
        return f"{path}: missing"
    size_bytes = path.stat().st_size
    if size_bytes != expected.size_bytes:
        return f"{path}: {size_bytes} bytes, written with {expected.size_bytes}"
    if _file_sha256(path) != expected.sha256:
        return f"{path}: the contents differ from the checksum taken when it was written"
    return None


def remove_files_except(folder: Path, names: set[str]) -> None:
    """Delete what a killed writer left: shard files that the catalog does not know."""
    with writing(folder):
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
