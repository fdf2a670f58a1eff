"""Measuring an approximate index: its recall against exact search, its speed, the nprobe it needs.

Knows no kind of index; exact search over all keys is the truth.
"""

import time
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import IndexOptions
from knnlm.index.exact import TOLERANCE, ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.index.report import Measured

_QUERIES = 256
_TIMED_QUERIES = 1024
_OWN_TEXT = 32  # the share of a datastore, to each side, that counts as a key's own text at most
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


class _Sample(NamedTuple):
    """Queries, and the rows that are not counted as neighbors of each: those of its own text.

    own: first and stop, for stored keys; empty spans for others.
    """

    vectors: Float[Tensor, "query dim"]
    own: Int[Tensor, "query 2"]

    def others(self, neighbors: Neighbors, k: int) -> Neighbors:
        """Return the k nearest that are not of a query's own text."""
        rows, (first, stop) = neighbors.rows, self.own.T[:, :, None]
        of_others = neighbors.present & ~((rows >= first) & (rows < stop))
        order = (~of_others).int().argsort(dim=1, stable=True)[:, :k]
        distances = neighbors.squared_distances.masked_fill(~of_others, torch.inf)
        rows = rows.masked_fill(~of_others, -1)
        return Neighbors(distances.gather(1, order), rows.gather(1, order))

    def wanted(self, neighbors: Neighbors, k: int) -> int:
        """Return how many neighbors must be searched for, so that k are of other texts."""
        rows, (first, stop) = neighbors.rows, self.own.T[:, :, None]
        own = neighbors.present & (rows >= first) & (rows < stop)
        counted = (~own).cumsum(dim=1)
        return int((counted < k).sum(dim=1).amax()) + 1


def choose_nprobe(
    index: Probing, store: Datastore, options: IndexOptions, nlist: int | None
) -> Measured:
    """Set the smallest nprobe that reaches the recall asked for, and measure the index.

    nlist: the largest nprobe; None to leave the index's own. Where distances are those of codes,
    the recall asked for is a share of what is found with all lists. Where stored keys serve as
    queries, the entries of the same document do not count as neighbors: held-out text has none of
    these, and they are the easiest to find.
    """
    k = min(options.k, len(store) // _ENTRIES_PER_NEIGHBOR)
    if k < 1:
        return Measured(options.k, options.recall, 1.0, 0, 0.0)
    steps = [index.nprobe]
    if nlist is not None:
        steps = nprobe_steps(index.least_nprobe(k), nlist)
    with options.progress.task("measure", len(steps) + 1, "settings") as advance:
        timed = _sample(store, options.queries, options.seed)
        sample = _Sample(timed.vectors[:_QUERIES], timed.own[:_QUERIES])
        most = min(2 * k, len(store)) if options.queries is None else k
        nearest = ExactIndex(store, resident_bytes=0).search(sample.vectors, most)
        truth, wanted = sample.others(nearest, k), min(most, sample.wanted(nearest, k))
        advance(1)

        def measured_recall(nprobe: int) -> float:
            index.nprobe = nprobe
            neighbors = index.search(sample.vectors, wanted)
            if not index.exact_distances:
                neighbors = with_exact_distances(store, sample.vectors, neighbors)
            return _recall(sample.others(neighbors, k), truth)

        recall, enough = 0.0, options.recall
        if nlist is not None and not index.exact_distances:
            enough *= measured_recall(nlist)  # more is not to be found by codes
        for step in steps:
            recall = measured_recall(step)
            advance(1)
            if recall >= enough:
                break
        started = time.perf_counter()
        index.search(timed.vectors, min(options.k, store.rows))
        seconds = time.perf_counter() - started
    milliseconds = seconds * 1e3 / len(timed.vectors)
    return Measured(options.k, options.recall, recall, len(sample.vectors), milliseconds)


def nprobe_steps(least: int, most: int) -> list[int]:
    """Return `least`, the numbers 1, 2, 3, 4, 6, 8, 12, … between the two, and `most`."""
    steps = {step for power in range(32) for step in (2**power, 3 * 2**power)}
    return sorted({least, most, *(step for step in steps if least < step < most)})


def _sample(store: Datastore, queries: Float[Tensor, "query dim"] | None, seed: int) -> _Sample:
    """Return some of the queries, or stored keys with the rows of each one's document."""
    generator = torch.Generator().manual_seed(seed)
    if queries is not None:
        chosen = torch.randperm(len(queries), generator=generator)[:_TIMED_QUERIES]
        return _Sample(queries[chosen].float().cpu(), torch.zeros(len(chosen), 2).long())
    rows = _live_rows(store.alive, _TIMED_QUERIES, generator)
    reach = max(1, store.rows // _OWN_TEXT)  # where one document is the whole datastore
    own = []
    for row in rows.tolist():
        document = store.document_at(row)
        own.append((max(document.start, row - reach), min(document.stop, row + reach + 1)))
    return _Sample(store.keys_at(rows).float(), torch.tensor(own))


def _live_rows(
    alive: Bool[Tensor, " rows"], count: int, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Return `count` different live rows at random, or all of them."""
    live = int(alive.sum())
    if live <= 2 * count:
        return alive.nonzero()[:, 0][torch.randperm(live, generator=generator)[:count]]
    chosen: dict[int, None] = {}  # in the order in which they were drawn
    while len(chosen) < count:
        drawn = torch.randint(len(alive), (count,), generator=generator)
        chosen |= dict.fromkeys(drawn[alive[drawn]].tolist())
    return torch.tensor(list(chosen)[:count])


def with_exact_distances(
    store: Datastore, queries: Float[Tensor, "query dim"], neighbors: Neighbors
) -> Neighbors:
    """Return neighbors in their order, with the distances of the stored keys themselves."""
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
