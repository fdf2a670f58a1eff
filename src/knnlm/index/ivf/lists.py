"""The lists of an inverted file: their centroids, how their members are coded, and their queries.

Knows vectors, not datastores or files.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.unfit_keys import measurable
from knnlm.index.ivf.codes import Coder, Codes


class ProbingQueries(NamedTuple):
    """Queries, with the lists that they probe and their codes.

    vectors: float32, zero where a query is not `measurable`.
    """

    vectors: Float[Tensor, "query dim"]
    measurable: Bool[Tensor, " query"]
    probes: Int[Tensor, "query probe"]
    codes: Codes

    def take(self, chosen: Int[Tensor, " n"]) -> "ProbingQueries":
        """Return some of the queries."""
        codes = Codes(*(getattr(self.codes, field.name)[chosen] for field in fields(Codes)))
        return ProbingQueries(
            self.vectors[chosen], self.measurable[chosen], self.probes[chosen], codes
        )

    @classmethod
    def joined(cls, parts: list["ProbingQueries"]) -> "ProbingQueries":
        """Return the queries of several parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        vectors, usable, probes, codes = zip(*parts, strict=True)
        arrays = ([getattr(part, field.name) for part in codes] for field in fields(Codes))
        return cls(
            torch.cat(vectors), torch.cat(usable), torch.cat(probes), Codes(*map(torch.cat, arrays))
        )


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists' centroids and how their members are stored: the same for all parts of an index.

    key_dtype: of the copied keys; None for a compressed index, which copies none.
    """

    centroids: Float[Tensor, "list dim"]
    squared_norms: Float[Tensor, " list"]
    coder: Coder
    key_dtype: torch.dtype | None

    @classmethod
    def around(
        cls,
        centroids: Float[Tensor, "list dim"],
        coder: Coder,
        key_dtype: torch.dtype | None = None,
    ) -> "Lists":
        """Return the lists with given centroids."""
        return cls(centroids, centroids.square().sum(dim=1), coder, key_dtype)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], key_dtype: torch.dtype | None) -> "Lists":
        """Pick the lists out of a file's arrays."""
        coder = Coder(**{field.name: arrays[field.name] for field in fields(Coder)})
        return cls.around(arrays["centroids"], coder, key_dtype)

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays to store, by name."""
        coder = {field.name: getattr(self.coder, field.name) for field in fields(Coder)}
        return {"centroids": self.centroids, **coder}

    def to(self, device: torch.device) -> "Lists":
        """Return the lists on a device."""
        arrays = {name: array.to(device) for name, array in self.arrays().items()}
        return Lists.from_arrays(arrays, self.key_dtype)

    def nearest_lists(
        self, vectors: Float[Tensor, "n dim"], count: int
    ) -> Int[Tensor, "n {count}"]:
        """Return the numbers of the lists with the nearest centroids, in no order."""
        scores = torch.addmm(self.squared_norms, vectors, self.centroids.T, alpha=-2.0)
        if count == 1:
            return scores.argmin(dim=1, keepdim=True)
        return scores.topk(count, dim=1, largest=False, sorted=False).indices

    def prepare(self, queries: Float[Tensor, "query dim"], nprobe: int) -> ProbingQueries:
        """Return queries with the `nprobe` nearest lists and the codes of each."""
        queries = queries.float()
        usable = measurable(queries)
        if not bool(usable.all()):
            queries = queries.where(usable[:, None], torch.zeros_like(queries))
        probes, codes = self.nearest_lists(queries, nprobe), self.coder.encode(queries)
        return ProbingQueries(queries, usable, probes, codes)


def default_nlist(rows: int) -> int:
    """Return a power of two near 1.35 √rows: 1,024 for half a million, 4,096 for ten million."""
    nearest = round(math.log2(1.35 * math.sqrt(max(1, rows))))
    return max(1, min(1 << nearest, rows // 32))
