"""The learned gate: small networks that choose every weight of a token from its features.

The weights are those of the language model and of each input's components. They are chosen before
the token is known, and never silence the language model.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.features import (
    TEMPERATURES,
    GateInput,
    Weighed,
    count_features,
    query_features,
    weigh,
)
from knnlm.mixture.interpolation import LEAST_LM_WEIGHT, TokenSums, TokenVotes, Voters, Votes
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.rows import join, select

_QUERIES_AT_ONCE = 512
_LARGEST_FEATURE = 5.0  # in standard deviations
_LAYERS = 3
_TINY = torch.finfo(torch.float32).tiny


class LearnedGate(nn.Module):
    """Several small networks (two hidden layers), whose weights are averaged.

    Each was trained with another part of the text held out. mean, scale: the mean and standard
    deviation of each feature in that text. network: for each layer the matrices of all networks
    (network, in, out), then their biases (network, 1, out). They require no gradient: `fit_gate`
    asks for it while it trains them.
    """

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]

    def __init__(
        self,
        inputs: Sequence[GateInput],
        mean: Float[Tensor, " feature"],
        scale: Float[Tensor, " feature"],
        network: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.networks = len(network[0])
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.network = nn.ParameterList(
            nn.Parameter(tensor.detach(), requires_grad=False) for tensor in network
        )

    def forward(self, lm: LMSummary, voters: Sequence[Voters]) -> list[Votes]:
        """Return how each input's voters enter the mixture; the LM has the rest of the weight.

        An input without voters has weight 0, and leaves its share to the LM.
        """
        parts = []
        for start in range(0, max(len(lm.token), 1), _QUERIES_AT_ONCE):
            queries = slice(start, start + _QUERIES_AT_ONCE)
            weighed = [
                weigh(gate_input, select(own, queries))
                for gate_input, own in zip(self.inputs, voters, strict=True)
            ]
            parts.append(self.choose(select(lm, queries), weighed))
        return [join(votes) for votes in zip(*parts, strict=True)]

    def choose(self, lm: LMSummary, weighed: Sequence[Weighed]) -> list[Votes]:
        """Return the votes of `forward` for voters that are weighed already."""
        votes = []
        for own, (lmbda, log_shares) in zip(weighed, self._choose(lm, weighed), strict=True):
            log_weights = (own.log_weights + log_shares[:, :, None]).logsumexp(dim=0)
            votes.append(Votes(log_weights, own.voters.tokens, lmbda))
        return votes

    def choose_by_token(
        self, lm: LMSummary, weighed: Sequence[Weighed], sums: Sequence[TokenSums]
    ) -> list[TokenVotes]:
        """Return the votes of `choose` by token. sums: of each input, a way for each component."""
        votes = []
        for own, (lmbda, log_shares) in zip(sums, self._choose(lm, weighed), strict=True):
            log_probs = own.log_probs + log_shares.index_select(1, own.queries)
            votes.append(TokenVotes(own.queries, own.tokens, log_probs.logsumexp(dim=0), lmbda))
        return votes

    def _choose(
        self, lm: LMSummary, weighed: Sequence[Weighed]
    ) -> Iterator[tuple[Float[Tensor, " query"], Float[Tensor, "component query"]]]:
        """Yield each input's weight λ, and the logarithms of its components' shares of it."""
        weights = self.weights(query_features(lm, weighed))
        parts = weights[:, 1:].chunk(len(self.inputs), dim=1)
        for own, part in zip(weighed, parts, strict=True):
            lmbda = part.sum(dim=1)
            shares = part / lmbda[:, None].clamp_min(_TINY)  # a gate may be sure enough for λ = 0
            yield lmbda.where(own.voters.present, 0.0), shares.log().T

    def weights(self, features: Float[Tensor, "query feature"]) -> Float[Tensor, "query component"]:
        """Return the weight of each component, the LM's first, before absent ones are left out."""
        standard = self.standardize(features).expand(self.networks, -1, -1)
        weights = self._outputs(standard).softmax(dim=-1).mean(dim=0)
        weights *= 1 - LEAST_LM_WEIGHT
        weights[:, 0].add_(LEAST_LM_WEIGHT)
        return weights

    def network_log_weights(
        self, standard: Float[Tensor, "network query feature"]
    ) -> Float[Tensor, "network query component"]:
        """Return the logarithms of what `weights` averages: each network's weights.

        standard: features that `standardize` has returned, of other queries for each network.
        """
        log_weights = torch.log_softmax(self._outputs(standard), dim=-1)
        log_weights = log_weights + math.log1p(-LEAST_LM_WEIGHT)
        kept = torch.full(log_weights.shape[-1:], -torch.inf, device=log_weights.device)
        kept[0] = math.log(LEAST_LM_WEIGHT)
        return torch.logaddexp(log_weights, kept)

    def standardize(
        self, features: Float[Tensor, "query feature"]
    ) -> Float[Tensor, "query feature"]:
        """Return features around 0, and none far from it, even in an unfamiliar kind of text."""
        centered = (features - self.mean) / self.scale
        return centered.clamp(-_LARGEST_FEATURE, _LARGEST_FEATURE)

    def _outputs(
        self, standard: Float[Tensor, "network query feature"]
    ) -> Float[Tensor, "network query component"]:
        parameters = list(self.network.parameters())  # quicker than to index the list
        hidden = standard
        for layer in range(_LAYERS):
            hidden = torch.baddbmm(parameters[2 * layer + 1], hidden, parameters[2 * layer])
            if layer < _LAYERS - 1:
                hidden = functional.gelu(hidden)
        return hidden

    def alone(self, number: int) -> "LearnedGate":
        """Return a gate of a single network of this one's, which shares its parameters."""
        network = [tensor[number : number + 1] for tensor in self.network]
        return LearnedGate(self.inputs, self.mean, self.scale, network)

    def on(self, device: torch.device | str) -> "LearnedGate":
        """Return this gate where its queries are; a copy if that is another device.

        (`to` moves the gate itself, which others may be using.)
        """
        if self.mean.device == torch.device(device):
            return self
        return copy.deepcopy(self).to(device)

    def to_dict(self) -> dict[str, Any]:
        """Return the inputs as plain values, for JSON; `state_dict` has the tensors."""
        return {"inputs": [asdict(gate_input) for gate_input in self.inputs]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LearnedGate":
        """Undo `to_dict` and `state_dict`; raises KeyError and DatastoreCorruptError."""
        names = ["mean", "scale", *(f"network.{number}" for number in range(2 * _LAYERS))]
        if missing := [name for name in names if name not in tensors]:
            raise DatastoreCorruptError(
                f"a stored gate must have the tensors {', '.join(names)}, but {missing[0]} is "
                "missing: tune the datastore again"
            )
        mean, scale, *network = (tensors[name] for name in names)
        # "sources" is the key's name in datastores that were tuned before it became "inputs"
        stored_inputs = stored["inputs"] if "inputs" in stored else stored["sources"]
        inputs = [GateInput(**gate_input) for gate_input in stored_inputs]
        made_for = len(mean), network[-1].shape[-1]
        needed = count_features(inputs), 1 + len(TEMPERATURES) * len(inputs)
        if made_for != needed:
            raise DatastoreCorruptError(
                f"a stored gate must have {needed[0]} features and {needed[1]} components, got "
                f"{made_for[0]} and {made_for[1]}: tune the datastore again"
            )
        return cls(inputs, mean, scale, network)
