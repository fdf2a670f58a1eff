"""λ chosen for each token by the distance of its nearest neighbor (Drozdov et al. 2022)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.errors import InvalidArgumentError
from knnlm.rules import check_lmbda


@dataclass(frozen=True, slots=True, eq=False)
class BucketedLambda:
    """A λ for each range of the nearest squared distance.

    edges: between the ranges, ascending squared distances. lmbdas: one more than edges. Raises
    InvalidArgumentError for another number and for λ outside [0, 1].
    """

    edges: Float[Tensor, " edge"]
    lmbdas: Float[Tensor, " bucket"]

    def __post_init__(self) -> None:
        if len(self.lmbdas) != len(self.edges) + 1:
            raise InvalidArgumentError(
                f"λ by distance must be one more than their {len(self.edges)} edges, got "
                f"{len(self.lmbdas)}"
            )
        for lmbda in self.lmbdas.tolist():
            check_lmbda(lmbda)

    def __call__(self, squared_distances: Float[Tensor, "query k"]) -> Float[Tensor, " query"]:
        """Return each query's λ; 0 where it has no neighbor."""
        nearest = squared_distances[:, 0].float().cpu().contiguous()
        lmbdas = self.lmbdas[torch.bucketize(nearest, self.edges)]
        return lmbdas.masked_fill(nearest.isposinf(), 0.0).to(squared_distances.device)
