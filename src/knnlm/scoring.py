"""Windows → the model's log-probability and the neighbors of every new token.

One search of many queries serves the perplexity, the tuning and the explanations; the mixture is
made later, from what is found here.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.protocol import Index, Neighbors
from knnlm.language_model import LanguageModel
from knnlm.mixture.interpolation import (
    interpolate,
    neighbor_log_weights,
    target_knn_log_probs,
)
from knnlm.mixture.parameters import Parameters
from knnlm.reading import default_batch_tokens, read_scores
from knnlm.windows import Window

QUERIES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model and the datastore say of each new token of some windows, in order.

    lm_log_probs: log p_LM of the token. neighbors: of the key that precedes it; None where no
    search was asked for. lm_seconds, search_seconds: what it took.
    """

    windows: list[Window]
    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    neighbors: Neighbors | None
    lm_seconds: float
    search_seconds: float


def score_windows(
    lm: LanguageModel,
    windows: Iterable[Window],
    index: Index | None,
    k: int,
    batch_tokens: int | None = None,
) -> Iterator[Scores]:
    """Yield the scores of consecutive windows, some thousands of tokens at a time."""
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(window.new for window in group) >= QUERIES_AT_ONCE:
            yield _score(lm, group, index, k, batch_tokens)
            group = []
    if group:
        yield _score(lm, group, index, k, batch_tokens)


def _score(
    lm: LanguageModel, windows: list[Window], index: Index | None, k: int, batch_tokens: int | None
) -> Scores:
    started = time.perf_counter()
    targets = torch.from_numpy(np.concatenate([window.targets for window in windows]))
    starts = np.cumsum([0] + [window.new for window in windows]).tolist()
    log_probs = torch.empty(len(targets))
    queries = torch.empty(len(targets), lm.dimension)
    for scores in read_scores(lm, windows, batch_tokens or default_batch_tokens(lm)):
        new = slice(starts[scores.number], starts[scores.number + 1])
        log_probs[new], queries[new] = scores.log_probs, scores.keys
    read = time.perf_counter()
    neighbors = None if index is None else index.search(queries, k)
    searched = time.perf_counter()
    return Scores(windows, targets, log_probs, neighbors, read - started, searched - read)


def votes_for_targets(
    store: Datastore, neighbors: Neighbors, targets: Int[Tensor, " query"]
) -> Bool[Tensor, "query k"]:
    """Return which neighbors have the query's target as their value."""
    values = store.values[neighbors.rows.clamp_min(0)]
    return (values == targets[:, None]) & neighbors.present


def mixed_log_probs(
    scores: Scores, store: Datastore, parameters: Parameters
) -> Float[Tensor, " token"]:
    """Return log p of each scored token under the mixture."""
    if scores.neighbors is None:
        return scores.lm_log_probs
    knn = target_knn_log_probs(
        neighbor_log_weights(scores.neighbors.squared_distances, parameters.temperature),
        votes_for_targets(store, scores.neighbors, scores.targets),
    )
    present = scores.neighbors.present.any(dim=1)
    return interpolate(scores.lm_log_probs, knn, parameters.lmbda, present)
