"""Which list a key belongs to: the one with the nearest centroid, without comparing all of them.

The centroids are grouped around centroids of their own. A key is compared with these, and then
with the lists of the nearest groups only. Knows vectors, not datastores.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from knnlm.threads import workers

_COMPARED_AT_ONCE = 1 << 22  # scores
_ALL_UP_TO = 2048  # lists: comparing all of them costs little
_PROBED_GROUPS = 8
_ROUNDS = 8
_KEYS_AT_ONCE = 1 << 22  # numbers of keys that a thread assigns at once


class Groups:
    """Centroids, ready to find the nearest of them for many vectors.

    count: for how many. Up to 2,048 centroids, and for few vectors, all centroids are compared.
    """

    def __init__(self, centroids: Float[Tensor, "list dim"], count: int, seed: int = 0) -> None:
        lists = len(centroids)
        self._groups = 1
        self._numbers = torch.arange(lists, dtype=torch.int32)
        if lists > _ALL_UP_TO and count > lists:
            self._groups = round(math.sqrt(_PROBED_GROUPS * lists))
            self._centers = kmeans(centroids, self._groups, seed, rounds=_ROUNDS)
            groups = nearest(centroids, self._centers)
            sizes = torch.bincount(groups, minlength=self._groups)
            self._centers = self._centers[sizes > 0]
            self._groups = len(self._centers)
            self._numbers = groups.argsort(stable=True).int()
            self._stops = sizes[sizes > 0].cumsum(0).tolist()
            self._center_norms = self._centers.square().sum(dim=1)
        self._centroids = centroids[self._numbers]
        self._norms = self._centroids.square().sum(dim=1)

    @property
    def compared(self) -> int:
        """How many centroids of both levels each vector is compared with, about."""
        if self._groups == 1:
            return len(self._centroids)
        return self._groups + _PROBED_GROUPS * len(self._centroids) // self._groups

    def nearest(self, vectors: Float[Tensor, "n dim"]) -> Int32[Tensor, " n"]:
        """Return the number of the nearest centroid of each vector; in this thread alone."""
        if self._groups == 1:
            return nearest(vectors, self._centroids, self._norms)
        from knnlm.index.ivf import kernels_build  # numba takes half a second to import

        chosen = np.empty((len(vectors), _PROBED_GROUPS), np.int32)
        size = max(1, _COMPARED_AT_ONCE // self._groups)
        for start in range(0, len(vectors), size):
            part = vectors[start : start + size]
            scores = torch.addmm(self._center_norms, part, self._centers.T, alpha=-2.0)
            kernels_build.choose_groups(scores.numpy(), chosen[start : start + size])
        ends = np.zeros(self._groups, np.int64)
        keys = np.empty(chosen.size, np.int32)
        kernels_build.keys_by_group(chosen, ends, keys)
        least = np.full(len(vectors), np.inf, np.float32)
        places = np.zeros(len(vectors), np.int32)
        first = begin = 0
        for stop, end in zip(self._stops, ends.tolist(), strict=True):
            size = max(1, _COMPARED_AT_ONCE // max(1, stop - first))
            for start in range(begin, end, size):
                some = keys[start : min(end, start + size)]
                scores = torch.addmm(
                    self._norms[first:stop],
                    vectors.index_select(0, torch.from_numpy(some)),
                    self._centroids[first:stop].T,
                    alpha=-2.0,
                )
                kernels_build.keep_nearest(scores.numpy(), some, first, least, places)
            first, begin = stop, end
        return self._numbers[torch.from_numpy(places)]


def nearest(
    vectors: Float[Tensor, "n dim"],
    centroids: Float[Tensor, "list dim"],
    squared_norms: Float[Tensor, " list"] | None = None,
) -> Int32[Tensor, " n"]:
    """Return the number of each vector's nearest centroid, comparing all."""
    if squared_norms is None:
        squared_norms = centroids.square().sum(dim=1)
    numbers = torch.empty(len(vectors), dtype=torch.int32)
    size = max(1, _COMPARED_AT_ONCE // len(centroids))
    for start in range(0, len(vectors), size):
        part = vectors[start : start + size]
        scores = torch.addmm(squared_norms, part, centroids.T, alpha=-2.0)
        numbers[start : start + size] = scores.argmin(dim=1)
    return numbers


def kmeans(
    sample: Float[Tensor, "n dim"],
    count: int,
    seed: int,
    *,
    rounds: int,
    advance: Callable[[int], None] = lambda rounds: None,
) -> Float[Tensor, "{count} dim"]:
    """Return centroids of a sample, by Lloyd's algorithm from random members of it.

    A centroid without members moves beside that of the most.
    """
    from knnlm.index.ivf import kernels_build

    generator = torch.Generator().manual_seed(seed)
    centroids = sample[torch.randperm(len(sample), generator=generator)[:count]].clone()
    chunks = workers().chunks(len(sample), max(1, _KEYS_AT_ONCE // sample.shape[1]))
    for _ in range(rounds):
        groups = Groups(centroids, len(sample), seed)

        def assign(chunk: range, groups: Groups = groups) -> Int32[Tensor, " n"]:
            return groups.nearest(sample[chunk.start : chunk.stop])

        numbers = torch.cat(workers().map(assign, chunks))
        sums, counts = torch.zeros(centroids.shape).double(), torch.zeros(count, dtype=torch.int64)
        kernels_build.add_by_list(sample.numpy(), numbers.numpy(), sums.numpy(), counts.numpy())
        filled = counts > 0
        centroids[filled] = (sums[filled] / counts[filled, None]).float()
        _fill_empty(centroids, counts)
        advance(1)
    return centroids


def _fill_empty(centroids: Float[Tensor, "list dim"], counts: Tensor) -> None:
    """Split the largest lists, so that none stays empty."""
    empty = (counts == 0).nonzero()[:, 0]
    largest = counts.argsort(descending=True, stable=True)[: len(empty)]
    shift = 1 / 1024 * centroids[largest]
    shift[:, 1::2] *= -1
    centroids[empty] = centroids[largest] + shift
    centroids[largest] -= shift
