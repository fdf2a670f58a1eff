"""What both searches on the CPU share: arrays for the kernels, candidates, and their selection."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index.ivf import kernels
from knnlm.index.ivf.kernels import Nearest
from knnlm.index.ivf.kernels_few import CodedKeys
from knnlm.index.ivf.parts import Part
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

UNBOUNDED = float(np.finfo(np.float32).max)  # not +inf: that is the score of a forgotten entry
_QUERIES_AT_ONCE = 32


class Candidates(NamedTuple):
    """Candidates of all queries in one array; `starts`, `counts` [query, run] say whose.

    positions: among the rows of all parts, one part after the other.
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
    shape = len(candidates.counts), k
    nearest = Nearest(np.empty(shape, np.float32), np.empty(shape, np.int64))
    row_of_position = rows.numpy()

    def select(chunk: range) -> None:
        part = slice(chunk.start, chunk.stop)
        starts, counts = candidates.starts[part], candidates.counts[part]
        chosen = Candidates(candidates.distances, candidates.positions, starts, counts)
        out = Nearest(nearest.distances[part], nearest.rows[part])
        write_nearest(chosen, int(counts.sum(axis=1).max()), row_of_position, out)

    workers().map(select, workers().chunks(len(candidates.counts), _QUERIES_AT_ONCE))
    return Neighbors(torch.from_numpy(nearest.distances), torch.from_numpy(nearest.rows))


def write_nearest(
    candidates: Candidates, most: int, row_of_position: Integers, out: Nearest
) -> None:
    """Write each query's nearest candidates, ascending, and +inf and −1 after them.

    most: the largest number of candidates of any query.

    Distances ≥ 0 sort like the integers with their bits. With a candidate's place in the low half,
    NumPy sorts distances and places at once, and equal distances stay in their order.
    """
    count, k = out.rows.shape
    keys = np.empty((count, max(k, most)), np.uint64)
    positions = np.empty(keys.shape, np.int64)
    kernels.gather(candidates, keys, positions)
    if most > k:
        keys.partition(k - 1, axis=1)
    keys[:, :k].sort(axis=1)
    kernels.scatter(keys, positions, row_of_position, out)
