"""Measuring an approximate index: its recall against exact search, its speed, the nprobe it needs.

Knows no kind of index; exact search over all keys is the truth.
"""

import time
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import IndexOptions
from knnlm.index.exact import TOLERANCE, ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.index.report import Measured

_QUERIES = 256
_TIMED_QUERIES = 1024
_ENTRIES_PER_NEIGHBOR = 8  # at least: k is measured as smaller in a small datastore


@runtime_checkable
class Probing(Protocol):
    """An index that looks into the `nprobe` nearest of its lists.

    exact_distances: whether it returns the distances of the keys themselves, not of codes.
    """

    nprobe: int

    @property
    def exact_distances(self) -> bool:
        """Whether distances are exact."""
        ...

    def least_nprobe(self, k: int) -> int:
        """Return the smallest nprobe that makes a difference to a search for k."""
        ...

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """See `Index.search`."""
        ...


def choose_nprobe(
    index: Probing, store: Datastore, options: IndexOptions, nlist: int | None
) -> Measured:
    """Set the smallest nprobe that reaches the recall asked for, and measure the index.

    nlist: the largest nprobe; None to leave the index's own. Where distances are those of codes,
    the recall asked for is a share of what is found with all lists. Stored keys that serve as
    queries are not counted as their own neighbors.
    """
    k = min(options.k, len(store) // _ENTRIES_PER_NEIGHBOR)
    if k < 1:
        return Measured(options.k, options.recall, 1.0, 0, 0.0)
    steps = [index.nprobe]
    if nlist is not None:
        steps = nprobe_steps(index.least_nprobe(k), nlist)
    with options.progress.task("measure", len(steps) + 1, "settings") as advance:
        own_rows, sample = _sample(store, options.queries, options.seed)
        measured, own_rows = sample[:_QUERIES], own_rows[:_QUERIES]
        wanted = k + int(options.queries is None)
        truth = ExactIndex(store, resident_bytes=0).search(measured, wanted)
        truth = _without(truth, own_rows)
        advance(1)

        def measured_recall(nprobe: int) -> float:
            index.nprobe = nprobe
            neighbors = _without(index.search(measured, wanted), own_rows)
            if not index.exact_distances:
                neighbors = _with_exact_distances(store, measured, neighbors)
            return _recall(neighbors, truth)

        recall, enough = 0.0, options.recall
        if nlist is not None and not index.exact_distances:
            enough *= measured_recall(nlist)  # more is not to be found by codes
        for step in steps:
            recall = measured_recall(step)
            advance(1)
            if recall >= enough:
                break
        started = time.perf_counter()
        index.search(sample, min(options.k, store.rows))
        seconds = time.perf_counter() - started
    milliseconds = seconds * 1e3 / len(sample)
    return Measured(options.k, options.recall, recall, len(measured), milliseconds)


def nprobe_steps(least: int, most: int) -> list[int]:
    """Return `least`, the numbers 1, 2, 3, 4, 6, 8, 12, … between the two, and `most`."""
    steps = {step for power in range(32) for step in (2**power, 3 * 2**power)}
    return sorted({least, most, *(step for step in steps if least < step < most)})


def _sample(
    store: Datastore, queries: Float[Tensor, "query dim"] | None, seed: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n dim"]]:
    """Return the row of each query, −1 where it is not stored, and the queries."""
    generator = torch.Generator().manual_seed(seed)
    if queries is not None:
        chosen = torch.randperm(len(queries), generator=generator)[:_TIMED_QUERIES]
        return torch.full_like(chosen, -1), queries[chosen].float().cpu()
    live = store.alive.nonzero()[:, 0]
    rows = live[torch.randperm(len(live), generator=generator)[:_TIMED_QUERIES]]
    return rows, store.keys_at(rows).float()


def _without(neighbors: Neighbors, own_rows: Int[Tensor, " query"]) -> Neighbors:
    rows = neighbors.rows.masked_fill(neighbors.rows == own_rows[:, None], -1)
    return Neighbors(neighbors.squared_distances, rows)


def _with_exact_distances(
    store: Datastore, queries: Float[Tensor, "query dim"], neighbors: Neighbors
) -> Neighbors:
    distances = torch.full_like(neighbors.squared_distances, torch.inf)
    for number, query in enumerate(queries):
        present = neighbors.present[number]
        keys = store.keys_at(neighbors.rows[number, present]).float()
        distances[number, present] = (keys - query).square().sum(dim=1)
    return Neighbors(distances, neighbors.rows)


def _recall(neighbors: Neighbors, truth: Neighbors) -> float:
    """Return the share of the true neighbors that was found.

    Of entries that are equally near, such as copies of a text, each counts as right.
    """
    true_distances = truth.squared_distances.masked_fill(~truth.present, -torch.inf)
    farthest = true_distances.amax(dim=1, keepdim=True)
    near_enough = neighbors.squared_distances <= farthest * (1 + TOLERANCE)
    hits = total = 0
    for number, true_rows in enumerate(truth.rows):
        true_rows = true_rows[true_rows >= 0]
        right = torch.isin(neighbors.rows[number], true_rows) | near_enough[number]
        hits += min(int((right & neighbors.present[number]).sum()), len(true_rows))
        total += len(true_rows)
    return hits / max(1, total)
