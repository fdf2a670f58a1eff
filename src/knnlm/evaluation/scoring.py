"""Windows → the model's log-probability and the neighbors of every new token.

One search of many queries serves the perplexity, the tuning and the explanations; the mixture is
made later, from what is found here.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.choices import Boundary, Similarity
from knnlm.index.protocol import Neighbors
from knnlm.mixture.continuous_cache import CacheNeighbors, ContinuousCache, join_cache_neighbors
from knnlm.mixture.interpolation import interpolate
from knnlm.mixture.lm_summary import LMSummary
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import default_batch_tokens, read_scores
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever
from knnlm.text.windows import Window

QUERIES_AT_ONCE = 4096


class CacheRequest(NamedTuple):
    """What continuous caches of several sizes are asked for: the k most similar pairs.

    boundary: "document" to begin anew with each document, "stream" to remember what came before.
    """

    sizes: tuple[int, ...]
    k: int
    similarity: str = Similarity.distance
    boundary: str = Boundary.document


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be found of each token beside the model's log-probability.

    retrievers: which are searched, whatever their λ. recall: what the continuous cache is asked
    for. summary: whether the model's whole distribution is described.
    """

    retrievers: tuple[Retriever, ...]
    recall: CacheRequest | None = None
    summary: bool = False

    @classmethod
    def by(cls, mixer: Mixer, boundary: str) -> "Wanted":
        """Return what a mixer needs."""
        recall = None
        if mixer.uses_cache:
            assert mixer.cache is not None
            cache = mixer.cache
            recall = CacheRequest((cache.size,), cache.votes.k, cache.similarity, boundary)
        return cls(mixer.searched, recall, mixer.gate is not None)


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model and the datastores say of each new token of some windows, in order.

    lm_log_probs: log p_LM of the token. neighbors: of the key that precedes it, in each datastore
    that was searched. cache_neighbors: of each size of the continuous cache that was asked for.
    lm: if wanted. lm_seconds, search_seconds: what it took, the continuous cache among the search.
    """

    windows: list[Window]
    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    neighbors: tuple[Neighbors, ...]
    cache_neighbors: tuple[CacheNeighbors, ...] = ()
    lm: LMSummary | None = None
    lm_seconds: float = 0.0
    search_seconds: float = 0.0


def score_windows(
    lm: LanguageModel,
    windows: Iterable[Window],
    wanted: Wanted,
    batch_tokens: int | None = None,
) -> Iterator[Scores]:
    """Yield the scores of consecutive windows, some thousands of tokens at a time."""
    scorer = _Scorer(lm, wanted, batch_tokens or default_batch_tokens(lm))
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(window.new for window in group) >= QUERIES_AT_ONCE:
            yield scorer.score(group)
            group = []
    if group:
        yield scorer.score(group)


class _Scorer:
    def __init__(self, lm: LanguageModel, wanted: Wanted, batch_tokens: int) -> None:
        self._lm = lm
        self._wanted = wanted
        self._batch_tokens = batch_tokens
        self._document = -1
        self._cache: ContinuousCache | None = None

    def score(self, windows: list[Window]) -> Scores:
        lm, wanted = self._lm, self._wanted
        started = time.perf_counter()
        targets = torch.from_numpy(np.concatenate([window.targets for window in windows]))
        starts = np.cumsum([0] + [window.new for window in windows]).tolist()
        log_probs = torch.empty(len(targets))
        queries = torch.empty(len(targets), lm.dimension)
        summaries: dict[int, LMSummary] = {}
        for scores in read_scores(lm, windows, self._batch_tokens, wanted.summary):
            new = slice(starts[scores.number], starts[scores.number + 1])
            log_probs[new], queries[new] = scores.log_probs, scores.keys
            if scores.summary is not None:
                summaries[scores.number] = scores.summary.cpu()
        summary = None
        if wanted.summary:
            summary = LMSummary.join([summaries[number] for number in range(len(windows))])
        read = time.perf_counter()
        neighbors = tuple(retriever.search(queries) for retriever in wanted.retrievers)
        cache_neighbors = self._recall(
            windows, torch.split(queries, [window.new for window in windows])
        )
        searched = time.perf_counter()
        return Scores(
            windows,
            targets,
            log_probs,
            neighbors,
            cache_neighbors,
            summary,
            read - started,
            searched - read,
        )

    def _recall(
        self, windows: Sequence[Window], keys: Sequence[Float[Tensor, "_ dim"]]
    ) -> tuple[CacheNeighbors, ...]:
        recall = self._wanted.recall
        if recall is None:
            return ()
        found: list[list[CacheNeighbors]] = [[] for _ in recall.sizes]
        for window, of_window in zip(windows, keys, strict=True):
            document = window.spans[0].document
            if self._cache is None or (
                recall.boundary == Boundary.document and document != self._document
            ):
                self._cache = ContinuousCache(
                    max(recall.sizes), self._lm.dimension, similarity=recall.similarity
                )
            self._document = document
            inputs = torch.from_numpy(window.inputs[window.context :]).long()
            cache_view = self._cache.read(inputs[None], of_window[None])
            for parts, size in zip(found, recall.sizes, strict=True):
                parts.append(cache_view.nearest(recall.k, size))
        return tuple(join_cache_neighbors(parts) for parts in found)


def mixed_log_probs(scores: Scores, mixer: Mixer) -> Float[Tensor, " token"]:
    """Return log p of each scored token under the mixer that the scores were made for."""
    cache_neighbors = scores.cache_neighbors[0] if scores.cache_neighbors else None
    votes = mixer.votes(mixer.searched, scores.neighbors, cache_neighbors, scores.lm)
    return interpolate(scores.lm_log_probs, [one.for_targets(scores.targets) for one in votes])
