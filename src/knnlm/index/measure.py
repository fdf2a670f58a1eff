"""What an approximate index gives: its recall against exact search, its time, the nprobe for it.

Knows no kind of index; exact search over all keys is the truth.
"""

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.progress import Progress

_QUERIES = 256
_TIMED_QUERIES = 1024
_SAME = 1e-5  # relative and absolute: distances that differ by rounding
_ENTRIES_PER_NEIGHBOR = 8  # recall of more of a small datastore than this is not asked for


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on `queries` queries.

    recall: the part found of the k true nearest. milliseconds_per_query: in batches, on the
    machine that built the index.
    """

    k: int
    target_recall: float
    recall: float
    queries: int
    milliseconds_per_query: float


@runtime_checkable
class Probing(Protocol):
    """An index that looks into the `nprobe` nearest of its lists.

    exact_distances: whether the distances it returns are those of the keys, not of codes.
    """

    nprobe: int
    exact_distances: bool

    def least_nprobe(self, k: int) -> int:
        """Return the smallest nprobe that makes a difference to a search for k."""
        ...

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """See `Index.search`."""
        ...


def choose_nprobe(
    index: Probing,
    store: Datastore,
    k: int,
    target_recall: float,
    nlist: int | None,
    queries: Float[Tensor, "query dim"] | None,
    seed: int,
    progress: Progress,
) -> Measured:
    """Set the smallest nprobe that reaches the recall, and measure it.

    nlist: the largest nprobe; None to leave the index's own. queries: real ones; None for stored
    keys, which are not counted as their own neighbors.
    """
    found_k = min(k, len(store) // _ENTRIES_PER_NEIGHBOR)
    if found_k < 1:
        return Measured(k, target_recall, 1.0, 0, 0.0)
    steps = [index.nprobe]
    if nlist is not None:
        steps = nprobe_steps(index.least_nprobe(found_k), nlist)
    with progress.task("measure", len(steps) + 1, "settings") as advance:
        own_rows, sample = _sample(store, queries, seed)
        measured, own_rows = sample[:_QUERIES], own_rows[:_QUERIES]
        wanted = found_k + int(queries is None)
        truth = ExactIndex(store, resident_bytes=0).search(measured, wanted)
        truth = _without(truth, own_rows)
        advance(1)
        recall = 0.0
        for step in steps:
            index.nprobe = step
            found = _without(index.search(measured, wanted), own_rows)
            recall = _recall(found, truth, index.exact_distances)
            advance(1)
            if recall >= target_recall:
                break
        started = time.perf_counter()
        index.search(sample, k)
        seconds = time.perf_counter() - started
    return Measured(k, target_recall, recall, len(measured), seconds * 1e3 / len(sample))


def nprobe_steps(least: int, most: int) -> list[int]:
    """Return least, then what lies between of 1, 2, 3, 4, 6, 8, 12, …, then most."""
    steps = {step for power in range(32) for step in (2**power, 3 * 2**power)}
    return sorted({least, most, *(step for step in steps if least < step < most)})


def _sample(
    store: Datastore, queries: Float[Tensor, "query dim"] | None, seed: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n dim"]]:
    """Return queries and the row of each, −1 for those that are not stored."""
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


def _recall(found: Neighbors, truth: Neighbors, exact_distances: bool) -> float:
    """Return the part of the true neighbors that was found.

    Among entries that are equally near, as copies of a text are, each is as right as the other.
    """
    true_distances = truth.squared_distances.masked_fill(~truth.present, -torch.inf)
    farthest = true_distances.amax(dim=1, keepdim=True)
    near_enough = found.squared_distances <= farthest * (1 + _SAME) + _SAME
    hits = total = 0
    for number, true_rows in enumerate(truth.rows):
        true_rows = true_rows[true_rows >= 0]
        right = torch.isin(found.rows[number], true_rows)
        if exact_distances:
            right |= near_enough[number]
        hits += min(int((right & found.present[number]).sum()), len(true_rows))
        total += len(true_rows)
    return hits / max(1, total)
