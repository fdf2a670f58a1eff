"""Searching inverted lists for one or a few queries, on the CPU: reading memory is what it costs.

Every code of the probed lists is read once; exact distances are computed only for the candidates
with the best scores. One thread answers a query, in a handful of compiled calls: to wake another
takes longer than the half that it would do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index import ivf_few_kernels as few_kernels
from knnlm.index import ivf_kernels as kernels
from knnlm.index.ivf_batch import UNBOUNDED, Floats, Integers, PartArrays, Runs, nearest_in
from knnlm.index.ivf_build import Lists
from knnlm.index.ivf_codes import (
    ALIKENESS_OF_RESTS,
    LARGEST_CODE,
    LEAST_STEP,
    Effort,
    margin,
)
from knnlm.index.ivf_workers import workers
from knnlm.index.protocol import Neighbors

_SPARE_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class QueryCode:
    """The code of one query; see `Codes`."""

    code: NDArray[np.int8]
    step: float
    half_norm: float


class ListArrays:
    """Lists and their coder as the kernels want them."""

    def __init__(self, lists: Lists) -> None:
        self.centroids = lists.centroids.numpy()
        self.squared_norms = lists.squared_norms.numpy()
        self.center = lists.coder.center.numpy()
        self.projection = lists.coder.projection.numpy()
        self.rest = lists.coder.rest.numpy()

    def nearest_lists(self, query: Floats, count: int) -> Integers:
        """Return the numbers of the lists with the nearest centroids, ascending."""
        numbers = np.empty(count, np.int64)
        few_kernels.nearest_lists(query, self.centroids, self.squared_norms, numbers)
        return numbers

    def encode(self, query: Floats) -> QueryCode:
        """Return the code of a query, as `Coder.encode` does."""
        code = np.empty(len(self.projection), np.int8)
        step, squared_norm = few_kernels.encode(
            query, self.center, self.projection, self.rest, np.float32(ALIKENESS_OF_RESTS),
            LARGEST_CODE, np.float32(LEAST_STEP), code,
        )  # fmt: skip
        return QueryCode(code, step, squared_norm / 2)


def search_few(
    queries: Float[Tensor, "query dim"],
    lists: ListArrays,
    nprobe: int,
    parts: list[PartArrays],
    rows: Int[Tensor, " n"],
    k: int,
    effort: Effort,
) -> Neighbors:
    """Return the k nearest in the `nprobe` nearest lists. rows: the datastore's, by position."""
    nearest = Neighbors(torch.full((len(queries), k), torch.inf), torch.full((len(queries), k), -1))
    distances, nearest_rows = nearest.squared_distances.numpy(), nearest.rows.numpy()
    arrays, row_of_position = queries.float().contiguous().numpy(), rows.numpy()

    def search(number: int) -> None:
        query = arrays[number]
        if np.isfinite(query).all():
            found = slice(number, number + 1)
            runs = _candidates(query, lists, nprobe, parts, k, effort)
            nearest_in(runs, row_of_position, 0, distances[found], nearest_rows[found])

    if len(queries) == 1:
        search(0)
    else:
        workers().map(search, range(len(queries)))
    return nearest


def _candidates(
    query: Floats,
    lists: ListArrays,
    nprobe: int,
    parts: list[PartArrays],
    k: int,
    effort: Effort,
) -> Runs:
    """Return exact distances of the candidates with the best scores."""
    probes, code = lists.nearest_lists(query, nprobe), lists.encode(query)
    scored = [int((part.starts[probes + 1] - part.starts[probes]).sum()) for part in parts]
    ends = np.cumsum([0, *scored])
    scores = np.empty(ends[-1], np.float32)
    for part, start, stop in zip(parts, ends[:-1], ends[1:], strict=True):
        few_kernels.score_lists(
            code.code, np.float32(code.step), probes, part.starts, part.codes_array, part.steps,
            part.half_norms, scores[start:stop],
        )  # fmt: skip
    wanted = int(effort.oversampling * k) + _SPARE_CANDIDATES
    bound = UNBOUNDED
    if wanted < len(scores):
        limit = kernels.select(scores.copy(), wanted - 1)
        bound = min(bound, limit + margin(code.step, code.half_norm))
    distances, positions, found = np.empty_like(scores), np.empty(len(scores), np.int64), 0
    for part, start, stop in zip(parts, ends[:-1], ends[1:], strict=True):
        count = few_kernels.within(
            scores[start:stop], bound, probes, part.starts, positions[found:], distances[found:]
        )
        near = slice(found, found + count)
        if part.keys is None:
            distances[near] = np.maximum(2 * (distances[near] + np.float32(code.half_norm)), 0)
        else:
            kernels.exact(
                query[None], np.zeros(1, np.int64), part.keys, positions[near], np.array([count]),
                distances[near],
            )  # fmt: skip
        positions[near] += part.first
        found += count
    return Runs(distances, positions, np.zeros((1, 1), np.int64), np.array([[found]]))
