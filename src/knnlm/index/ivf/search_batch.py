"""Searching inverted lists for many queries at once, list by list, on the CPU.

The queries that probe a list are scored against all of it by one product of codes. The scores that
a query keeps are bounded beforehand: every list lies in random order, so that its head is a sample;
the right rank among the scores of the probed heads bounds the score of the k-th nearest. The few
candidates within the bound get exact distances while their list is in the cache. A query whose
bound was too tight, about one in a thousand, is searched again without a bound.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm.index.ivf import kernels
from knnlm.index.ivf.candidates import Candidates, IndexArrays, PartArrays, nearest_of
from knnlm.index.ivf.codes import SAMPLE_SHARE, bound_ranks
from knnlm.index.ivf.kernels import Kept, Pairs, Scales
from knnlm.index.ivf.lists import ProbingQueries
from knnlm.index.ivf.products import buffer, products
from knnlm.index.ivf.query_code import UNBOUNDED, Floats, Integers
from knnlm.index.ivf.read_ahead import read_ahead, read_ahead_ranges
from knnlm.index.protocol import Neighbors
from knnlm.threads import Workers, waiting_workers, workers

_LISTS_AT_ONCE = 16
_QUERIES_AT_ONCE = 128
_CHUNKS_AHEAD = 6
_GAP_BYTES = 1 << 17  # read along: takes less time than another request


class _Batch:
    """Queries grouped by the lists they probe. A *pair* is a query and a list it probes."""

    def __init__(self, queries: ProbingQueries, parts: list[PartArrays]) -> None:
        self.queries, self.codes, self.parts = queries.vectors.numpy(), queries.codes, parts
        self.steps, self.half_norms = self.codes.steps.numpy(), self.codes.half_norms.numpy()
        self.margins = self.codes.margins().numpy()
        self.probes = queries.probes.numpy()
        self.nprobe = self.probes.shape[1]
        nlist = len(parts[0].starts) - 1
        lists = self.probes.reshape(-1)
        narrow = lists.astype(np.uint16) if nlist < 1 << 16 else lists  # sorts by radix
        self.pairs = np.argsort(narrow, kind="stable")
        self.query_of_pair = self.pairs // self.nprobe
        self.list_ends = np.cumsum(np.bincount(lists, minlength=nlist))
        lengths = np.stack([np.diff(part.starts) for part in parts])
        pieces = [
            (part, number)
            for part in range(len(parts))
            for number in range(nlist)
            if lengths[part, number] and self.pairs_of(number).stop > self.pairs_of(number).start
        ]
        self.chunks = [
            pieces[start : start + _LISTS_AT_ONCE]
            for start in range(0, len(pieces), _LISTS_AT_ONCE)
        ]
        self.lengths = lengths
        self.available = lengths.sum(axis=0)[self.probes].sum(axis=1)

    def pairs_of(self, number: int) -> slice:
        return slice(int(self.list_ends[number - 1]) if number else 0, int(self.list_ends[number]))

    def pool(self) -> Workers:
        """Return the threads for lists: more where these are read from the disk."""
        return waiting_workers() if self.parts[0].short else workers()

    def ask_ahead(self, number: int, share: float) -> None:
        """Ask for the first codes of the lists of a chunk that will soon be searched."""
        if self.parts[0].short and number < len(self.chunks):
            for which, piece in self.chunks[number]:
                part = self.parts[which]
                start = part.starts[piece : piece + 1]
                length = np.ceil(self.lengths[which, piece] * share).astype(np.int64)
                read_ahead_ranges(part.codes.numpy(), start, start + length)

    def piece(self, which: int, number: int, length: int) -> tuple[NDArray[Any], Floats, Scales]:
        """Return code products, steps of the queries and scales of the first keys of a list."""
        part, start = self.parts[which], int(self.parts[which].starts[number])
        rows = slice(start, start + length)
        queries = self.query_of_pair[self.pairs_of(number)]
        codes = self.codes.codes.index_select(0, torch.from_numpy(queries))
        multiplied = products()(codes, part.codes_of(rows)).numpy()
        return multiplied, self.steps[queries], Scales(part.steps[rows], part.half_norms[rows])


def search_batch(
    queries: ProbingQueries, index: IndexArrays, k: int, oversampling: float
) -> Neighbors:
    """Return the k nearest in the probed lists. oversampling: see `bound_ranks`."""
    batch = _Batch(queries, index.parts)
    bounds = _bounds(batch, k, oversampling)
    candidates = _candidates(batch, bounds, index)
    nearest = nearest_of(candidates, index.rows, k)
    counts = candidates.counts.sum(axis=1)
    short = np.flatnonzero((counts < np.minimum(k, batch.available)) & (bounds < UNBOUNDED))
    for start in range(0, len(short), _QUERIES_AT_ONCE):
        again = torch.from_numpy(short[start : start + _QUERIES_AT_ONCE])
        batch = _Batch(queries.take(again), index.parts)
        unbounded = np.full(len(again), UNBOUNDED, np.float32)
        better = nearest_of(_candidates(batch, unbounded, index), index.rows, k)
        nearest.squared_distances[again] = better.squared_distances
        nearest.rows[again] = better.rows
    return nearest


def _bounds(batch: _Batch, k: int, oversampling: float) -> Floats:
    """Return scores that at least k of each query's candidates are almost surely within."""
    heads = np.ceil(batch.lengths * SAMPLE_SHARE).astype(np.int64)
    # scores lie query by query, and within a query by probe and part
    sampled = heads.T[batch.probes]  # (query, probe, part)
    ends = np.cumsum(sampled.reshape(-1))
    offsets = (ends - sampled.reshape(-1)).reshape(-1, len(batch.parts))
    scores = np.empty(ends[-1], np.float32)

    def score(chunk: int) -> None:
        batch.ask_ahead(chunk + _CHUNKS_AHEAD, SAMPLE_SHARE)
        for which, number in batch.chunks[chunk]:
            piece = batch.piece(which, number, int(heads[which, number]))
            places = offsets[batch.pairs[batch.pairs_of(number)], which]
            kernels.write_scores(*piece, places, scores)

    for chunk in range(_CHUNKS_AHEAD):
        batch.ask_ahead(chunk, SAMPLE_SHARE)
    batch.pool().map(score, range(len(batch.chunks)))
    sizes = torch.from_numpy(sampled.sum(axis=(1, 2)))
    ranks = bound_ranks(sizes, torch.from_numpy(batch.available), k, oversampling).tolist()
    starts = np.concatenate([offsets[:: batch.nprobe, 0], ends[-1:]])
    bounds = np.full(len(sizes), UNBOUNDED, np.float32)

    def select(chunk: range) -> None:
        for query in chunk:
            rank = ranks[query]
            if rank >= 0:
                own_scores = scores[starts[query] : starts[query + 1]]
                bounds[query] = np.partition(own_scores, rank)[rank]

    workers().map(select, workers().chunks(len(bounds), _QUERIES_AT_ONCE))
    if batch.parts[0].keys is not None:
        bounds += batch.margins  # else scores are all there is to choose by
    return bounds.clip(max=np.float32(UNBOUNDED))


class _Keeping:
    """Keeps the candidates of a batch that are within their query's bound, chunk by chunk."""

    def __init__(self, batch: _Batch, bounds: Floats, index: IndexArrays) -> None:
        self.batch, self.bounds, self.index = batch, bounds, index
        self.counts = np.zeros((len(batch.parts), len(batch.pairs)), np.int64)  # as the pieces lie

    def keep(self, chunk: int) -> list[Kept]:
        """Return the candidates of some lists, with their distances, exact where possible."""
        self.batch.ask_ahead(chunk + _CHUNKS_AHEAD, 1.0)
        pieces = self.batch.chunks[chunk]
        near: Iterable[Kept] = (self._near(*piece) for piece in pieces)
        if self.batch.parts[0].short:
            near = list(near)  # so that all their keys are asked for before one is used
        return [self._measured(*piece, kept) for piece, kept in zip(pieces, near, strict=True)]

    def _near(self, which: int, number: int) -> Kept:
        part, pairs = self.batch.parts[which], self.batch.pairs_of(number)
        start, length = int(part.starts[number]), int(self.batch.lengths[which, number])
        queries = self.batch.query_of_pair[pairs]
        size = length * len(queries)
        found = Kept(
            buffer("distances", size, torch.float32).numpy(),
            buffer("positions", size, torch.int64).numpy(),
            self.counts[which, pairs],
        )
        multiplied, steps, scales = self.batch.piece(which, number, length)
        total = kernels.keep(multiplied, steps, self.bounds[queries], scales, found)
        distances, positions = found.distances[:total].copy(), found.positions[:total].copy()
        if part.short and part.keys is not None:
            read_ahead(part.keys, start + np.unique(positions), _GAP_BYTES)
        return Kept(distances, positions, found.counts)

    def _measured(self, which: int, number: int, near: Kept) -> Kept:
        batch, part = self.batch, self.batch.parts[which]
        start, stop = part.starts[number : number + 2].tolist()
        queries, (distances, positions, counts) = self._queries(number), near
        if part.keys is not None:
            kernels.exact(batch.queries, queries, part.keys[start:stop], near)
        elif self.index.stored is None:
            half_norms = np.repeat(batch.half_norms[queries], counts)
            distances = np.maximum(2 * (distances + half_norms), 0)
        positions += part.first + start
        return Kept(distances, positions, counts)

    def _queries(self, number: int) -> Integers:
        queries: Integers = self.batch.query_of_pair[self.batch.pairs_of(number)]
        return queries

    def measure_stored(self, kept: list[Kept], distances: Floats, positions: Integers) -> None:
        """Write the distances of all candidates from the datastore's own keys."""
        if self.index.stored is not None:
            pieces = [piece for chunk in self.batch.chunks for piece in chunk]
            asking = [
                np.repeat(self._queries(number).astype(np.int32), one.counts)
                for (_, number), one in zip(pieces, kept, strict=True)
            ]
            queries = np.concatenate([np.empty(0, np.int32), *asking])
            pairs = Pairs(self.batch.queries, queries, self.index.rows[positions])
            self.index.stored.measure(pairs, distances, parallel=True)


def _candidates(batch: _Batch, bounds: Floats, index: IndexArrays) -> Candidates:
    """Return the distances of every candidate within its query's bound, exact where possible."""
    keeping = _Keeping(batch, bounds, index)
    for chunk in range(_CHUNKS_AHEAD):
        batch.ask_ahead(chunk, 1.0)
    chunks = batch.pool().map(keeping.keep, range(len(batch.chunks)))
    kept = [piece for chunk in chunks for piece in chunk]
    distances = np.concatenate([np.empty(0, np.float32), *(one.distances for one in kept)])
    positions = np.concatenate([np.empty(0, np.int64), *(one.positions for one in kept)])
    keeping.measure_stored(kept, distances, positions)
    counts = keeping.counts
    starts_of, counts_of = np.empty((2, counts.shape[1], len(counts)), np.int64)
    starts_of[batch.pairs] = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape).T
    counts_of[batch.pairs] = counts.T
    shape = len(batch.queries), -1
    return Candidates(distances, positions, starts_of.reshape(shape), counts_of.reshape(shape))
