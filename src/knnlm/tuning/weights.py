"""Fitting the λ of several components together, from what each gives to the true tokens.

The numbers are ratios r = p / p_LM of the true token under each component. A mixture of them gives
log p − log p_LM = log(1 + Σ λ_i (r_i − 1)), which is concave in the λ.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knnlm.evaluation.tally import perplexity_of
from knnlm.mixture.interpolation import neighbor_log_weights, target_knn_log_probs
from knnlm.mixture.parameters import Parameters
from knnlm.tuning.held_out import TargetNeighbors

_STEPS = 300
_LARGEST_LOG_RATIO = 600.0


def relative_probs(
    log_probs: Float[Tensor, " token"],
    lm_log_probs: Float[Tensor, " token"],
    present: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Return p / p_LM in float64, 1 where nobody votes."""
    ratios = (log_probs.double() - lm_log_probs.double()).clamp_max(_LARGEST_LOG_RATIO).exp()
    return ratios.where(present, 1.0)


def knn_ratios(neighbors: TargetNeighbors, temperature: float) -> Float[Tensor, " token"]:
    """Return p_kNN / p_LM of the true tokens in float64, 1 where there is no neighbor."""
    log_weights = neighbor_log_weights(neighbors.squared_distances, temperature)
    log_probs = target_knn_log_probs(log_weights, neighbors.votes)
    present = neighbors.squared_distances[:, 0].isfinite()
    return relative_probs(log_probs, neighbors.lm_log_probs, present)


def log_gains(
    ratios: Float[Tensor, "token component"], lmbdas: float | Sequence[float] | Tensor
) -> Float[Tensor, " token"]:
    """Return log p − log p_LM of each token in a mixture.

    ratios: p / p_LM under each component. lmbdas: λ of each component; as a tensor, of each token.
    """
    lmbdas = torch.as_tensor(lmbdas, dtype=torch.float64)
    return ((ratios - 1) * lmbdas).sum(dim=1).log1p()


def fit_weights(ratios: Float[Tensor, "token component"], steps: int = _STEPS) -> list[float]:
    """Return the λ of each component that together fit best, in steps of 0.001.

    ratios: see `log_gains`. The likelihood of a mixture is concave in its weights, so
    expectation-maximization finds the best.
    """
    relative = torch.cat([torch.ones(len(ratios), 1, dtype=torch.float64), ratios.double()], dim=1)
    weights = torch.full((relative.shape[1],), 1 / relative.shape[1], dtype=torch.float64)
    for _ in range(steps):
        # components' shares of each token: w_i r_i / Σ w_j r_j
        weights = weights * (relative / (relative @ weights)[:, None]).mean(dim=0)
    return [float(lmbda) for lmbda in ((weights[1:] * 1000).floor() / 1000).tolist()]


def fit_lmbdas(
    neighbors: Sequence[TargetNeighbors], parameters: Sequence[Parameters]
) -> tuple[tuple[Parameters, ...], float]:
    """Return each datastore's parameters with the λ that together fit best, and the perplexity."""
    ratios = torch.stack(
        [
            knn_ratios(own.nearest(given.k), given.temperature)
            for own, given in zip(neighbors, parameters, strict=True)
        ],
        dim=1,
    )
    lmbdas = fit_weights(ratios)
    lm_log_probs = neighbors[0].lm_log_probs.double()
    chosen = tuple(
        replace(given, lmbda=lmbda) for given, lmbda in zip(parameters, lmbdas, strict=True)
    )
    return chosen, perplexity_of(-float(lm_log_probs.mean() + log_gains(ratios, lmbdas).mean()))
