"""Text → the model's log-probability and the neighbors of every token.

One search of many queries serves perplexities, tuning and explanations, which mix its results.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from knnlm.choices import Boundary, Similarity
from knnlm.index.protocol import Neighbors
from knnlm.mixture.continuous_cache import CacheNeighbors, ContinuousCache, join_cache_neighbors
from knnlm.mixture.interpolation import interpolate
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.rows import join
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import (
    EncodedDocument,
    Likeliest,
    cut_documents,
    read_scores,
    total_bytes,
)
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever
from knnlm.retrieval.saved_searches import SavingRule, search_some
from knnlm.text.documents import Document
from knnlm.text.windows import Window, Windowing, document_windows, stream_windows

QUERIES_AT_ONCE = 4096


class CacheRequest(NamedTuple):
    """The k most similar pairs in continuous caches of several sizes.

    boundary: "document" empties them between documents, "stream" does not.
    """

    sizes: tuple[int, ...]
    k: int
    similarity: str = Similarity.distance
    boundary: str = Boundary.document


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What to compute for each token besides the model's log-probability.

    retrievers: those to search, whatever their λ. cache: the pairs of the continuous cache to find.
    summary: whether to summarize the model's whole distribution. likeliest: how many of the
    model's likeliest tokens to name. saving: only tokens for which a search matters are searched
    for; then `summary` is needed where it has a gate.
    """

    retrievers: tuple[Retriever, ...]
    cache: CacheRequest | None = None
    summary: bool = False
    likeliest: int = 0
    saving: SavingRule | None = None

    @classmethod
    def for_mixer(
        cls, mixer: Mixer, boundary: str, saving: SavingRule | None = None
    ) -> "ScoreRequest":
        """Return the request for everything that a mixer needs."""
        cache = None
        if mixer.uses_cache:
            assert mixer.cache is not None
            parameters = mixer.cache
            cache = CacheRequest(
                (parameters.size,), parameters.votes.k, parameters.similarity, boundary
            )
        summary = mixer.gate is not None or (saving is not None and saving.gate is not None)
        return cls(mixer.searched, cache, summary, saving=saving)


@dataclass(frozen=True, slots=True)
class Scores:
    """What was computed for each new token (target) of some windows, in order.

    keys: of the position before it. lm_log_probs: log p_LM of the token. neighbors: of the key,
    from each retriever that was searched. cache_neighbors: from the continuous cache, for each
    size. lm, likeliest: of the model's distribution, if requested. lm_seconds, search_seconds: how
    long it took; the continuous cache counts as search.
    """

    windows: list[Window]
    targets: Int[Tensor, " token"]
    keys: Float[Tensor, "token dim"]
    lm_log_probs: Float[Tensor, " token"]
    neighbors: tuple[Neighbors, ...]
    cache_neighbors: tuple[CacheNeighbors, ...] = ()
    lm: LMSummary | None = None
    likeliest: Likeliest | None = None
    lm_seconds: float = 0.0
    search_seconds: float = 0.0


def mixed_log_probs(scores: Scores, mixer: Mixer) -> Float[Tensor, " token"]:
    """Return log p of each scored token; the scores are those that the mixer needs."""
    votes = mixer.votes(mixer.searched, scores.neighbors, scores.cache_neighbors, scores.lm)
    return interpolate(scores.lm_log_probs, [one.for_targets(scores.targets) for one in votes])


class DocumentScores(NamedTuple):
    """The scores of held-out documents, computed while they are iterated over.

    documents: those that were read so far. targets: their scored tokens, in consecutive parts.
    """

    scores: Iterator[Scores]
    documents: list[EncodedDocument]
    targets: list[Int32[np.ndarray, " _"]]


def score_documents(
    lm: LanguageModel,
    documents: Iterable[Document],
    windowing: Windowing,
    request: ScoreRequest,
    *,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
    description: str = "eval",
) -> DocumentScores:
    """Score every token of held-out documents once, or the first `max_tokens` tokens.

    Raises InvalidArgumentError. description: the name of the work in its progress.
    """
    read: list[EncodedDocument] = []
    targets: list[Int32[np.ndarray, " _"]] = []
    windows = cut_documents(lm, documents, windowing, max_tokens, on_document=read.append)

    def scores() -> Iterator[Scores]:
        corpus_bytes = total_bytes(documents)
        with progress.task(description, max_tokens, "tokens") as advance:
            for part in score_windows(lm, windows, request):
                total: float | None = max_tokens
                if corpus_bytes is not None:
                    tokens = sum(document.tokens for document in read)
                    size_bytes = sum(document.size_bytes for document in read)
                    total = min(max_tokens or math.inf, corpus_bytes * tokens / max(size_bytes, 1))
                advance(len(part.targets), total)
                targets.append(part.targets.numpy())
                yield part

    return DocumentScores(scores(), read, targets)


def score_text(
    lm: LanguageModel,
    tokens: Sequence[int],
    windowing: Windowing,
    request: ScoreRequest,
    tokens_at_once: int = QUERIES_AT_ONCE,
) -> Iterator[Scores]:
    """Score the tokens of one text, cut into windows as a held-out document is.

    tokens_at_once: see `score_windows`.
    """
    windowing.check_positions(lm.max_window, lm.name)
    pieces = [np.array(tokens, np.int32)]
    if windowing.boundary == Boundary.document:
        windows = document_windows(0, pieces, lm.start_token, windowing)
    else:
        pieces.insert(0, np.array([lm.start_token], np.int32))
        windows = stream_windows([(0, pieces)], windowing, np.empty(0, np.int32))
    return score_windows(lm, windows, request, tokens_at_once)


def score_windows(
    lm: LanguageModel,
    windows: Iterable[Window],
    request: ScoreRequest,
    tokens_at_once: int = QUERIES_AT_ONCE,
) -> Iterator[Scores]:
    """Yield the scores of consecutive windows: of the fewest that have `tokens_at_once` tokens."""
    scorer = _Scorer(lm, request)
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(window.new for window in group) >= tokens_at_once:
            yield scorer.score(group)
            group = []
    if group:
        yield scorer.score(group)


class _Scorer:
    """Scores consecutive groups of windows; the continuous cache lasts from one to the next."""

    def __init__(self, lm: LanguageModel, request: ScoreRequest) -> None:
        self._lm = lm
        self._request = request
        self._document = -1
        self._cache: ContinuousCache | None = None

    def score(self, windows: list[Window]) -> Scores:
        lm, request = self._lm, self._request
        started = time.perf_counter()
        targets = torch.from_numpy(np.concatenate([window.targets for window in windows]))
        parts = sorted(
            read_scores(lm, windows, request.summary, request.likeliest), key=attrgetter("number")
        )
        log_probs = torch.cat([part.log_probs for part in parts]).cpu()
        queries = torch.cat([part.keys for part in parts]).cpu()
        summaries = [part.summary for part in parts if part.summary is not None]
        likeliest = [part.likeliest for part in parts if part.likeliest is not None]
        lm_summary = LMSummary(*(column.cpu() for column in join(summaries))) if summaries else None
        read = time.perf_counter()
        neighbors = self._search(queries, lm_summary)
        cache_neighbors = self._find_in_cache(
            windows, torch.split(queries, [window.new for window in windows])
        )
        searched = time.perf_counter()
        return Scores(
            windows,
            targets,
            queries,
            log_probs,
            neighbors,
            cache_neighbors,
            lm_summary,
            join(likeliest) if likeliest else None,
            read - started,
            searched - read,
        )

    def _search(
        self, queries: Float[Tensor, "query dim"], lm: LMSummary | None
    ) -> tuple[Neighbors, ...]:
        retrievers, saving = self._request.retrievers, self._request.saving
        if saving is None or saving.gate is None:
            return tuple(retriever.search(queries) for retriever in retrievers)

        def search(some: Int[Tensor, " some"]) -> list[Neighbors]:
            return [retriever.search(queries[some]) for retriever in retrievers]

        return tuple(search_some(search, retrievers, queries, saving.matters(lm, queries)))

    def _find_in_cache(
        self, windows: Sequence[Window], keys: Sequence[Float[Tensor, "_ dim"]]
    ) -> tuple[CacheNeighbors, ...]:
        """Return what each requested size of the continuous cache finds for each key."""
        request = self._request.cache
        if request is None:
            return ()
        by_size: list[list[CacheNeighbors]] = [[] for _ in request.sizes]
        for window, window_keys in zip(windows, keys, strict=True):
            document = window.spans[0].document
            if self._cache is None or (
                request.boundary == Boundary.document and document != self._document
            ):
                self._cache = ContinuousCache(
                    max(request.sizes), self._lm.dimension, similarity=request.similarity
                )
            self._document = document
            inputs = torch.from_numpy(window.inputs[window.context :]).long()
            cache_view = self._cache.read(inputs[None], window_keys[None])
            for parts, size in zip(by_size, request.sizes, strict=True):
                parts.append(cache_view.nearest(request.k, size))
        return tuple(join_cache_neighbors(parts) for parts in by_size)
