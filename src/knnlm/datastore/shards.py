"""Shard files: keys and values in safetensors.

Knows nothing of documents or models. A shard is written under a temporary name, synced, renamed
and its folder synced, so that a file with its final name is always whole.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from knnlm.datastore.catalog import ShardFile
from knnlm.datastore.files import ASIDE, publish, writing
from knnlm.errors import DatastoreChangedError, DatastoreCorruptError


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard's memory-mapped contents."""

    keys: Float[Tensor, "rows dim"]
    values: Int[Tensor, " rows"]


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(
    folder: Path, name: str, keys: Float[Tensor, "rows dim"], values: Int[Tensor, " rows"]
) -> ShardFile:
    """Write one shard durably and return its record for the catalog.

    Raises DatastoreWriteError, leaving no partial file behind, if it cannot be written.
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
    """Map a shard's file into memory; nothing is read until it is used.

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
