"""Searching inverted lists for many queries at once, list by list, on the CPU.

The queries that probe a list are scored against all of it by one product of codes. The scores that
a query keeps are bounded beforehand: every list lies in random order, so that its head is a sample;
the right rank among the scores of the probed heads bounds the score of the k-th nearest. The few
candidates within the bound get exact distances while their list is in the cache. A query whose
bound was too tight, about one in a thousand, is searched again without a bound.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index.ivf import kernels
from knnlm.index.ivf.candidates import (
    UNBOUNDED,
    Candidates,
    Floats,
    Integers,
    PartArrays,
    nearest_of,
)
from knnlm.index.ivf.codes import SAMPLE_SHARE, bound_ranks
from knnlm.index.ivf.kernels import Kept, Scales
from knnlm.index.ivf.lists import ProbingQueries
from knnlm.index.ivf.products import buffer, products
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_LISTS_AT_ONCE = 16
_QUERIES_AT_ONCE = 128


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

    def piece(self, which: int, number: int, length: int) -> tuple[NDArray[Any], Floats, Scales]:
        """Return code products, steps of the queries and scales of the first keys of a list."""
        part, start = self.parts[which], int(self.parts[which].starts[number])
        rows = slice(start, start + length)
        queries = self.query_of_pair[self.pairs_of(number)]
        codes = self.codes.codes.index_select(0, torch.from_numpy(queries))
        multiplied = products()(codes, part.codes[rows]).numpy()
        return multiplied, self.steps[queries], Scales(part.steps[rows], part.half_norms[rows])


def search_batch(
    queries: ProbingQueries,
    parts: list[PartArrays],
    rows: Int[Tensor, " n"],
    k: int,
    oversampling: float,
) -> Neighbors:
    """Return the k nearest in the probed lists.

    rows: the datastore's, by position. oversampling: see `bound_ranks`.
    """
    batch = _Batch(queries, parts)
    bounds = _bounds(batch, k, oversampling)
    candidates = _candidates(batch, bounds)
    nearest = nearest_of(candidates, rows, k)
    counts = candidates.counts.sum(axis=1)
    short = np.flatnonzero((counts < np.minimum(k, batch.available)) & (bounds < UNBOUNDED))
    for start in range(0, len(short), _QUERIES_AT_ONCE):
        again = torch.from_numpy(short[start : start + _QUERIES_AT_ONCE])
        batch = _Batch(queries.take(again), parts)
        unbounded = np.full(len(again), UNBOUNDED, np.float32)
        better = nearest_of(_candidates(batch, unbounded), rows, k)
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

    def score(pieces: list[tuple[int, int]]) -> None:
        for which, number in pieces:
            piece = batch.piece(which, number, int(heads[which, number]))
            places = offsets[batch.pairs[batch.pairs_of(number)], which]
            kernels.write_scores(*piece, places, scores)

    workers().map(score, batch.chunks)
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
    bounds += batch.margins
    return bounds.clip(max=np.float32(UNBOUNDED))


def _candidates(batch: _Batch, bounds: Floats) -> Candidates:
    """Return exact distances of every candidate within its query's bound."""
    runs = len(batch.parts)
    counts = np.zeros((runs, len(batch.pairs)), np.int64)  # by list, as the pieces lie

    def keep(pieces: list[tuple[int, int]]) -> list[tuple[Floats, Integers]]:
        kept = []
        for which, number in pieces:
            part, pairs = batch.parts[which], batch.pairs_of(number)
            start, length = int(part.starts[number]), int(batch.lengths[which, number])
            queries = batch.query_of_pair[pairs]
            size = length * len(queries)
            found = Kept(
                buffer("distances", size, torch.float32).numpy(),
                buffer("positions", size, torch.int64).numpy(),
                counts[which, pairs],
            )
            multiplied, steps, scales = batch.piece(which, number, length)
            total = kernels.keep(multiplied, steps, bounds[queries], scales, found)
            distances, positions = found.distances[:total].copy(), found.positions[:total].copy()
            if part.keys is not None:
                near = Kept(distances, positions, found.counts)
                kernels.exact(batch.queries, queries, part.keys[start : start + length], near)
            else:
                half_norms = np.repeat(batch.half_norms[queries], found.counts)
                distances = np.maximum(2 * (distances + half_norms), 0)
            positions += part.first + start
            kept.append((distances, positions))
        return kept

    kept = [piece for chunk in workers().map(keep, batch.chunks) for piece in chunk]
    starts_of, counts_of = np.empty((2, counts.shape[1], runs), np.int64)
    starts_of[batch.pairs] = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape).T
    counts_of[batch.pairs] = counts.T
    return Candidates(
        np.concatenate([distances for distances, _ in kept] or [np.empty(0, np.float32)]),
        np.concatenate([positions for _, positions in kept] or [np.empty(0, np.int64)]),
        starts_of.reshape(len(batch.queries), -1),
        counts_of.reshape(len(batch.queries), -1),
    )
