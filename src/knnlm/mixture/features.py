"""Features: how sure the language model is, how near the neighbors are, whether their votes agree.

A new feature is a new column: in `weigh` where the neighbors alone give it, else in
`query_features`. A gate that was trained with other features is then refused. Distances are in
units of the input's temperature, so that features mean the same whatever the scale of the keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.mixture.interpolation import (
    TokenSums,
    Voters,
    group_by_token,
    neighbor_log_weights,
    sum_by_token,
)
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.parameters import Parameters

TEMPERATURES = (0.5, 1.0, 2.5)
"""The temperatures of an input's components, in units of the input's own."""

_MIDDLE = 1  # the component whose votes are features
_LEAST_DISTANCE, _GREATEST_DISTANCE = 1e-2, 1e4  # copies have distance 0, absent neighbors +inf
_LEAST_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class GateInput:
    """A datastore or the continuous cache, as a gate sees it: voters weighed at TEMPERATURES.

    k: the most voters that it gives. temperature: T that suits it where weights are fixed. Raises
    InvalidArgumentError by the rules of `Parameters`.
    """

    k: int
    temperature: float

    def __post_init__(self) -> None:
        Parameters(k=self.k, temperature=self.temperature)


class Weighed(NamedTuple):
    """An input's voters, and all that can be computed before the language model's prediction.

    log_weights: each voter's log share of the vote, in each component. weights: its share in the
    middle one. most_votes: the share of the token that gets most there. features: those that need
    no language model.
    """

    voters: Voters
    log_weights: Float[Tensor, "component query k"]
    weights: Float[Tensor, "query k"]
    most_votes: Float[Tensor, " query"]
    features: Float[Tensor, "query feature"]

    def by_token(self) -> TokenSums:
        """Return the votes for every token, in each component."""
        return sum_by_token(self.log_weights, self.voters.tokens)


def weigh(gate_input: GateInput, voters: Voters) -> Weighed:
    """Weigh an input's voters at each of its temperatures, and compute their features."""
    temperatures = [factor * gate_input.temperature for factor in TEMPERATURES]
    log_weights = torch.stack(
        [neighbor_log_weights(voters.squared_distances, one) for one in temperatures]
    )
    weights = log_weights[_MIDDLE].exp()
    distances = voters.squared_distances / gate_input.temperature
    log_distances = distances.clamp(_LEAST_DISTANCE, _GREATEST_DISTANCE).log()
    # a query may have fewer voters than k: the last one then stands for the ranks beyond it
    ranks = [min(2**power, distances.shape[1]) for power in range(gate_input.k.bit_length())]
    features = [log_distances[:, rank - 1] for rank in ranks]

    # where a token appears for the first time, and the sum of each token's weights, in any order
    _, order, first, group = group_by_token(voters.tokens)  # the nearest of a token stays first
    new = torch.zeros_like(first).scatter_(1, order, first) & voters.squared_distances.isfinite()
    votes = torch.zeros_like(weights).scatter_add_(1, group, weights.gather(1, order))
    distinct = new.cumsum(dim=1).clamp_min(1)
    features += [distinct[:, rank - 1].log() for rank in ranks[1:]]
    most_votes = votes.amax(dim=1)
    features += [most_votes.clamp_min(_LEAST_SHARE).log(), torch.special.entr(votes).sum(dim=1)]
    return Weighed(voters, log_weights, weights, most_votes, torch.stack(features, dim=1))


def query_features(lm: LMSummary, weighed: Sequence[Weighed]) -> Float[Tensor, "query feature"]:
    """Return all that a gate sees of each query. weighed: the voters of each input."""
    parts = [torch.stack([lm.entropy, lm.log_prob], dim=1)]
    for one in weighed:
        lm_favorite = (one.weights * (one.voters.tokens == lm.token[:, None])).sum(dim=1)
        same_favorite = lm_favorite > one.most_votes - _LEAST_SHARE
        log_share = lm_favorite.clamp_min(_LEAST_SHARE).log()
        parts += [one.features, torch.stack([log_share, same_favorite.float()], dim=1)]
    return torch.cat(parts, dim=1)


def count_features(inputs: Sequence[GateInput]) -> int:
    """Return how many features `query_features` gives."""
    nothing = torch.zeros(0)
    lm = LMSummary(nothing, nothing, nothing.long())
    voters = [Voters(torch.zeros(0, i.k), torch.zeros(0, i.k).long()) for i in inputs]
    weighed = [weigh(i, v) for i, v in zip(inputs, voters, strict=True)]
    return query_features(lm, weighed).shape[1]
