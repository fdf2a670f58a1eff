"""Exact search: every live key, one GEMM for each block of keys; the reference for other kinds."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import IndexFile, StoredIndex
from knnlm.index.backend import Built, IndexOptions
from knnlm.index.protocol import Neighbors, check_search

RESIDENT_BYTES = 2 << 30
_SCORES = 1 << 25  # distances held at once
_RESIDENT_QUERIES = 256
_STREAMED_QUERIES = 4096  # many, so that the disk is read rarely


class _Block(NamedTuple):
    start: int
    keys: Float[Tensor, "rows dim"]  # float32, centered
    squared_norms: Float[Tensor, " rows"]  # +inf where forgotten


class ExactIndex:
    """All live keys of a datastore, compared with every query in float32.

    Keys stay in memory as float32 if that takes at most `resident_bytes`; a larger datastore is
    read from its mapped shards once for every 4,096 queries. Keys and queries are centered on a
    common point first, which leaves distances as they are and keeps the digits that
    |q|² + |k|² − 2 q·k would cancel. Follows every change of the datastore that `store` has seen.

    device: where the arithmetic is done, "cpu" or a GPU. first_row: leave out the rows before it.
    """

    def __init__(
        self,
        store: Datastore,
        device: str = "cpu",
        resident_bytes: int = RESIDENT_BYTES,
        first_row: int = 0,
    ) -> None:
        self.store = store
        self.device = torch.device(device)
        self.resident_bytes = resident_bytes
        self.first_row = first_row
        self._generation = -1
        self._resident: _Block | None = None

    def _follow(self) -> None:
        if self._generation == self.store.generation:
            return
        store = self.store
        self._alive = store.alive.to(self.device)
        self._center = next(
            (keys.float().mean(dim=0) for _, keys in store.key_blocks(1 << 15, self.first_row)),
            torch.zeros(store.settings.dimension),
        ).to(self.device)
        self._resident = None
        rows, dimension = store.rows - self.first_row, store.settings.dimension
        if 4 * rows * dimension <= self.resident_bytes:
            keys = torch.empty(rows, dimension, device=self.device)
            for start, block in store.key_blocks(1 << 16, self.first_row):
                first = start - self.first_row
                keys[first : first + len(block)] = block.to(self.device)
            self._resident = self._block(self.first_row, keys.sub_(self._center))
        self._generation = store.generation

    def _block(self, start: int, keys: Float[Tensor, "rows dim"]) -> _Block:
        squared_norms = keys.square().sum(dim=1)
        squared_norms[~self._alive[start : start + len(keys)]] = torch.inf
        return _Block(start, keys, squared_norms)

    def _blocks(self, rows: int) -> Iterator[_Block]:
        if self._resident is not None:
            first, keys, squared_norms = self._resident
            for start in range(0, len(keys), rows):
                stop = start + rows
                yield _Block(first + start, keys[start:stop], squared_norms[start:stop])
        else:
            for start, keys in self.store.key_blocks(rows, self.first_row):
                yield self._block(start, keys.to(self.device, torch.float32) - self._center)

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest live entries; see `Index.search`."""
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        size = _STREAMED_QUERIES if self._resident is None else _RESIDENT_QUERIES
        parts = [
            self._search(chunk.to(self.device, torch.float32) - self._center, k)
            for chunk in torch.split(queries, size)
        ]
        return Neighbors(
            torch.cat([part.squared_distances for part in parts]).to(queries.device),
            torch.cat([part.rows for part in parts]).to(queries.device),
        )

    def _search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        finite = queries.isfinite().all(dim=1, keepdim=True)
        queries = queries.where(finite, torch.zeros_like(queries))
        # less |q|², which changes no order
        nearest = queries.new_full((len(queries), k), torch.inf)
        rows = torch.full((len(queries), k), -1, device=self.device)
        for block in self._blocks(max(1, _SCORES // max(1, len(queries)))):
            scores = torch.addmm(block.squared_norms, queries, block.keys.T, alpha=-2)
            best, columns = scores.topk(min(k, scores.shape[1]), dim=1, largest=False, sorted=False)
            nearest, kept = torch.cat([nearest, best], dim=1).topk(k, dim=1, largest=False)
            rows = torch.cat([rows, columns + block.start], dim=1).gather(1, kept)
        present = nearest.isfinite() & finite
        squared = (nearest + queries.square().sum(dim=1, keepdim=True)).clamp_min(0.0)
        return Neighbors(squared.masked_fill(~present, torch.inf), rows.masked_fill(~present, -1))


class ExactBackend:
    """Exact search as a backend: it has no file, so there is nothing to build or to keep."""

    takes_factory = False

    def build(self, store: Datastore, options: IndexOptions) -> Built:
        """Return the index; exact search needs no file."""
        return Built(ExactIndex(store, options.device))

    def open(self, store: Datastore, device: str) -> ExactIndex:
        """Return the index."""
        return ExactIndex(store, device)

    def keep(
        self, store: Datastore, stored: StoredIndex, options: IndexOptions
    ) -> tuple[IndexFile, ...]:
        """Return no files: the index follows every change of the datastore."""
        return ()
