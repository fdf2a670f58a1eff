"""Entries: keys and values that can be read anywhere, whoever keeps them.

Knows tensors and our own datastores; no other tool's files, no models.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore

_BLOCK_BYTES = 1 << 26


@runtime_checkable
class Entries(Protocol):
    """Keys and values in the order of the text: key i precedes value i.

    rows: how many. dimension: of a key. key_dtype: float16 or float32, as in the files.
    """

    @property
    def rows(self) -> int:
        """How many entries there are."""
        ...

    @property
    def dimension(self) -> int:
        """The dimension of a key."""
        ...

    @property
    def key_dtype(self) -> torch.dtype:
        """The dtype of the keys."""
        ...

    def keys(self, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        """Return the keys of the rows start to stop."""
        ...

    def values(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Return the token ids of the rows start to stop, int64, as they are in the files."""
        ...


class MappedEntries:
    """Entries in two arrays that are mapped into memory: keys [rows, dim], values [rows]."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self._keys, self._values = keys, values.reshape(-1)
        self.rows, self.dimension = keys.shape
        self.key_dtype: torch.dtype = torch.float16 if keys.itemsize == 2 else torch.float32
        """The dtype of the keys."""

    def keys(self, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        """Return the keys of the rows start to stop."""
        return torch.from_numpy(np.array(self._keys[start:stop]))

    def values(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Return the token ids of the rows start to stop, int64."""
        return torch.from_numpy(self._values[start:stop].astype(np.int64))


class StoredEntries:
    """The entries of a datastore, forgotten ones too."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self.rows, self.dimension = store.rows, store.settings.dimension
        self.key_dtype: torch.dtype = store.key_dtype
        """The dtype of the keys."""

    def keys(self, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        """Return the keys of the rows start to stop."""
        return self._store.keys_at(torch.arange(start, stop))

    def values(self, start: int, stop: int) -> Int[Tensor, " rows"]:
        """Return the token ids of the rows start to stop, int64."""
        return self._store.values[start:stop].long()


def block_rows(dimension: int, key_dtype: torch.dtype) -> int:
    """Return how many keys are held in memory at once: 64 MiB of them."""
    return max(1, _BLOCK_BYTES // (dimension * key_dtype.itemsize))


def ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive blocks."""
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
