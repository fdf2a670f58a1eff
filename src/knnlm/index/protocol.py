"""`Index` and `Neighbors`: what every search answers with. Knows no datastore."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.choices import Coverage
from knnlm.errors import InvalidArgumentError
from knnlm.rules import check_k


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The k nearest entries of each query.

    squared_distances: float32, squared L2, ascending; +inf where absent.
    rows: int64 rows of the datastore; −1 where absent.
    coverage: the share of the live entries that were searched; below 1 only where a part of a
    cluster was late, and where that was allowed.
    """

    squared_distances: Float[Tensor, "query k"]
    rows: Int[Tensor, "query k"]
    coverage: float = 1.0

    @property
    def present(self) -> Bool[Tensor, "query k"]:
        """True where there is a neighbor at all."""
        return self.rows >= 0


@runtime_checkable
class Index(Protocol):
    """Finds the nearest live entries of a datastore."""

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest live entries, on the queries' device.

        Forgotten entries are never returned. Where fewer than k are found, or where a query is not
        finite or longer than 1e18, the rest is absent. Raises InvalidArgumentError for k < 1 or
        another dimension.
        """
        ...


@runtime_checkable
class PartialIndex(Index, Protocol):
    """An index that can leave entries out: one on a cluster, whose shares may be late."""

    coverage: Coverage

    def with_coverage(self, coverage: str) -> Index:
        """Return the same index with another coverage."""
        ...


def coverage_of(index: Index) -> Coverage:
    """Return what an index may leave out."""
    return index.coverage if isinstance(index, PartialIndex) else Coverage.whole


def merge_neighbors(left: Neighbors, right: Neighbors, k: int) -> Neighbors:
    """Return the k nearest neighbors in the results of two searches over different rows."""
    distances = torch.cat([left.squared_distances, right.squared_distances], dim=1)
    nearest, columns = distances.topk(k, dim=1, largest=False)
    return Neighbors(nearest, torch.cat([left.rows, right.rows], dim=1).gather(1, columns))


def check_search(queries: Float[Tensor, "query dim"], k: int, dimension: int) -> None:
    """Refuse a search that no index can answer; raises InvalidArgumentError."""
    check_k(k)
    if queries.shape[1] != dimension:
        raise InvalidArgumentError(
            f"queries must have the keys' dimension {dimension}, got {queries.shape[1]}"
        )
