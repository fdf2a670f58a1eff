"""λ chosen for each token: by the nearest distance, or by a small learned gate.

Both are made from cached neighbors of tuning text alone and say, before a token is known, how much
the neighbors' vote counts for it. Neither ever silences the language model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.features import (
    TEMPERATURES,
    GateInput,
    LMSummary,
    Voters,
    Weighed,
    count_features,
    query_features,
    weigh,
)
from knnlm.mixture.interpolation import TokenSums, TokenVotes, Votes

LEAST_LM_WEIGHT = 1e-3  # what no vote can take from the LM, however sure it looks
_AT_ONCE = 512  # queries whose components are held at once
_LARGEST_FEATURE = 5.0  # in standard deviations
_LAYERS = 3


class BucketedLambda:
    """λ by retrieval quality (Drozdov et al. 2022): a λ for each range of the nearest distance.

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
        """Undo `to_tensors`; raises DatastoreCorruptError."""
        edges, lmbdas = _take(tensors, "edges", "lmbdas")
        if len(lmbdas) != len(edges) + 1:
            raise DatastoreCorruptError(
                f"stored λ by distance must be one more than their {len(edges)} edges, got "
                f"{len(lmbdas)}: tune the datastore again"
            )
        return cls(edges, lmbdas)


class LearnedGate:
    """Weights of the language model and of each source's components, from a query's features.

    Several small networks (two hidden layers), each trained with another part of the text held
    out; their weights are averaged. mean, scale: what standardizes the features. parameters: of
    the networks, one after the other along the first dimension.
    """

    def __init__(
        self,
        sources: Sequence[GateInput],
        mean: Float[Tensor, " feature"],
        scale: Float[Tensor, " feature"],
        parameters: Sequence[Tensor],
    ) -> None:
        self.sources = tuple(sources)
        self.mean = mean
        self.scale = scale
        self.parameters = list(parameters)

    def standardize(
        self, features: Float[Tensor, "query feature"]
    ) -> Float[Tensor, "query feature"]:
        """Return features around 0, none of them far from it, also in text of another kind."""
        centered = (features - self.mean) / self.scale
        return centered.clamp(-_LARGEST_FEATURE, _LARGEST_FEATURE)

    def weights(self, features: Float[Tensor, "query feature"]) -> Float[Tensor, "query component"]:
        """Return the weight of each component, the LM's first, before absent ones are left out."""
        standard = self.standardize(features).expand(len(self.parameters[0]), -1, -1)
        weights = _outputs(self.parameters, standard).softmax(dim=-1).mean(dim=0)
        weights *= 1 - LEAST_LM_WEIGHT
        weights[:, 0] += LEAST_LM_WEIGHT
        return weights

    def __call__(self, lm: LMSummary, voters: Sequence[Voters]) -> list[Votes]:
        """Return how each source's voters enter the mixture; the LM has the rest of the weight.

        A source without voters has weight 0; what it would have had is the LM's too.
        """
        parts = []
        for start in range(0, max(len(lm.token), 1), _AT_ONCE):
            queries = slice(start, start + _AT_ONCE)
            weighed = [
                weigh(source, of_source.of(queries))
                for source, of_source in zip(self.sources, voters, strict=True)
            ]
            parts.append(self.choose(lm.of(queries), weighed))
        return [
            Votes(*(torch.cat(column) for column in zip(*of_source, strict=True)))
            for of_source in zip(*parts, strict=True)
        ]

    def choose(self, lm: LMSummary, weighed: Sequence[Weighed]) -> list[Votes]:
        """Return what a call returns, of voters that were weighed before the LM had spoken."""
        votes = []
        for of_source, chosen in zip(weighed, self._choose(lm, weighed), strict=True):
            parts = of_source.log_weights + chosen.log_parts[:, :, None]
            tokens = of_source.voters.tokens
            votes.append(Votes(parts.logsumexp(dim=0), tokens, chosen.lmbda, chosen.present))
        return votes

    def choose_by_token(
        self, lm: LMSummary, weighed: Sequence[Weighed], sums: Sequence[TokenSums]
    ) -> list[TokenVotes]:
        """Return what each token is given by the votes that `choose` returns.

        sums: of each source's tokens, weighed in each component's way.
        """
        votes = []
        for of_source, chosen in zip(sums, self._choose(lm, weighed), strict=True):
            parts = of_source.log_probs + chosen.log_parts[:, of_source.queries]
            log_probs = parts.logsumexp(dim=0)
            votes.append(
                TokenVotes(
                    of_source.queries, of_source.tokens, log_probs, chosen.lmbda, chosen.present
                )
            )
        return votes

    def _choose(self, lm: LMSummary, weighed: Sequence[Weighed]) -> Iterator["_Chosen"]:
        weights = self.weights(query_features(lm, weighed))
        of_sources = weights[:, 1:].chunk(len(self.sources), dim=1)
        for of_source, shares in zip(weighed, of_sources, strict=True):
            lmbda, present = shares.sum(dim=1), of_source.voters.present
            # a gate may be sure enough for λ = 0
            parts = shares / lmbda[:, None].clamp_min(torch.finfo(lmbda.dtype).tiny)
            yield _Chosen(lmbda.where(present, 0.0), parts.log().T, present)

    def to(self, device: torch.device | str) -> "LearnedGate":
        """Return the gate where its queries are."""
        if self.mean.device == torch.device(device):
            return self
        moved = [tensor.to(device) for tensor in (self.mean, self.scale, *self.parameters)]
        return LearnedGate(self.sources, moved[0], moved[1], moved[2:])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save; `describe` has the rest."""
        numbered = {f"network.{number}": tensor for number, tensor in enumerate(self.parameters)}
        return {"mean": self.mean, "scale": self.scale, **numbered}

    def describe(self) -> dict[str, Any]:
        """Return the sources as plain values, for JSON."""
        return {"sources": [asdict(source) for source in self.sources]}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> "LearnedGate":
        """Undo `to_tensors` and `describe`; raises DatastoreCorruptError."""
        names = [f"network.{number}" for number in range(2 * _LAYERS)]
        mean, scale, *parameters = _take(tensors, "mean", "scale", *names)
        sources = [GateInput(**source) for source in description["sources"]]
        made_for = len(mean), parameters[-1].shape[-1]
        needed = count_features(sources), 1 + len(TEMPERATURES) * len(sources)
        if made_for != needed:
            raise DatastoreCorruptError(
                f"a stored gate must have {needed[0]} features and {needed[1]} components, got "
                f"{made_for[0]} and {made_for[1]}: tune the datastore again"
            )
        return cls(sources, mean, scale, parameters)


class _Chosen(NamedTuple):
    """A source's weight λ, and how it divides among its components."""

    lmbda: Float[Tensor, " query"]
    log_parts: Float[Tensor, "component query"]
    present: Bool[Tensor, " query"]


def _take(tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DatastoreCorruptError(
            f"a stored mixture must have the tensors {', '.join(names)}, but {missing[0]} is "
            "missing: tune the datastore again"
        )
    return [tensors[name] for name in names]


def network_log_weights(
    parameters: Sequence[Tensor], features: Float[Tensor, "network query feature"]
) -> Float[Tensor, "network query component"]:
    """Return each network's log weights of the components, the LM's first.

    They are the logarithms of what `LearnedGate.weights` averages. parameters: of each layer its
    matrices (network, in, out) and its biases (network, 1, out).
    """
    outputs = _outputs(parameters, features)
    log_weights = torch.log_softmax(outputs, dim=-1) + math.log1p(-LEAST_LM_WEIGHT)
    kept = torch.full(log_weights.shape[-1:], -torch.inf, device=log_weights.device)
    kept[0] = math.log(LEAST_LM_WEIGHT)
    return torch.logaddexp(log_weights, kept)


def _outputs(
    parameters: Sequence[Tensor], features: Float[Tensor, "network query feature"]
) -> Float[Tensor, "network query component"]:
    hidden = features
    for layer in range(_LAYERS):
        hidden = torch.baddbmm(parameters[2 * layer + 1], hidden, parameters[2 * layer])
        if layer < _LAYERS - 1:
            hidden = functional.gelu(hidden)
    return hidden
