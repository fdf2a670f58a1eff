"""Windows → the model's log-probability and the neighbors of every new token.

One search of many queries serves the perplexity, the tuning and the explanations; the mixture is
made later, from what is found here.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.index.protocol import Neighbors
from knnlm.language_model import LanguageModel
from knnlm.memory import Memory
from knnlm.mixture.interpolation import interpolate
from knnlm.reading import default_batch_tokens, read_scores
from knnlm.windows import Window

QUERIES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model and the datastore say of each new token of some windows, in order.

    lm_log_probs: log p_LM of the token. neighbors: of the key that precedes it, in each memory that
    was searched. lm_seconds, search_seconds: what it took.
    """

    windows: list[Window]
    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    neighbors: tuple[Neighbors, ...]
    lm_seconds: float
    search_seconds: float


def score_windows(
    lm: LanguageModel,
    windows: Iterable[Window],
    memories: Sequence[Memory],
    batch_tokens: int | None = None,
) -> Iterator[Scores]:
    """Yield the scores of consecutive windows, some thousands of tokens at a time.

    Every memory is searched, whatever its λ.
    """
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(window.new for window in group) >= QUERIES_AT_ONCE:
            yield _score(lm, group, memories, batch_tokens)
            group = []
    if group:
        yield _score(lm, group, memories, batch_tokens)


def _score(
    lm: LanguageModel,
    windows: list[Window],
    memories: Sequence[Memory],
    batch_tokens: int | None,
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
    neighbors = tuple(memory.search(queries) for memory in memories)
    searched = time.perf_counter()
    return Scores(windows, targets, log_probs, neighbors, read - started, searched - read)


def mixed_log_probs(scores: Scores, memories: Sequence[Memory]) -> Float[Tensor, " token"]:
    """Return log p of each scored token under the mixture of the memories that were searched."""
    components = [
        memory.vote(neighbors).for_targets(scores.targets)
        for memory, neighbors in zip(memories, scores.neighbors, strict=True)
    ]
    return interpolate(scores.lm_log_probs, components)
