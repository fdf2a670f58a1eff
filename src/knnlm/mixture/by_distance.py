"""λ chosen for each token by the distance of its nearest neighbor (Drozdov et al. 2022)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.errors import DatastoreCorruptError
from knnlm.rules import check_lmbda


class BucketedLambda:
    """A λ for each range of the nearest squared distance.

    edges: between the ranges, ascending squared distances. lmbdas: one more than edges.
    """

    def __init__(self, edges: Float[Tensor, " edge"], lmbdas: Float[Tensor, " bucket"]) -> None:
        self.edges = edges
        self.lmbdas = lmbdas

    def __call__(self, squared_distances: Float[Tensor, "query k"]) -> Float[Tensor, " query"]:
        """Return each query's λ; 0 where it has no neighbor."""
        nearest = squared_distances[:, 0].float().cpu().contiguous()
        lmbdas = self.lmbdas[torch.bucketize(nearest, self.edges)]
        return lmbdas.masked_fill(nearest.isposinf(), 0.0).to(squared_distances.device)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        return {"edges": self.edges, "lmbdas": self.lmbdas}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "BucketedLambda":
        """Undo `to_tensors`; raises KeyError, ValueError and DatastoreCorruptError."""
        edges, lmbdas = tensors["edges"], tensors["lmbdas"]
        if len(lmbdas) != len(edges) + 1:
            raise DatastoreCorruptError(
                f"stored λ by distance must be one more than their {len(edges)} edges, got "
                f"{len(lmbdas)}: tune the datastore again"
            )
        for lmbda in lmbdas.tolist():
            check_lmbda(lmbda)
        return cls(edges, lmbdas)
