"""Fitting λ by the distance of the nearest neighbor (Drozdov et al. 2022)."""

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.mixture.by_distance import BucketedLambda
from knnlm.mixture.interpolation import LEAST_LM_WEIGHT
from knnlm.tuning.weights import log_gains

_BUCKETS = 16
_BISECTIONS = 30
_NEGLIGIBLE = 1e-6
_BLOCKS = 5  # of the text, each of which is held out once


def fit_by_distance(
    nearest: Float[Tensor, " token"],
    lm_log_probs: Float[Tensor, " token"],
    ratios: Float[Tensor, " token"],
) -> tuple[BucketedLambda, Float[Tensor, " token"]]:
    """Fit λ to a text; also return log p of each token, with λ fitted to the other blocks.

    nearest: squared distances. lm_log_probs: log p_LM of the true tokens, ratios: their
    p_kNN / p_LM.
    """
    knn_log_probs = lm_log_probs.double() + ratios.log()
    held_out_log_probs = torch.empty(len(nearest), dtype=torch.float64)
    block = torch.arange(len(nearest)) * _BLOCKS // len(nearest)
    for number in range(_BLOCKS):
        held_out, rest = block == number, block != number
        fitted = fit_buckets(nearest[rest], lm_log_probs[rest], knn_log_probs[rest])
        lmbdas = fitted(nearest[held_out, None])
        gains = log_gains(ratios[held_out, None], lmbdas[:, None])
        held_out_log_probs[held_out] = lm_log_probs[held_out] + gains
    return fit_buckets(nearest, lm_log_probs, knn_log_probs), held_out_log_probs


def fit_buckets(
    nearest: Float[Tensor, " token"],
    lm_log_probs: Float[Tensor, " token"],
    knn_log_probs: Float[Tensor, " token"],
    buckets: int = _BUCKETS,
) -> BucketedLambda:
    """Cut nearest squared distances into ranges with equally many tokens; find each one's best λ.

    Tokens without a neighbor (+inf) are left out. log p of a mixture is concave in λ, so that the
    best λ is where its slope is 0, or an end of [0, 1].
    """
    present = nearest.isfinite()
    nearest = nearest[present]
    if len(nearest) == 0:
        return BucketedLambda(torch.empty(0), torch.zeros(1))
    quantiles = torch.arange(1, buckets) / buckets
    edges = torch.unique(nearest.sort().values[(quantiles * len(nearest)).long()])
    bucket = torch.bucketize(nearest, edges)
    lm_probs = lm_log_probs[present].double().exp()
    difference = knn_log_probs[present].double().exp() - lm_probs
    low = torch.zeros(len(edges) + 1, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        slopes = difference / (lm_probs + middle[bucket] * difference).clamp_min(1e-300)
        rises = torch.zeros_like(low).index_add_(0, bucket, slopes) > 0
        low, high = middle.where(rises, low), high.where(rises, middle)
    lmbdas = ((low + high) / 2).clamp_max(1 - LEAST_LM_WEIGHT)
    # an end of [0, 1] is approached, not reached
    return BucketedLambda(edges, lmbdas.masked_fill(lmbdas < _NEGLIGIBLE, 0.0).float())
