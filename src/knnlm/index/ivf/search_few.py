"""Searching inverted lists for one or a few queries, on the CPU: reading memory is what it costs.

Every code of the probed lists is read once; exact distances are computed only for the candidates
with the best scores. One thread answers a query, in a handful of compiled calls: to wake another
takes longer than the half that it would do.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index.ivf import kernels
from knnlm.index.ivf import kernels_few as few_kernels
from knnlm.index.ivf.codes import (
    ALIKENESS_OF_RESTS,
    LARGEST_CODE,
    LEAST_STEP,
    MARGIN,
    Effort,
)
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.search_batch import (
    UNBOUNDED,
    Candidates,
    Floats,
    Integers,
    PartArrays,
    nearest_in,
)
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_SPARE_CANDIDATES = 32
_SPARE_LISTS = 8
_ONLY = np.zeros(1, np.int64)  # the only list, query or run


@dataclass(frozen=True, slots=True)
class QueryCode:
    """The code of one query; see `Codes`."""

    code: NDArray[np.int8]
    step: np.float32
    half_norm: np.float32

    def candidates(
        self,
        wanted: int,
        bound: float,
        lists: Integers,
        starts: Integers,
        codes: NDArray[np.int8],
        steps: Floats,
        half_norms: Floats,
    ) -> tuple[float, Integers, Floats]:
        """Return the positions and scores of the best keys of some lists, and a smaller bound."""
        margin = MARGIN * self.step * np.sqrt(self.half_norm)
        found: tuple[float, Integers, Floats] = few_kernels.candidates(
            self.code, self.step, wanted, margin, bound, lists, starts, codes, steps, half_norms
        )  # fmt: skip
        return found


class ListArrays:
    """Lists and their coder as the kernels want them."""

    def __init__(self, lists: Lists) -> None:
        self.centroids = lists.centroids.numpy()
        self.center = lists.coder.center.numpy()
        self.projection = lists.coder.projection.numpy()
        self.rest = lists.coder.rest.numpy()
        codes = lists.coder.encode(lists.centroids)
        self._codes = codes.codes.numpy()
        self._steps, self._half_norms = codes.steps.numpy(), codes.half_norms.numpy()
        self._all = np.array([0, len(self.centroids)])

    def encode(self, query: Floats) -> QueryCode:
        """Return the code of a query, as `Coder.encode` does."""
        code = np.empty(len(self.projection), np.int8)
        step, squared_norm = few_kernels.encode(
            query, self.center, self.projection, self.rest, np.float32(ALIKENESS_OF_RESTS),
            LARGEST_CODE, np.float32(LEAST_STEP), code,
        )  # fmt: skip
        return QueryCode(code, np.float32(step), np.float32(squared_norm / 2))

    def nearest_lists(self, query: Floats, code: QueryCode, count: int) -> Integers:
        """Return the numbers of the lists with the nearest centroids, ascending."""
        _, numbers, _ = code.candidates(
            count + count // 4 + _SPARE_LISTS, UNBOUNDED, _ONLY, self._all, self._codes,
            self._steps, self._half_norms,
        )  # fmt: skip
        if len(numbers) > count:
            distances = _exact(query, self.centroids, numbers)
            numbers = numbers[np.argpartition(distances, count - 1)[:count]]
        return np.sort(numbers)


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
    distances = np.empty((len(queries), k), np.float32)
    nearest_rows = np.empty((len(queries), k), np.int64)
    arrays, row_of_position = queries.float().contiguous().numpy(), rows.numpy()

    def search(number: int) -> None:
        query = arrays[number]
        if np.isfinite(query).all():
            found = slice(number, number + 1)
            runs = _candidates(query, lists, nprobe, parts, k, effort)
            nearest_in(runs, row_of_position, 0, distances[found], nearest_rows[found])
        else:
            distances[number], nearest_rows[number] = np.inf, -1

    if len(queries) == 1:
        search(0)
    else:
        workers().map(search, range(len(queries)))
    return Neighbors(torch.from_numpy(distances), torch.from_numpy(nearest_rows))


def _candidates(
    query: Floats,
    lists: ListArrays,
    nprobe: int,
    parts: list[PartArrays],
    k: int,
    effort: Effort,
) -> Candidates:
    """Return exact distances of the candidates with the best scores."""
    code = lists.encode(query)
    probes = lists.nearest_lists(query, code, nprobe)
    wanted = int(effort.oversampling * k) + _SPARE_CANDIDATES
    bound = UNBOUNDED
    found = []
    for part in parts:
        bound, positions, scores = code.candidates(
            wanted, bound, probes, part.starts, part.codes_array, part.steps, part.half_norms
        )
        if part.keys is None:
            distances = np.maximum(2 * (scores + code.half_norm), 0)
        else:
            distances = _exact(query, part.keys, positions)
        positions += part.first
        found.append((distances, positions))
    if len(found) == 1:
        distances, positions = found[0]
    else:
        distances = np.concatenate([distances for distances, _ in found])
        positions = np.concatenate([positions for _, positions in found])
    return Candidates(distances, positions, _ONLY[None], np.array([[len(positions)]]))


def _exact(query: Floats, keys: NDArray[Any], positions: Integers) -> Floats:
    distances = np.empty(len(positions), np.float32)
    kernels.exact(query[None], _ONLY, keys, positions, np.array([len(positions)]), distances)
    return distances
