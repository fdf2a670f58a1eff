"""What both searches on the CPU share: arrays for the kernels, candidates, and their selection."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index.ivf import kernels
from knnlm.index.ivf.kernels_few import CodedKeys
from knnlm.index.ivf.parts import Part
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

UNBOUNDED = float(np.finfo(np.float32).max)  # not +inf: that is the score of a forgotten entry
_QUERIES_AT_ONCE = 32
_LOW_BITS, _HIGH_SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


class Candidates(NamedTuple):
    """Candidates of all queries in one array; `starts`, `counts` [query, run] say whose.

    positions: −1 … see `PartArrays.first`.
    """

    distances: Floats
    positions: Integers
    starts: Integers
    counts: Integers


class PartArrays:
    """A part as the kernels want it. first: the position of its first row among all parts'."""

    def __init__(self, part: Part, first: int) -> None:
        self.first = first
        self.starts = part.starts.numpy()
        self.codes = part.codes
        self.steps = part.steps.numpy()
        self.half_norms = part.half_norms.numpy()
        self.coded_keys = CodedKeys(self.starts, part.codes.numpy(), self.steps, self.half_norms)
        keys = part.keys
        self.keys: NDArray[Any] | None = None
        if keys is not None:
            self.keys = (keys.view(torch.uint16) if keys.dtype == torch.float16 else keys).numpy()


def nearest_of(candidates: Candidates, rows: Int[Tensor, " n"], k: int) -> Neighbors:
    """Pick the k nearest of each query's candidates. rows: the datastore's, by position."""
    distances = np.empty((len(candidates.counts), k), np.float32)
    nearest_rows = np.empty((len(candidates.counts), k), np.int64)
    row_of_position = rows.numpy()

    def select(chunk: range) -> None:
        part = slice(chunk.start, chunk.stop)
        chosen = candidates._replace(starts=candidates.starts[part], counts=candidates.counts[part])
        distances[part], nearest_rows[part] = nearest_in(chosen, row_of_position, k)

    workers().map(select, workers().chunks(len(distances), _QUERIES_AT_ONCE))
    return Neighbors(torch.from_numpy(distances), torch.from_numpy(nearest_rows))


def nearest_in(
    candidates: Candidates, row_of_position: Integers, k: int
) -> tuple[Floats, Integers]:
    """Return the distances and rows of each query's nearest, ascending; +inf and −1 after them.

    Distances ≥ 0 sort like the integers with their bits. With a candidate's place in the low half,
    NumPy sorts distances and places at once, and equal distances stay in their order.
    """
    width = max(k, int(candidates.counts.sum(axis=1).max()))
    keys = np.empty((len(candidates.counts), width), np.uint64)
    positions = np.empty(keys.shape, np.int64)
    kernels.gather(candidates, keys, positions)
    if width > k:
        keys.partition(k - 1, axis=1)
        keys = keys[:, :k].copy()
    keys.sort(axis=1)
    places = (keys & _LOW_BITS).astype(np.int64)
    chosen = np.take_along_axis(positions, places, axis=1)
    rows = np.where(chosen < 0, -1, row_of_position[chosen])
    return (keys >> _HIGH_SHIFT).astype(np.uint32).view(np.float32), rows
