"""Searching inverted lists for one or a few queries, on the CPU: reading memory is what it costs.

Every code of the probed lists is read once; exact distances are computed only for the candidates
with the best scores. One thread answers a query, in a handful of calls: waking another takes longer
than the half of the work that it would do.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.unfit_keys import measurable
from knnlm.index.ivf import kernels, kernels_few
from knnlm.index.ivf.candidates import (
    UNBOUNDED,
    Candidates,
    Floats,
    Integers,
    PartArrays,
    write_nearest,
)
from knnlm.index.ivf.codes import MARGIN
from knnlm.index.ivf.kernels import Kept, Nearest
from knnlm.index.ivf.kernels_few import CodedKeys, CoderArrays
from knnlm.index.ivf.lists import Lists
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
        self, wanted: int, bound: float, lists: Integers, keys: CodedKeys
    ) -> tuple[float, Integers, Floats]:
        """Return the positions and scores of the best keys of some lists, and a smaller bound.

        That is the `wanted` best, those that may be as good (their scores are within the margin of
        rounding), and none beyond the bound.
        """
        scores = kernels_few.score(self.code, self.step, lists, keys)
        if wanted < len(scores):
            ascending = scores.copy()
            ascending.partition(wanted - 1)
            margin = MARGIN * self.step * np.sqrt(self.half_norm)
            bound = min(bound, float(ascending[wanted - 1] + margin))
        positions, near = kernels_few.within(scores, bound, lists, keys.starts)
        return bound, positions, near


class ListArrays:
    """Lists and their coder as the kernels want them."""

    def __init__(self, lists: Lists) -> None:
        self.centroids = lists.centroids.numpy()
        coder = lists.coder
        self._coder = CoderArrays(
            coder.center.numpy(), coder.projection.numpy(), coder.rest.numpy()
        )
        codes = coder.encode(lists.centroids)
        self._coded_centroids = CodedKeys(
            np.array([0, len(self.centroids)]),
            codes.codes.numpy(),
            codes.steps.numpy(),
            codes.half_norms.numpy(),
        )

    def encode(self, query: Floats) -> QueryCode:
        """Return the code of a query, as `Coder.encode` does."""
        code = np.empty(len(self._coder.projection), np.int8)
        step, squared_norm = kernels_few.encode(query, self._coder, code)
        return QueryCode(code, np.float32(step), np.float32(squared_norm / 2))

    def nearest_lists(self, query: Floats, code: QueryCode, count: int) -> Integers:
        """Return the numbers of the lists with the nearest centroids, ascending."""
        wanted = count + count // 4 + _SPARE_LISTS
        _, numbers, _ = code.candidates(wanted, UNBOUNDED, _ONLY, self._coded_centroids)
        if len(numbers) > count:
            distances = _exact(query, self.centroids, numbers)
            numbers = numbers[np.argpartition(distances, count - 1)[:count]]
        return np.sort(numbers)


class IndexArrays(NamedTuple):
    """An index as the kernels want it. rows: the datastore's, by position."""

    lists: ListArrays
    parts: list[PartArrays]
    rows: Integers


def search_few(
    queries: Float[Tensor, "query dim"],
    index: IndexArrays,
    nprobe: int,
    k: int,
    oversampling: float,
) -> Neighbors:
    """Return the k nearest in the `nprobe` nearest lists; oversampling: see `bound_ranks`."""
    shape = len(queries), k
    nearest = Nearest(np.empty(shape, np.float32), np.empty(shape, np.int64))
    vectors = queries.float().contiguous().numpy()
    usable = measurable(queries).tolist()

    def search(number: int) -> None:
        one = slice(number, number + 1)
        out = Nearest(nearest.distances[one], nearest.rows[one])
        if usable[number]:
            wanted = int(oversampling * k) + _SPARE_CANDIDATES
            candidates = _candidates(vectors[number], index, nprobe, wanted)
            write_nearest(candidates, len(candidates.positions), index.rows, out)
        else:
            out.distances[:], out.rows[:] = np.inf, -1

    if len(queries) == 1:
        search(0)
    else:
        workers().map(search, range(len(queries)))
    return Neighbors(torch.from_numpy(nearest.distances), torch.from_numpy(nearest.rows))


def _candidates(query: Floats, index: IndexArrays, nprobe: int, wanted: int) -> Candidates:
    """Return exact distances of the candidates with the best scores."""
    code = index.lists.encode(query)
    probes = index.lists.nearest_lists(query, code, nprobe)
    bound = UNBOUNDED
    pieces = []
    for part in index.parts:
        bound, positions, scores = code.candidates(wanted, bound, probes, part.coded_keys)
        if part.keys is None:
            distances = np.maximum(2 * (scores + code.half_norm), 0)
        else:
            distances = _exact(query, part.keys, positions)
        positions += part.first
        pieces.append((distances, positions))
    if len(pieces) == 1:
        distances, positions = pieces[0]
    else:
        distances = np.concatenate([distances for distances, _ in pieces])
        positions = np.concatenate([positions for _, positions in pieces])
    return Candidates(distances, positions, _ONLY[None], np.array([[len(positions)]]))


def _exact(query: Floats, keys: NDArray[Any], positions: Integers) -> Floats:
    distances = np.empty(len(positions), np.float32)
    kernels.exact(query[None], _ONLY, keys, Kept(distances, positions, np.array([len(positions)])))
    return distances
