"""Searching inverted lists for one or a few queries, on the CPU: reading memory is what it costs.

Every code of the probed lists is read once; exact distances are computed only for the candidates
with the best scores. One query is answered by the calling thread, which takes help where it is at
once to be had, but waits for nobody to wake up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.index import ivf_kernels as kernels
from knnlm.index.ivf_batch import UNBOUNDED, Floats, Integers, PartArrays, Runs, nearest_in
from knnlm.index.ivf_build import Lists
from knnlm.index.ivf_codes import Coder, Effort
from knnlm.index.ivf_workers import Workers, workers
from knnlm.index.protocol import Neighbors

_SPARE_CANDIDATES = 32
_PIECES = 8


class ListArrays:
    """Lists and their coder as the kernels want them."""

    def __init__(self, lists: Lists) -> None:
        self.coder: Coder = lists.coder
        self.centroids = lists.centroids.numpy()
        self.squared_norms = lists.squared_norms.numpy()
        self.center = lists.coder.center.numpy()
        self.projection = lists.coder.projection.numpy()

    def nearest_lists(self, query: Floats, count: int) -> Integers:
        """Return the numbers of the lists with the nearest centroids, in no order."""
        products = np.empty(len(self.centroids), np.float32)
        kernels.dot_rows(query, self.centroids, products)
        scores = self.squared_norms - 2 * products
        return np.argpartition(scores, count - 1)[:count]

    def encode(self, query: Floats) -> "_Code":
        """Return the code of a query, as `Coder.encode` does."""
        centered = query - self.center
        turned = np.empty(len(self.projection), np.float32)
        kernels.dot_rows(centered, self.projection, turned)
        codes = self.coder.quantize(
            torch.from_numpy(turned)[None], torch.from_numpy(centered).square().sum()[None]
        )
        return _Code(
            codes.codes[0].numpy(),
            codes.steps.item(),
            codes.half_norms.item(),
            codes.margins().item(),
        )


@dataclass(frozen=True, slots=True)
class _Code:
    code: NDArray[np.int8]
    step: float
    half_norm: float
    margin: float


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

    def search(number: int, helpers: Workers | None = None) -> None:
        query = arrays[number]
        if np.isfinite(query).all():
            found = slice(number, number + 1)
            runs = _candidates(query, lists, nprobe, parts, k, effort, helpers)
            nearest_in(runs, row_of_position, 0, distances[found], nearest_rows[found])

    if len(queries) == 1:
        search(0, workers())
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
    helpers: Workers | None,
) -> Runs:
    """Return exact distances of the candidates with the best scores."""
    probes, code = lists.nearest_lists(query, nprobe), lists.encode(query)
    pieces = [(part, some) for part in parts for some in np.array_split(probes, _PIECES)]
    ends = np.cumsum([(part.starts[some + 1] - part.starts[some]).sum() for part, some in pieces])
    own = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    scores, positions = np.empty(ends[-1], np.float32), np.empty(ends[-1], np.int64)

    def score(piece: int) -> None:
        part, some = pieces[piece]
        kernels.score_lists(
            code.code, np.float32(code.step), some, part.starts, part.codes.numpy(), part.steps,
            part.half_norms, scores[own[piece]], positions[own[piece]],
        )  # fmt: skip

    _each(score, len(pieces), helpers)
    wanted = int(effort.oversampling * k) + _SPARE_CANDIDATES
    bound = UNBOUNDED
    if wanted < len(scores):
        bound = min(bound, kernels.select(scores.copy(), wanted - 1) + code.margin)
    near = [np.flatnonzero(scores[run] <= bound) + run.start for run in own]
    distances = [np.empty(len(chosen), np.float32) for chosen in near]

    def measure(piece: int) -> None:
        part, chosen = pieces[piece][0], positions[near[piece]]
        if part.keys is None:
            estimates = 2 * (scores[near[piece]] + np.float32(code.half_norm))
            distances[piece] = np.maximum(estimates, 0)
        else:
            kernels.exact(
                query[None], np.zeros(1, np.int64), part.keys, chosen, np.array([len(chosen)]),
                distances[piece],
            )  # fmt: skip

    _each(measure, len(pieces), helpers)
    kept = [positions[chosen] + part.first for chosen, (part, _) in zip(near, pieces, strict=True)]
    count = sum(map(len, kept))
    return Runs(
        np.concatenate(distances),
        np.concatenate(kept),
        np.zeros((1, 1), np.int64),
        np.array([[count]]),
    )


def _each(function: Callable[[int], None], count: int, helpers: Workers | None) -> None:
    if helpers is not None:
        helpers.share(function, range(count))
    else:
        for number in range(count):
            function(number)
