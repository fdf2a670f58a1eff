"""Shard files: keys and values in safetensors.

Knows nothing of documents or models. A shard is written under a temporary name, synced, renamed
and its folder synced, so that a file with its final name is always whole.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from knnlm.datastore.catalog import Settings, ShardFile
from knnlm.datastore.files import ASIDE, file_problem, publish, unreadable, writing
from knnlm.errors import DatastoreCorruptError


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard's memory-mapped contents."""

    keys: Float[Tensor, "rows dim"]
    values: Int[Tensor, " rows"]


def save_shard(
    path: Path, keys: Float[Tensor, "rows dim"], values: Int[Tensor, " rows"]
) -> ShardFile:
    """Write a shard under a temporary name, not yet durably, and return its record.

    Raises DatastoreWriteError, leaving no partial file behind, if it cannot be written.
    """
    data = save({"keys": keys.contiguous(), "values": values.contiguous()})
    with writing(path.parent):
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return ShardFile(path.name, len(values), len(data), hashlib.sha256(data).hexdigest())


def publish_shard(path: Path, file: ShardFile, name: str) -> ShardFile:
    """Give a saved shard its final name in the same folder, durably; return its record then.

    Raises DatastoreWriteError, and then nothing is left of it.
    """
    with writing(path.parent):
        try:
            publish(path, path.with_name(name))
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return replace(file, name=name)


def write_shard(
    folder: Path, name: str, keys: Float[Tensor, "rows dim"], values: Int[Tensor, " rows"]
) -> ShardFile:
    """Write one shard durably and return its record for the catalog.

    Raises DatastoreWriteError, leaving no partial file behind, if it cannot be written.
    """
    aside = folder / (name + ASIDE)
    return publish_shard(aside, save_shard(aside, keys, values), name)


def open_shard(folder: Path, expected: ShardFile, settings: Settings) -> Shard:
    """Map a shard's file into memory; nothing but its header is read until it is used.

    Raises DatastoreCorruptError if the file is gone, malformed, or not of the expected shape.
    """
    path = folder / expected.name
    try:
        path.open("rb").close()  # safetensors calls an unreadable file missing
        with safe_open(path, "pt") as file:
            shard = Shard(file.get_tensor("keys"), file.get_tensor("values"))
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise DatastoreCorruptError(
            f"{path} cannot be read ({error}); run: knnlm verify"
        ) from error
    shape = (expected.rows, settings.dimension)
    if tuple(shard.keys.shape) != shape or tuple(shard.values.shape) != shape[:1]:
        found = tuple(shard.keys.shape)
        raise DatastoreCorruptError(f"{path}: keys are {found}, expected {shape}")
    dtypes = (getattr(torch, settings.key_dtype), torch.int32)
    if (shard.keys.dtype, shard.values.dtype) != dtypes:
        raise DatastoreCorruptError(f"{path}: keys are {shard.keys.dtype}, expected {dtypes[0]}")
    return shard


def check_values(path: Path, values: Int[Tensor, " n"], vocab_size: int) -> None:
    """Raise DatastoreCorruptError for a token that the model does not have."""
    if bool(((values < 0) | (values >= vocab_size)).any()):
        raise DatastoreCorruptError(f"{path}: a value is outside the vocabulary")


def shard_problem(folder: Path, expected: ShardFile) -> str | None:
    """Reread a whole shard against its checksum; return what is wrong with it, if anything."""
    return file_problem(folder / expected.name, expected.size_bytes, expected.sha256)
