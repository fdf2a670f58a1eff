"""Neighbors → log p_kNN → mixture, for one target of each query and for the whole vocabulary.

    Neighbors    distances, rows               found by an index (index/protocol.py)
    Voters       distances, tokens             the value of a row is the token it votes for
    Votes        log weights, tokens, λ        distances have become shares of p_kNN
    TargetVotes  log p_kNN of a target, λ      for `interpolate`: evaluation knows the target
    TokenVotes   log p_kNN of tokens, λ        for `interpolate_vocabulary`: prediction does not

With fixed weights, `vote` turns Voters into Votes. A gate needs the LM's prediction to do so; all
that does not depend on it is computed before (`Weighed`, TokenSums).

Everything is in natural-log space and float32. An absent neighbor (distance +inf) weighs nothing,
and a query without any neighbor keeps p_LM.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEAST_LM_WEIGHT = 1e-3
"""The weight that the LM keeps where weights are chosen for each token, however sure they look."""


class Voters(NamedTuple):
    """The entries near each query, the nearest first.

    squared_distances: +inf where absent. tokens: what each votes for; arbitrary where absent.
    """

    squared_distances: Float[Tensor, "query k"]
    tokens: Int[Tensor, "query k"]

    @property
    def present(self) -> Bool[Tensor, " query"]:
        """Which queries have a voter."""
        return self.squared_distances[:, 0].isfinite()

    def nearest(self, k: int) -> "Voters":
        """Return each query's k nearest voters."""
        return Voters(self.squared_distances[:, :k], self.tokens[:, :k])


def neighbor_log_weights(
    squared_distances: Float[Tensor, "query k"],
    temperature: float | Float[Tensor, "query 1"],
) -> Float[Tensor, "query k"]:
    """Return each neighbor's log share of the vote, log softmax(−d²/T).

    Khandelwal et al. 2020, eq. 2. temperature: one T, or one for each query. The exponentials of a
    row sum to one; a row without a neighbor is −inf throughout.
    """
    # the nearest is subtracted before the division, which would cost digits of large distances
    squared_distances = squared_distances.float()
    nearest = squared_distances.amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    energies = (nearest - squared_distances) / temperature
    return energies - energies.logsumexp(dim=1, keepdim=True).nan_to_num(neginf=0.0)


def target_knn_log_probs(
    log_weights: Float[Tensor, "query k"], votes_for_target: Bool[Tensor, "query k"]
) -> Float[Tensor, " query"]:
    """Return log p_kNN(target): the log weight of the neighbors whose value is the target.

    −inf where no neighbor has it. Builds no tensor of the vocabulary's size.
    """
    return log_weights.masked_fill(~votes_for_target, -torch.inf).logsumexp(dim=1)


class TargetVotes(NamedTuple):
    """One component's log p_kNN of one target of each query, and its weight λ; see `Votes`."""

    log_probs: Float[Tensor, " query"]
    lmbda: Float[Tensor, " query"]


class TokenVotes(NamedTuple):
    """One component's log p_kNN of each (query, token) that got a vote, once; see `Votes`."""

    queries: Int[Tensor, " vote"]
    tokens: Int[Tensor, " vote"]
    log_probs: Float[Tensor, " vote"]
    lmbda: Float[Tensor, " query"]


class Votes(NamedTuple):
    """One component of the mixture: what its neighbors vote for, and how much that counts.

    log_weights: see `neighbor_log_weights`. tokens: see `Voters`. lmbda: its weight λ; 0 where no
    neighbor is present, so that the LM keeps that weight.
    """

    log_weights: Float[Tensor, "query k"]
    tokens: Int[Tensor, "query k"]
    lmbda: Float[Tensor, " query"]

    def for_targets(self, targets: Int[Tensor, " query"]) -> TargetVotes:
        """Return the votes for one target of each query."""
        log_probs = target_knn_log_probs(self.log_weights, self.tokens == targets[:, None])
        return TargetVotes(log_probs, self.lmbda)

    def by_token(self) -> TokenVotes:
        """Return the votes for every token."""
        queries, tokens, log_probs = sum_by_token(self.log_weights[None], self.tokens)
        return TokenVotes(queries, tokens, log_probs[0], self.lmbda)


def vote(voters: Voters, temperature: float, lmbda: float | Float[Tensor, " query"]) -> Votes:
    """Let voters vote with one temperature and a given weight λ."""
    log_weights = neighbor_log_weights(voters.squared_distances, temperature)
    return Votes(log_weights, voters.tokens, voters.present.float() * lmbda)


def interpolate(
    lm_log_probs: Float[Tensor, " query"], components: Sequence[TargetVotes]
) -> Float[Tensor, " query"]:
    """Return log(Σ λ_i p_kNN,i + (1 − Σ λ_i) p_LM) of each query's target.

    With one component this is eq. 3 of Khandelwal et al. 2020. Where all λ are 0, the result is
    `lm_log_probs` to the bit; where one λ is 1, that component's log_probs.
    """
    mixed = lm_log_probs + _log_lm_weight(lm_log_probs, components)
    for component in components:
        mixed = torch.logaddexp(mixed, component.log_probs + component.lmbda.log())
    return mixed


def interpolate_vocabulary(
    lm_log_probs: Float[Tensor, "query vocab"], components: Sequence[TokenVotes]
) -> Float[Tensor, "query vocab"]:
    """Return what `interpolate` returns, for every token.

    Only tokens with votes cost more than one addition.
    """
    mixed = lm_log_probs + _log_lm_weight(lm_log_probs, components)[:, None]
    for votes in components:
        own = mixed[votes.queries, votes.tokens]
        voted = votes.log_probs + votes.lmbda.log()[votes.queries]
        mixed[votes.queries, votes.tokens] = torch.logaddexp(own, voted)
    return mixed


def _log_lm_weight(
    lm_log_probs: Float[Tensor, "query *vocab"],
    components: Sequence[TargetVotes] | Sequence[TokenVotes],
) -> Float[Tensor, " query"]:
    total = lm_log_probs.new_zeros(len(lm_log_probs))
    for component in components:
        total = total + component.lmbda
    return torch.log1p(-total.clamp_max(1.0))  # rounded weights may add up to more


class TokenGroups(NamedTuple):
    """Each query's tokens in ascending order; equal ones, a group, keep their order.

    order: the column that each came from. first: whether it begins a group. group: its number.
    """

    tokens: Int[Tensor, "query k"]
    order: Int[Tensor, "query k"]
    first: Bool[Tensor, "query k"]
    group: Int[Tensor, "query k"]


def group_by_token(tokens: Int[Tensor, "query k"]) -> TokenGroups:
    """Put each query's equal tokens next to each other."""
    tokens, order = tokens.sort(dim=1, stable=True)
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    return TokenGroups(tokens, order, first, first.cumsum(dim=1) - 1)


class TokenSums(NamedTuple):
    """Log p_kNN of each (query, token) that got a vote, once, for each way to weigh the voters."""

    queries: Int[Tensor, " vote"]
    tokens: Int[Tensor, " vote"]
    log_probs: Float[Tensor, "way vote"]


def sum_by_token(
    log_weights: Float[Tensor, "way query k"], tokens: Int[Tensor, "query k"]
) -> TokenSums:
    """Sum the weights of each query's tokens; a token without weight in any way is left out.

    A log-sum-exp for each token, so that a vote too small for float32 still has its logarithm.
    """
    tokens, order, first, group = group_by_token(tokens.long())
    order, group = order.expand_as(log_weights), group.expand_as(log_weights)
    log_weights = log_weights.gather(2, order)
    heaviest = torch.full_like(log_weights, -torch.inf)
    heaviest.scatter_reduce_(2, group, log_weights, reduce="amax")
    relative = (log_weights - heaviest.gather(2, group)).nan_to_num(nan=-torch.inf).exp()
    summed = torch.zeros_like(log_weights).scatter_add_(2, group, relative).log() + heaviest
    log_probs = summed.gather(2, group)
    voted = (log_probs > -torch.inf).any(dim=0)
    queries, places = torch.nonzero(first & voted, as_tuple=True)
    return TokenSums(queries, tokens[queries, places], log_probs[:, queries, places])
