"""Exact search: every live key, one GEMM for each block of keys; the reference for other kinds."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import IndexFile, StoredIndex
from knnlm.datastore.unfit_keys import MAX_NORM, measurable
from knnlm.index.backend import Built, IndexOptions
from knnlm.index.protocol import Neighbors, check_search

RESIDENT_BYTES = 2 << 30
TOLERANCE = 1e-4
"""How far off a squared distance may be, in units of itself."""
_SCORES = 1 << 25  # distances held at once
_RESIDENT_QUERIES = 256
_STREAMED_QUERIES = 4096  # many, so that the disk is read rarely
_STREAMED_NUMBERS = 1 << 25  # of keys that are read at once
_WIDENED_ROWS = 1 << 14  # keys converted at once
_PAIRED_NUMBERS = 1 << 23  # of keys that are gathered at once
_SPARE = 16  # candidates beyond k, among which a query's true neighbors may be


class _Block(NamedTuple):
    start: int
    keys: Float[Tensor, "rows dim"]  # centered
    squared_norms: Float[Tensor, " rows"]  # +inf where forgotten


_StoredBlock = tuple[int, Float[Tensor, "rows dim"]]  # the first row of a block, and its keys
_ScoredBlock = tuple[int, Float[Tensor, "query _"]]  # the first row of a block, and its scores


class _Candidates(NamedTuple):
    squared_distances: Float[Tensor, "query candidate"]  # ascending, +inf where absent
    rows: Int[Tensor, "query candidate"]


class _Found(NamedTuple):
    squared_distances: Float[Tensor, "query k"]  # ascending, +inf where absent
    rows: Int[Tensor, "query k"]
    resolved: Bool[Tensor, " query"]  # whether these are the nearest, see `ExactIndex`

    def replace(self, queries: Int[Tensor, " n"], found: "_Found") -> None:
        """Put the results of some queries in place of the present ones."""
        for mine, other in zip(self, found, strict=True):
            mine[queries] = other.to(mine.device, mine.dtype)


class ExactIndex:
    """All live keys of a datastore, compared with every query.

    A squared distance of at least 1e-30 is within 1e-4 of the true one (times itself), and no entry
    that was left out is nearer by more than that, whatever the keys. Keys and queries are centered
    on a common point first, which leaves distances as they are and keeps the digits that |q|² +
    |k|² − 2 q·k would cancel. What is lost is at most γ (|q| + |k|)², with centered norms, γ = 32 u
    √max(1, dim / 576), and u = 2⁻²⁴ in float32 (measured: a half of it). A neighbor at distance d
    has |k| ≤ |q| + d, so that d² is off by at most γ (2|q| + d)². Where that exceeds 1e-4 d², d² is
    computed again as Σ (q − k)². Where the k-th distance is among those, closer entries may have
    been left out: the query is searched for again with 16 candidates more, then in float64 (u =
    2⁻⁵³), until the farthest candidate is beyond the k-th neighbor by twice the loss, and where
    even that cannot tell, by the differences from all keys. That is rare, except in models whose
    hidden states have a few huge coordinates. Where torch was told to round the factors of float32
    products, to TF32 or bfloat16, float64 comes first.

    Keys stay in memory as float32 if that takes at most `resident_bytes`; a larger datastore is
    read from its mapped shards once for every 4,096 queries. Follows every change of the
    datastore that `store` has seen. A search raises DatastoreCorruptError for live keys that are
    not `measurable`.

    device: where the arithmetic is done, "cpu" or a GPU. first_row: leave out the rows before it.
    stop_row: leave out this one and those after it; None for no limit.
    """

    def __init__(
        self,
        store: Datastore,
        device: str = "cpu",
        resident_bytes: int = RESIDENT_BYTES,
        first_row: int = 0,
        stop_row: int | None = None,
    ) -> None:
        self.store = store
        self.device = torch.device(device)
        # MPS has no float64
        self._precise_device = torch.device("cpu" if self.device.type == "mps" else device)
        self.resident_bytes = resident_bytes
        self.first_row = first_row
        self._stop_row = stop_row
        self._generation = -1
        self._resident: _Block | None = None

    @property
    def _rows(self) -> range:
        stop = self.store.rows if self._stop_row is None else min(self._stop_row, self.store.rows)
        return range(self.first_row, max(self.first_row, stop))

    @property
    def entries(self) -> int:
        """How many live entries are searched."""
        return int(self.store.alive[self._rows.start : self._rows.stop].sum())

    def _key_blocks(self, max_rows: int) -> Iterator[_StoredBlock]:
        for start, keys in self.store.key_blocks(max_rows, self.first_row):
            if start >= self._rows.stop:
                break
            yield start, keys[: self._rows.stop - start]

    def _follow(self) -> None:
        if self._generation == self.store.generation:
            return
        store = self.store
        self._alive = store.alive.to(self.device)
        self._center = torch.zeros(store.settings.dimension, device=self.device)
        for _, keys in self._key_blocks(1 << 15):
            some = keys.float()
            self._center = some[measurable(some)].mean(dim=0).nan_to_num().to(self.device)
            break
        self._resident = None
        rows, dimension = len(self._rows), store.settings.dimension
        if 4 * rows * dimension <= self.resident_bytes:
            keys = torch.empty(rows, dimension, device=self.device)
            for start, block in self._key_blocks(1 << 16):
                first = start - self.first_row
                keys[first : first + len(block)] = block.to(self.device)
            self._resident = self._block(self.first_row, keys.sub_(self._center))
        self._generation = store.generation

    def _block(self, start: int, keys: Float[Tensor, "rows dim"]) -> _Block:
        squared_norms = keys.square().sum(dim=1)
        dead = ~self._alive[start : start + len(keys)].to(keys.device)
        fit = (squared_norms <= (2 * MAX_NORM) ** 2) | dead
        if not bool(fit.all()):
            raise self.store.unfit_key(start + int(fit.int().argmin()))
        squared_norms[dead] = torch.inf
        return _Block(start, keys, squared_norms)

    def _blocks(self, rows: int, dtype: torch.dtype) -> Iterator[_Block]:
        if self._resident is not None and dtype == torch.float32:
            first, keys, squared_norms = self._resident
            for start in range(0, len(keys), rows):
                stop = start + rows
                yield _Block(first + start, keys[start:stop], squared_norms[start:stop])
            return
        rows = min(rows, max(1, _STREAMED_NUMBERS // max(1, len(self._center))))
        if dtype == torch.float64:
            rows = min(rows, _WIDENED_ROWS)
        device = self._device_of(dtype)
        center = self._center.to(device, dtype)
        for start, keys in self._key_blocks(rows):
            yield self._block(start, keys.to(device, dtype) - center)

    def _device_of(self, dtype: torch.dtype) -> torch.device:
        return self.device if dtype == torch.float32 else self._precise_device

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest live entries; see `Index.search`."""
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        vectors = queries.to(self.device, torch.float32)
        usable = measurable(vectors)
        vectors = vectors.where(usable[:, None], self._center)
        size = _STREAMED_QUERIES if self._resident is None else _RESIDENT_QUERIES
        dtypes = [torch.float32, torch.float64][_rounds_products(self.device) :]
        parts = [self._by_product(some, k, dtypes[0], 0) for some in torch.split(vectors, size)]
        found = _Found(*(torch.cat(column).to(self.device) for column in zip(*parts, strict=True)))
        again: list[Callable[[Tensor, int], _Found]] = [
            *(partial(self._by_product, dtype=dtype, spare=_SPARE) for dtype in dtypes),
            self._by_difference,
        ]
        for search_again in again:
            doubtful = (~found.resolved).nonzero()[:, 0]
            if not len(doubtful):
                break
            for some in torch.split(doubtful, _STREAMED_QUERIES):
                found.replace(some, search_again(vectors[some], k))
        absent = ~(usable[:, None] & found.squared_distances.isfinite())
        squared_distances = found.squared_distances.float().masked_fill_(absent, torch.inf)
        rows = found.rows.masked_fill_(absent, -1)
        return Neighbors(squared_distances.to(queries.device), rows.to(queries.device))

    def _by_product(
        self, queries: Float[Tensor, "query dim"], k: int, dtype: torch.dtype, spare: int
    ) -> _Found:
        """Search by |q|² + |k|² − 2 q·k, computed in a dtype, with spare candidates."""
        device = self._device_of(dtype)
        queries = queries.to(device)
        centered = queries.to(dtype) - self._center.to(device, dtype)
        squared_norms = centered.square().sum(dim=1)
        rows_at_once = max(1, _SCORES // max(1, len(queries)))
        # less |q|², which changes no order
        scored: Iterable[_ScoredBlock] = (
            (block.start, torch.addmm(block.squared_norms, centered, block.keys.T, alpha=-2))
            for block in self._blocks(rows_at_once, dtype)
        )

        def choose(some: slice | Tensor, scored: Iterable[_ScoredBlock], wanted: int) -> _Found:
            nearest, rows = _least(scored, centered[some], wanted)
            squared = (nearest + squared_norms[some, None]).clamp_min(0.0)
            return self._checked(queries[some], squared_norms[some], _Candidates(squared, rows), k)

        if len(self._rows) > rows_at_once:
            return choose(slice(None), scored, k + spare)
        kept = list(scored)  # all scores fit, so that spare candidates cost no other product
        found = choose(slice(None), kept, k + spare)
        doubtful = (~found.resolved).nonzero()[:, 0]
        if spare == 0 and len(doubtful):
            scored = [(start, scores[doubtful]) for start, scores in kept]
            found.replace(doubtful, choose(doubtful, scored, k + _SPARE))
        return found

    def _checked(
        self,
        queries: Float[Tensor, "query dim"],
        squared_norms: Float[Tensor, " query"],
        found: _Candidates,
        k: int,
    ) -> _Found:
        """Choose the nearest of what the product found, and find out which queries are resolved.

        squared_norms: of the centered queries. found: the k nearest candidates, and spare ones.
        """
        squared, rows = found
        loss = _loss(queries.shape[1], squared.dtype)
        # below this, a squared distance may be off by more than the tolerance
        least = squared_norms * (2 / (math.sqrt(TOLERANCE / loss) - 1)) ** 2
        resolved = torch.ones_like(least, dtype=torch.bool)
        off = torch.searchsorted(squared, least[:, None])  # how many, the nearest
        most = int(off.max()) if len(off) else 0
        if most == 0:
            return _Found(squared[:, :k], rows[:, :k], resolved)
        kth = squared[:, k - 1]
        # what lies beyond is farther than the k-th, whatever the product has lost
        bound = kth + 2 * loss * (2 * squared_norms.sqrt() + kth.sqrt()).square()
        resolved = (off[:, 0] < k) | (squared[:, -1] > bound)
        # If a query has k copies of itself, nothing is nearer.
        copies = (~resolved).nonzero()[:, 0]
        if len(copies):
            copies = copies[self._differences(queries[copies], rows[copies, k - 1]) == 0]
            resolved[copies] = True
        again = (torch.arange(most, device=off.device) < off) & resolved[:, None]
        places, columns = (again & (squared[:, :most] <= bound[:, None])).nonzero(as_tuple=True)
        exact = self._differences(queries[places], rows[places, columns])
        squared[places, columns] = exact.to(squared.dtype)
        disordered = (squared[:, : most + 1].diff(dim=1) < 0).any(dim=1).nonzero()[:, 0]
        if len(disordered):
            squared[disordered], order = squared[disordered].sort(dim=1)
            rows[disordered] = rows[disordered].gather(1, order)
        resolved[copies] = squared[copies, k - 1] == 0
        return _Found(squared[:, :k], rows[:, :k], resolved)

    def _differences(
        self, queries: Float[Tensor, "pair dim"], rows: Int[Tensor, " pair"]
    ) -> Float[Tensor, " pair"]:
        """Return the squared distance of each query to the key of one row, Σ (q − k)²."""
        distances = queries.new_empty(len(rows))
        size = max(1, _PAIRED_NUMBERS // queries.shape[1])
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            keys = self.store.keys_at(rows[some].cpu()).to(queries)
            distances[some] = (queries[some] - keys).square().sum(dim=1)
        return distances

    def _by_difference(self, queries: Float[Tensor, "query dim"], k: int) -> _Found:
        """Search by Σ (q − k)² for all keys, which loses no digits but takes long."""
        device = self._precise_device
        queries, dead = queries.to(device), ~self._alive.to(device)

        def distances(keys: Tensor) -> Tensor:
            keys = keys.to(device, torch.float32)
            mode = "donot_use_mm_for_euclid_dist"
            return torch.cdist(queries, keys, compute_mode=mode).square_()

        scored = (
            (start, distances(keys).masked_fill_(dead[start : start + len(keys)], torch.inf))
            for start, keys in self._key_blocks(_WIDENED_ROWS)
        )
        nearest, rows = _least(scored, queries, k)
        return _Found(nearest, rows, torch.ones(len(queries), dtype=torch.bool, device=device))


def _loss(dimension: int, dtype: torch.dtype) -> float:
    """Return γ: the product loses at most γ (|q| + |k|)² of a squared distance."""
    return 32 * math.sqrt(max(1.0, dimension / 576)) * torch.finfo(dtype).eps / 2


def _rounds_products(device: torch.device) -> bool:
    """Return whether torch was told to compute float32 products in TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    told = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if told is None:  # torch before 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return told not in ("none", "ieee")


def _least(
    scored: Iterable[_ScoredBlock],
    queries: Float[Tensor, "query dim"],
    k: int,
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """Return the k least scores of each query, ascending, and their rows."""
    nearest = queries.new_full((len(queries), k), torch.inf)
    rows = torch.full((len(queries), k), -1, device=queries.device)
    for start, scores in scored:
        best, columns = scores.topk(min(k, scores.shape[1]), dim=1, largest=False, sorted=False)
        nearest, kept = torch.cat([nearest, best], dim=1).topk(k, dim=1, largest=False)
        rows = torch.cat([rows, columns + start], dim=1).gather(1, kept)
    return nearest, rows


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
