"""The code of one query, and the lists that it should look into, in a few compiled calls."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.index.ivf import kernels, kernels_few
from knnlm.index.ivf.codes import MARGIN
from knnlm.index.ivf.kernels import Kept
from knnlm.index.ivf.kernels_few import CodedKeys, CoderArrays
from knnlm.index.ivf.lists import Lists

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

UNBOUNDED = float(np.finfo(np.float32).max)  # not +inf: that is the score of a forgotten entry
ONLY = np.zeros(1, np.int64)
"""The only list, query or run."""
_SPARE_LISTS = 8


@dataclass(frozen=True, slots=True)
class QueryCode:
    """The code of one query; see `Codes`."""

    code: NDArray[np.int8]
    step: np.float32
    half_norm: np.float32

    @property
    def margin(self) -> float:
        """How far scores may be off because codes are rounded."""
        return float(MARGIN * self.step * np.sqrt(self.half_norm))

    def candidates(
        self, wanted: int, bound: float, lists: Integers, keys: CodedKeys, margin: float
    ) -> tuple[float, Integers, Floats]:
        """Return the positions and scores of the best keys of some lists, and a smaller bound.

        That is the `wanted` best, those that may be as good (their scores are within a margin), and
        none beyond the bound.
        """
        packed = keys.codes.dtype == np.uint8
        score = kernels_few.score_packed if packed else kernels_few.score
        scores = score(self.code, self.step, lists, keys)
        if wanted < len(scores):
            ascending = scores.copy()
            ascending.partition(wanted - 1)
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
        centroids = self._coded_centroids
        _, numbers, _ = code.candidates(wanted, UNBOUNDED, ONLY, centroids, code.margin)
        if len(numbers) > count:
            distances = exact_distances(query, self.centroids, numbers)
            numbers = numbers[np.argpartition(distances, count - 1)[:count]]
        return np.sort(numbers)


def exact_distances(query: Floats, keys: NDArray[Any], positions: Integers) -> Floats:
    """Return a query's squared distances to the keys at some positions."""
    distances = np.empty(len(positions), np.float32)
    kernels.exact(query[None], ONLY, keys, Kept(distances, positions, np.array([len(positions)])))
    return distances
