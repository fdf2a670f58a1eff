"""Searching inverted lists for many queries at once, list by list, on the CPU.

The queries that probe a list are scored against all of it by one product of codes. The scores that
a query keeps are bounded beforehand: every list lies in random order, so that its head is a sample;
the right rank among the scores of the probed heads bounds the score of the k-th nearest. The few
candidates within the bound get exact distances while their list is in the cache. A query whose
bound was too tight, about one in a thousand, is searched again without a bound.
"""

import threading
from collections.abc import Iterator
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
from knnlm.index.ivf.codes import Effort
from knnlm.index.ivf.kernels import Kept
from knnlm.index.ivf.lists import ProbingQueries
from knnlm.index.ivf.products import products
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_LISTS_AT_ONCE = 16
_QUERIES_AT_ONCE = 128


class _Scratch(threading.local):
    """One thread's arrays for the candidates of a list."""

    size = 0

    def reserve(self, size: int) -> None:
        if size > self.size:
            self.size = size + size // 2
            self.distances = np.empty(self.size, np.float32)
            self.positions = np.empty(self.size, np.int64)


_scratch = _Scratch()


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
        self.pieces = [
            (part, number)
            for part in range(len(parts))
            for number in range(nlist)
            if lengths[part, number] and self.pairs_of(number).stop > self.pairs_of(number).start
        ]
        self.lengths = lengths

    def pairs_of(self, number: int) -> slice:
        return slice(int(self.list_ends[number - 1]) if number else 0, int(self.list_ends[number]))

    def chunks(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.pieces), _LISTS_AT_ONCE):
            yield self.pieces[start : start + _LISTS_AT_ONCE]

    def products(self, part: PartArrays, number: int, length: int) -> NDArray[Any]:
        start = int(part.starts[number])
        queries = torch.from_numpy(self.query_of_pair[self.pairs_of(number)])
        codes = self.codes.codes.index_select(0, queries)
        return products()(codes, part.codes[start : start + length]).numpy()


def search_batch(
    queries: ProbingQueries,
    parts: list[PartArrays],
    rows: Int[Tensor, " n"],
    k: int,
    effort: Effort,
) -> Neighbors:
    """Return the k nearest in the probed lists. rows: the datastore's, by position."""
    batch = _Batch(queries, parts)
    bounds = _bounds(batch, k, effort)
    candidates = _candidates(batch, bounds)
    nearest = nearest_of(candidates, rows, k)
    counts = candidates.counts.sum(axis=1)
    available = batch.lengths.sum(axis=0)[batch.probes].sum(axis=1)
    short = np.flatnonzero((counts < np.minimum(k, available)) & (bounds < UNBOUNDED))
    for start in range(0, len(short), _QUERIES_AT_ONCE):
        again = torch.from_numpy(short[start : start + _QUERIES_AT_ONCE])
        batch = _Batch(queries.take(again), parts)
        unbounded = np.full(len(again), UNBOUNDED, np.float32)
        better = nearest_of(_candidates(batch, unbounded), rows, k)
        nearest.squared_distances[again] = better.squared_distances
        nearest.rows[again] = better.rows
    return nearest


def _bounds(batch: _Batch, k: int, effort: Effort) -> Floats:
    """Return scores that at least k of each query's candidates are almost surely within."""
    heads = np.ceil(batch.lengths * effort.sample).astype(np.int64)
    # scores lie query by query, and within a query by probe and part
    sampled = heads.T[batch.probes]  # (query, probe, part)
    ends = np.cumsum(sampled.reshape(-1))
    offsets = (ends - sampled.reshape(-1)).reshape(sampled.shape)
    scores = np.empty(ends[-1], np.float32)

    def score(pieces: list[tuple[int, int]]) -> None:
        for which, number in pieces:
            part, length = batch.parts[which], int(heads[which, number])
            pairs = batch.pairs_of(number)
            rows = slice(int(part.starts[number]), int(part.starts[number]) + length)
            kernels.write_scores(
                batch.products(part, number, length),
                batch.steps[batch.query_of_pair[pairs]],
                part.scales(rows),
                offsets.reshape(-1, len(batch.parts))[batch.pairs[pairs], which],
                scores,
            )

    workers().map(score, batch.chunks())
    sizes = sampled.sum(axis=(1, 2))
    available = batch.lengths.sum(axis=0)[batch.probes].sum(axis=1)
    part_sampled = sizes / np.maximum(available, 1)
    wanted = effort.oversampling * k * part_sampled
    deviation = np.sqrt(wanted * (1 - part_sampled))
    ranks = np.ceil(wanted + effort.deviations * deviation).astype(np.int64)
    ranks[(ranks >= sizes) | (available <= 2 * k)] = -1
    starts = np.concatenate([offsets[:, 0, 0], ends[-1:]])
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
            length = int(batch.lengths[which, number])
            start = int(part.starts[number])
            rows = slice(start, start + length)
            query_of_pair = batch.query_of_pair[pairs]
            _scratch.reserve(length * len(query_of_pair))
            found = Kept(_scratch.distances, _scratch.positions, counts[which, pairs])
            total = kernels.keep(
                batch.products(part, number, length),
                batch.steps[query_of_pair],
                bounds[query_of_pair],
                part.scales(rows),
                found,
            )
            distances, positions = found.distances[:total].copy(), found.positions[:total].copy()
            if part.keys is not None:
                near = Kept(distances, positions, found.counts)
                kernels.exact(batch.queries, query_of_pair, part.keys[rows], near)
            else:
                half_norms = np.repeat(batch.half_norms[query_of_pair], found.counts)
                distances = np.maximum(2 * (distances + half_norms), 0)
            positions += part.first + start
            kept.append((distances, positions))
        return kept

    kept = [piece for chunk in workers().map(keep, batch.chunks()) for piece in chunk]
    shape = len(batch.queries), batch.nprobe, runs
    starts_of, counts_of = np.empty((2, counts.shape[1], runs), np.int64)
    starts_of[batch.pairs] = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape).T
    counts_of[batch.pairs] = counts.T
    return Candidates(
        np.concatenate([distances for distances, _ in kept] or [np.empty(0, np.float32)]),
        np.concatenate([positions for _, positions in kept] or [np.empty(0, np.int64)]),
        starts_of.reshape(shape[0], -1),
        counts_of.reshape(shape[0], -1),
    )
