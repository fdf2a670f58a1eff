"""Predictions of held-out tokens by the LM, by neighbors, and by a mixture of them."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.evaluation.tally import BLOCK, FEWEST_DOCUMENTS, bootstrap, perplexity_of
from knnlm.mixture.interpolation import (
    TargetVotes,
    Voters,
    interpolate,
    neighbor_log_weights,
    target_knn_log_probs,
)
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.parameters import Parameters
from knnlm.tuning.held_out import TargetNeighbors
from knnlm.tuning.weights import fit_lmbdas

PAPERS_RECIPE = Parameters(k=1024, lmbda=0.25, temperature=1.0)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The language model's predictions of each token of a text, in order.

    keys: the queries to search a datastore with. inputs: the token read at each position.
    documents: the number of each token's document. words: number of words, separated by white
    space. size_bytes: of the text in UTF-8. digest: identifies the model, text and windows.
    """

    keys: Float[Tensor, "token dim"]
    inputs: Int[Tensor, " token"]
    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    lm: LMSummary
    documents: Int[Tensor, " token"]
    words: int
    size_bytes: int
    digest: str

    def __len__(self) -> int:
        return len(self.targets)


def target_neighbors(held_out: HeldOut, voters: Voters) -> TargetNeighbors:
    """Return a datastore's neighbors as a sweep needs them."""
    votes = voters.tokens == held_out.targets[:, None]
    return TargetNeighbors(held_out.lm_log_probs, voters.squared_distances, votes)


def component(neighbors: TargetNeighbors, parameters: Parameters) -> TargetVotes:
    """Return the votes of the k nearest neighbors for the true tokens."""
    nearest = neighbors.nearest(parameters.k)
    log_weights = neighbor_log_weights(nearest.squared_distances, parameters.temperature)
    log_probs = target_knn_log_probs(log_weights, nearest.votes)
    present = nearest.squared_distances[:, 0].isfinite()
    return TargetVotes(log_probs, parameters.lmbda * present.float())


def mixed(neighbors: TargetNeighbors, parameters: Parameters) -> Float[Tensor, " token"]:
    """Return the true tokens' log p under the mixture of the LM and one datastore."""
    return interpolate(neighbors.lm_log_probs, [component(neighbors, parameters)])


def papers_recipe(valid: TargetNeighbors) -> Parameters:
    """Return k 1024, T 1 and the λ that suits validation text, as Khandelwal et al. 2020 do."""
    given = replace(PAPERS_RECIPE, k=min(PAPERS_RECIPE.k, valid.squared_distances.shape[1]))
    return fit_lmbdas([valid], [given])[0][0]


def perplexity(log_probs: Float[Tensor, " token"]) -> float:
    """Return the perplexity of tokens."""
    return perplexity_of(-float(log_probs.double().mean()))


def measure(held_out: HeldOut, log_probs: Float[Tensor, " token"]) -> dict[str, Any]:
    """Return perplexity per token and per word, bits per byte, and the change from the LM alone.

    change_error, change_interval: standard error and 95 % interval of the change, by a bootstrap
    over documents, or over blocks of 256 consecutive tokens if there are fewer than ten documents.
    """
    drawn_from, part_of_token = "documents", held_out.documents.numpy()
    if len(np.unique(part_of_token)) < FEWEST_DOCUMENTS:
        drawn_from = f"blocks of {BLOCK} tokens"
        part_of_token = np.arange(len(held_out)) // BLOCK
    nats = -log_probs.double()
    more_nats = nats + held_out.lm_log_probs.double()  # compared to the LM
    _, part, tokens = np.unique(part_of_token, return_inverse=True, return_counts=True)
    of_parts = np.bincount(part, more_nats.numpy()).astype(np.float64)[:, None]
    changes = np.exp(bootstrap(of_parts, tokens.astype(np.float64))[:, 0]) - 1
    total_nats = float(nats.sum())
    return {
        "perplexity": perplexity(log_probs),
        "word_perplexity": perplexity_of(total_nats / held_out.words),
        "bits_per_byte": total_nats / math.log(2) / held_out.size_bytes,
        "change": math.exp(float(more_nats.mean())) - 1,
        "change_error": float(changes.std(ddof=1)),
        "change_interval": np.quantile(changes, [0.025, 0.975]).tolist(),
        "drawn_from": drawn_from,
    }


def groups(
    held_out: HeldOut, log_probs: Float[Tensor, " token"], masks: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Return perplexity and its relative change for each group of tokens that is not empty."""
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


def frequencies(store: Datastore, held_out: HeldOut) -> dict[str, Bool[Tensor, " token"]]:
    """Group tokens by their frequency in a datastore: never, 1 to 9 times, and so on."""
    tokens = held_out.targets.long()
    counts = torch.bincount(store.values, minlength=int(tokens.max()) + 1)[tokens]
    powers = [10**power for power in range(7)]
    return {"0": counts == 0} | {
        f"{least:,}–{above - 1:,}": (counts >= least) & (counts < above)
        for least, above in pairwise(powers)
    }


def percent(change: float) -> str:
    """Format a relative change as a percentage."""
    return f"{100 * change:+.1f} %".replace("-", "−")
