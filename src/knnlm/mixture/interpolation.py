"""Neighbors → log p_kNN → mixture, of one target a query and of the whole vocabulary.

Everything is in natural-log space and float32. Only squared distances enter p_kNN; an absent
neighbor (distance +inf) weighs nothing, and a query without any neighbor keeps p_LM.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def neighbor_log_weights(
    squared_distances: Float[Tensor, "query k"],
    temperature: float | Float[Tensor, "query 1"],
) -> Float[Tensor, "query k"]:
    """Return each neighbor's log share of the vote, log softmax(−d²/T).

    temperature: one T, or one for each query. Khandelwal et al. 2020, eq. 2. Rows sum to one in
    probability; rows without a neighbor are all −inf.
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

    −inf where no neighbor has it. Never builds a [query × vocabulary] tensor.
    """
    return log_weights.masked_fill(~votes_for_target, -torch.inf).logsumexp(dim=1)


class Component(NamedTuple):
    """What one datastore says of a target for each query, and how much that counts.

    lmbda: its weight λ, of all queries or of each. present: where it has a neighbor, and so a say,
    at all.
    """

    log_probs: Float[Tensor, " query"]
    lmbda: float | Float[Tensor, " query"]
    present: Bool[Tensor, " query"]


class Votes(NamedTuple):
    """What the neighbors in one datastore vote for, and how much that counts; see `Component`.

    log_weights: of `neighbor_log_weights`. tokens: what each votes for, any where it is absent.
    """

    log_weights: Float[Tensor, "query k"]
    tokens: Int[Tensor, "query k"]
    lmbda: float | Float[Tensor, " query"]
    present: Bool[Tensor, " query"]

    def for_targets(self, targets: Int[Tensor, " query"]) -> Component:
        """Return what they say of one target a query."""
        log_probs = target_knn_log_probs(self.log_weights, self.tokens == targets[:, None])
        return Component(log_probs, self.lmbda, self.present)

    def by_token(self) -> "TokenVotes":
        """Return what each token was given."""
        queries, tokens, log_probs = sum_by_token(self.log_weights[None], self.tokens)
        return TokenVotes(queries, tokens, log_probs[0], self.lmbda, self.present)


class TokenVotes(NamedTuple):
    """What each token was given by the neighbors in one datastore; see `Votes`.

    queries, tokens: each pair that was voted for, once; log_probs: log p_kNN of it.
    """

    queries: Int[Tensor, " vote"]
    tokens: Int[Tensor, " vote"]
    log_probs: Float[Tensor, " vote"]
    lmbda: float | Float[Tensor, " query"]
    present: Bool[Tensor, " query"]


def interpolate(
    lm_log_probs: Float[Tensor, " query"], components: Sequence[Component]
) -> Float[Tensor, " query"]:
    """Return log(Σ λ_i p_kNN,i + (1 − Σ λ_i) p_LM) of each query's target.

    Khandelwal et al. 2020, eq. 3, for one i. Where all λ are 0, or no component is present,
    `lm_log_probs` come out to the bit; where one λ is 1, that component's. A component that is
    absent leaves its weight to the LM.
    """
    log_lmbdas, log_rest = _log_shares(lm_log_probs, components)
    mixed = lm_log_probs + log_rest
    for component, log_lmbda in zip(components, log_lmbdas, strict=True):
        mixed = torch.logaddexp(mixed, component.log_probs + log_lmbda)
    return mixed


def interpolate_vocabulary(
    lm_log_probs: Float[Tensor, "query vocab"], components: Sequence[TokenVotes]
) -> Float[Tensor, "query vocab"]:
    """Return what `interpolate` does, of every token.

    Beyond one pass over the vocabulary, only tokens that were voted for are computed.
    """
    log_lmbdas, log_rest = _log_shares(lm_log_probs, components)
    mixed = lm_log_probs + log_rest[:, None]
    for votes, log_lmbda in zip(components, log_lmbdas, strict=True):
        own = mixed[votes.queries, votes.tokens]
        voted = votes.log_probs + log_lmbda[votes.queries]
        mixed[votes.queries, votes.tokens] = torch.logaddexp(own, voted)
    return mixed


def _log_shares(
    lm_log_probs: Float[Tensor, "query *vocab"],
    components: Sequence[Component] | Sequence[TokenVotes],
) -> tuple[list[Float[Tensor, " query"]], Float[Tensor, " query"]]:
    """Return log λ of each component, −inf where it is absent, and the logarithm of the rest."""
    total = lm_log_probs.new_zeros(len(lm_log_probs))
    log_lmbdas = []
    for component in components:
        lmbda = torch.as_tensor(component.lmbda, dtype=total.dtype, device=total.device)
        lmbda = torch.where(component.present, lmbda, torch.zeros_like(lmbda))
        log_lmbdas.append(lmbda.log())
        total = total + lmbda
    return log_lmbdas, torch.log1p(-total.clamp_max(1.0))  # rounded weights may add up to more


class TokenGroups(NamedTuple):
    """Each query's tokens in ascending order, equal ones in their old order.

    order: where each stood. first: whether it begins a group of equal ones. group: its number.
    """

    tokens: Int[Tensor, "query k"]
    order: Int[Tensor, "query k"]
    first: Bool[Tensor, "query k"]
    group: Int[Tensor, "query k"]


def group_by_token(tokens: Int[Tensor, "query k"]) -> TokenGroups:
    """Put each query's equal tokens side by side."""
    tokens, order = tokens.sort(dim=1, stable=True)
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    return TokenGroups(tokens, order, first, first.cumsum(dim=1) - 1)


class TokenSums(NamedTuple):
    """What each token was given by the same neighbors, weighed in one or several ways.

    queries, tokens: each pair that was voted for, once; log_probs: log p_kNN of it, each way.
    """

    queries: Int[Tensor, " vote"]
    tokens: Int[Tensor, " vote"]
    log_probs: Float[Tensor, "way vote"]


def sum_by_token(
    log_weights: Float[Tensor, "way query k"], tokens: Int[Tensor, "query k"]
) -> TokenSums:
    """Sum the weights of each query's tokens; without weight in any way, a token is left out.

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
