"""The k nearest of several shares' answers: by distance, and where that is equal by row."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.index.protocol import Neighbors


def merge_shares(answers: Sequence[Neighbors], k: int, coverage: float) -> Neighbors:
    """Return the k nearest in the answers of searches over different rows."""
    if len(answers) == 1:
        distances, rows = answers[0].squared_distances, answers[0].rows
    else:
        distances = torch.cat([answer.squared_distances for answer in answers], dim=1)
        rows = torch.cat([answer.rows for answer in answers], dim=1)
    nearest, columns = distances.topk(k, dim=1, largest=False)
    nearest_rows = rows.gather(1, columns)
    tied = _have_ties(distances, nearest).nonzero()[:, 0]
    if len(tied):
        nearest[tied], nearest_rows[tied] = _by_distance_and_row(distances[tied], rows[tied], k)
    return Neighbors(nearest, nearest_rows, coverage)


def _have_ties(
    distances: Float[Tensor, "query candidate"], nearest: Float[Tensor, "query k"]
) -> Tensor:
    """Return for which queries the order, or the choice, of neighbors depends on their rows."""
    farthest = nearest[:, -1:]
    equal = ((nearest.diff(dim=1) == 0) & nearest[:, 1:].isfinite()).any(dim=1)
    beyond = (distances <= farthest).sum(dim=1) > nearest.shape[1]
    return equal | (beyond & farthest[:, 0].isfinite())


def _by_distance_and_row(
    distances: Float[Tensor, "query candidate"], rows: Int[Tensor, "query candidate"], k: int
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    rows, by_row = rows.sort(dim=1)
    distances, order = distances.gather(1, by_row).sort(dim=1, stable=True)
    return distances[:, :k], rows.gather(1, order)[:, :k]
