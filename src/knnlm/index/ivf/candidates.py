"""What both searches on the CPU share: arrays for the kernels, candidates, and their selection."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int8
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index.ivf import kernels
from knnlm.index.ivf.kernels import Nearest
from knnlm.index.ivf.kernels_few import CodedKeys
from knnlm.index.ivf.parts import Part
from knnlm.index.ivf.products import buffer
from knnlm.index.ivf.query_code import Floats, Integers, ListArrays
from knnlm.index.ivf.read_ahead import read_ahead_ranges
from knnlm.index.ivf.rescore import DatastoreKeys, key_bits
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

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
    """A part as the kernels want it.

    first: the position of its first row among all parts'. short: whether memory cannot hold the
    parts, so that what a search needs of them is asked for before it is used.
    """

    def __init__(self, part: Part, first: int, *, short: bool = False) -> None:
        self.first, self.short = first, short
        self.starts = part.starts.numpy()
        self.codes = part.codes
        self.steps = part.steps.numpy()
        self.half_norms = part.half_norms.numpy()
        self.coded_keys = CodedKeys(self.starts, part.codes.numpy(), self.steps, self.half_norms)
        self.keys: NDArray[Any] | None = None if part.keys is None else key_bits(part.keys)

    def ask_for_codes(self, lists: Integers) -> None:
        """Ask for the codes of some lists, ascending."""
        starts, stops = self.starts[lists], self.starts[lists + 1]
        read_ahead_ranges(self.codes.numpy(), starts, stops)

    def codes_of(self, rows: slice) -> Int8[Tensor, "n code_dim"]:
        """Return the codes of some rows, unpacked; valid until the thread's next call."""
        codes = self.codes[rows]
        if codes.dtype == torch.int8:
            return codes
        shape = len(codes), 2 * codes.shape[1]
        out = buffer("unpacked", shape[0] * shape[1], torch.int8).view(shape)
        kernels.unpack(codes.numpy(), out.numpy())
        return out


class IndexArrays(NamedTuple):
    """An index as the kernels want it.

    rows: the datastore's, by position. stored: the datastore's own keys, where candidates are
    measured with these.
    """

    lists: ListArrays
    parts: list[PartArrays]
    rows: NDArray[np.integer[Any]]
    stored: DatastoreKeys | None


def nearest_of(candidates: Candidates, rows: NDArray[np.integer[Any]], k: int) -> Neighbors:
    """Pick the k nearest of each query's candidates. rows: the datastore's, by position."""
    shape = len(candidates.counts), k
    nearest = Nearest(np.empty(shape, np.float32), np.empty(shape, np.int64))

    def select(chunk: range) -> None:
        part = slice(chunk.start, chunk.stop)
        starts, counts = candidates.starts[part], candidates.counts[part]
        chosen = Candidates(candidates.distances, candidates.positions, starts, counts)
        out = Nearest(nearest.distances[part], nearest.rows[part])
        write_nearest(chosen, int(counts.sum(axis=1).max()), rows, out)

    workers().map(select, workers().chunks(len(candidates.counts), _QUERIES_AT_ONCE))
    return Neighbors(torch.from_numpy(nearest.distances), torch.from_numpy(nearest.rows))


def write_nearest(
    candidates: Candidates, most: int, row_of_position: NDArray[np.integer[Any]], out: Nearest
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
