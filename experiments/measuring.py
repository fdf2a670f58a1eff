"""What a held-out text's tokens get from the LM, from neighbors, and from a mixture of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.mixture.features import LMSummary, Voters
from knnlm.mixture.interpolation import (
    Component,
    interpolate,
    neighbor_log_weights,
    target_knn_log_probs,
)
from knnlm.mixture.parameters import Parameters
from knnlm.tuning import CachedNeighbors, fit_lmbdas

PAPERS_RECIPE = Parameters(k=1024, lmbda=0.25, temperature=1.0)
_BLOCK = 256  # consecutive tokens are alike, so that they are drawn together
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the language model says of each token of a text, in order.

    keys: what a datastore is searched with. inputs: the token that each position reads. documents:
    the number of each token's document. words: separated by white space. digest: of all that made
    it.
    """

    keys: Float[Tensor, "token dim"]
    inputs: Int[Tensor, " token"]
    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    lm: LMSummary
    documents: Int[Tensor, " token"]
    words: int
    digest: str

    def __len__(self) -> int:
        return len(self.targets)


def cached(held_out: HeldOut, voters: Voters) -> CachedNeighbors:
    """Return what a sweep needs."""
    votes = voters.tokens == held_out.targets[:, None]
    return CachedNeighbors(held_out.lm_log_probs, voters.squared_distances, votes)


def component(neighbors: CachedNeighbors, parameters: Parameters) -> Component:
    """Return what the k nearest neighbors give to the true tokens."""
    distances = neighbors.squared_distances[:, : parameters.k]
    log_weights = neighbor_log_weights(distances, parameters.temperature)
    log_probs = target_knn_log_probs(log_weights, neighbors.votes[:, : parameters.k])
    return Component(log_probs, parameters.lmbda, distances[:, 0].isfinite())


def mixed(neighbors: CachedNeighbors, parameters: Parameters) -> Float[Tensor, " token"]:
    """Return the true tokens' log p under the mixture of the LM and one datastore."""
    return interpolate(neighbors.lm_log_probs, [component(neighbors, parameters)])


def papers_recipe(valid: CachedNeighbors) -> Parameters:
    """Return k 1024, T 1 and the λ that suits validation text, as Khandelwal et al. 2020 do."""
    given = replace(PAPERS_RECIPE, k=min(PAPERS_RECIPE.k, valid.squared_distances.shape[1]))
    return fit_lmbdas([valid], [given])[0][0]


def perplexity(log_probs: Float[Tensor, " token"]) -> float:
    """Return the perplexity of tokens."""
    return math.exp(-float(log_probs.double().mean()))


def measure(held_out: HeldOut, log_probs: Float[Tensor, " token"]) -> dict[str, Any]:
    """Return perplexity of tokens and of words, and the relative change from the LM alone.

    change_interval: 95 %, by a bootstrap over blocks of 256 consecutive tokens.
    """
    gains = (log_probs.double() - held_out.lm_log_probs.double()).numpy()
    starts = range(0, len(gains), _BLOCK)
    sums = np.array([gains[start : start + _BLOCK].sum() for start in starts])
    sizes = np.array([len(gains[start : start + _BLOCK]) for start in starts])
    drawn = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))
    changes = np.exp(-sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)) - 1
    return {
        "perplexity": perplexity(log_probs),
        "word_perplexity": math.exp(min(-float(log_probs.double().sum()) / held_out.words, 700)),
        "change": math.exp(-gains.mean()) - 1,
        "change_interval": np.quantile(changes, [0.025, 0.975]).tolist(),
    }


def groups(
    held_out: HeldOut, log_probs: Float[Tensor, " token"], masks: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Return perplexity and its relative change in each group of tokens that has any."""
    gains = log_probs.double() - held_out.lm_log_probs.double()
    total = float(gains.sum())
    return {
        name: {
            "tokens": int(mask.sum()),
            "lm_perplexity": perplexity(held_out.lm_log_probs[mask]),
            "knn_perplexity": perplexity(log_probs[mask]),
            "change": math.exp(-float(gains[mask].mean())) - 1,
            "share_of_gain": float(gains[mask].sum()) / total,
        }
        for name, mask in masks.items()
        if mask.any()
    }


def percent(change: float) -> str:
    """Write a relative change."""
    return f"{100 * change:+.1f} %".replace("-", "−")


def join_voters(parts: Sequence[Voters]) -> Voters:
    """Return the voters of consecutive queries."""
    return Voters(*(torch.cat(column) for column in zip(*parts, strict=True)))
