"""Neighbors → log p_kNN → mixture, sparse (one target a query) and dense (whole vocabulary).

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


def dense_knn_log_probs(
    log_weights: Float[Tensor, "query k"],
    neighbor_values: Int[Tensor, "query k"],
    vocab_size: int,
) -> Float[Tensor, "query vocab"]:
    """Return log p_kNN over the vocabulary; −inf for every token that no neighbor voted for.

    A log-sum-exp for each token, so that a vote too small for float32 still has its logarithm.
    """
    tokens = neighbor_values.long()
    shape = (log_weights.shape[0], vocab_size)
    heaviest = log_weights.new_full(shape, -torch.inf)
    heaviest.scatter_reduce_(1, tokens, log_weights, reduce="amax")
    own_heaviest = heaviest.gather(1, tokens)  # (query, k)
    relative = torch.where(log_weights.isneginf(), log_weights, log_weights - own_heaviest).exp()
    return torch.zeros_like(heaviest).scatter_add_(1, tokens, relative).log() + heaviest


class Component(NamedTuple):
    """What one datastore says of each query's next token, and how much that counts.

    log_probs: log p_kNN, of one token a query or of the whole vocabulary. lmbda: its weight λ, of
    all queries or of each. present: where it has a neighbor, and so a say, at all.
    """

    log_probs: Float[Tensor, "query *vocab"]
    lmbda: float | Float[Tensor, " query"]
    present: Bool[Tensor, " query"]


def interpolate(
    lm_log_probs: Float[Tensor, "query *vocab"], components: Sequence[Component]
) -> Float[Tensor, "query *vocab"]:
    """Return log(Σ λ_i p_kNN,i + (1 − Σ λ_i) p_LM) (Khandelwal et al. 2020, eq. 3, for one i).

    Where all λ are 0, or no component is present, `lm_log_probs` come out to the bit; where one λ
    is 1, that component's. A component that is absent leaves its weight to the LM.
    """
    total = lm_log_probs.new_zeros(len(lm_log_probs))
    weights = []
    for component in components:
        lmbda = torch.as_tensor(component.lmbda, dtype=total.dtype, device=total.device)
        weights.append(torch.where(component.present, lmbda, torch.zeros_like(lmbda)))
        total = total + weights[-1]
    shape = (-1, *(1,) * (lm_log_probs.dim() - 1))
    # the sum of rounded weights may pass 1 by a rounding
    mixed = lm_log_probs + torch.log1p(-total.clamp_max(1.0)).reshape(shape)
    for component, weight in zip(components, weights, strict=True):
        mixed = torch.logaddexp(mixed, component.log_probs + weight.log().reshape(shape))
    return mixed
