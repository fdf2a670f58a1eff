"""Text → the model's log-probability and the neighbors of every token.

One search of many queries serves perplexities, tuning and explanations, which mix its results.
"""

import math
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
from knnlm.rules import check_whole
from knnlm.text.corpus import Document
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
    model's likeliest tokens to name.
    """

    retrievers: tuple[Retriever, ...]
    cache: CacheRequest | None = None
    summary: bool = False
    likeliest: int = 0

    @classmethod
    def for_mixer(cls, mixer: Mixer, boundary: str) -> "ScoreRequest":
        """Return the request for everything that a mixer needs."""
        cache = None
        if mixer.uses_cache:
            assert mixer.cache is not None
            parameters = mixer.cache
            cache = CacheRequest(
                (parameters.size,), parameters.votes.k, parameters.similarity, boundary
            )
        return cls(mixer.searched, cache, mixer.gate is not None)


@dataclass(frozen=True, slots=True)
class Scores:
    """What was computed for each new token (target) of some windows, in order.

    lm_log_probs: log p_LM of the token. neighbors: of the key before it, from each retriever that
    was searched. cache_neighbors: from the continuous cache, for each size. lm, likeliest: of the
    model's distribution, if requested. lm_seconds, search_seconds: how long it took; the continuous
    cache counts as search.
    """

    windows: list[Window]
    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    neighbors: tuple[Neighbors, ...]
    cache_neighbors: tuple[CacheNeighbors, ...] = ()
    lm: LMSummary | None = None
    likeliest: Likeliest | None = None
    lm_seconds: float = 0.0
    search_seconds: float = 0.0


def mixed_log_probs(scores: Scores, mixer: Mixer) -> Float[Tensor, " token"]:
    """Return log p of each scored token; the scores are those that the mixer needs."""
    cache_neighbors = scores.cache_neighbors[0] if scores.cache_neighbors else None
    votes = mixer.votes(mixer.searched, scores.neighbors, cache_neighbors, scores.lm)
    return interpolate(scores.lm_log_probs, [one.for_targets(scores.targets) for one in votes])


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """The scores of held-out documents, computed while they are iterated over.

    documents: those that were read so far, by number.
    """

    scores: Iterator[Scores]
    documents: dict[int, EncodedDocument]


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
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens)
    read: dict[int, EncodedDocument] = {}

    def note(encoded: EncodedDocument) -> None:
        read[encoded.number] = encoded

    windows = cut_documents(lm, documents, windowing, max_tokens, on_document=note)

    def scores() -> Iterator[Scores]:
        corpus_bytes = total_bytes(documents)
        with progress.task(description, max_tokens, "tokens") as advance:
            for part in score_windows(lm, windows, request):
                total: float | None = max_tokens
                if corpus_bytes is not None:
                    tokens = sum(document.tokens for document in read.values())
                    size_bytes = sum(document.size_bytes for document in read.values())
                    total = min(max_tokens or math.inf, corpus_bytes * tokens / max(size_bytes, 1))
                advance(len(part.targets), total)
                yield part

    return DocumentScores(scores(), read)


def score_text(
    lm: LanguageModel, tokens: Sequence[int], windowing: Windowing, request: ScoreRequest
) -> Iterator[Scores]:
    """Score the tokens of one text, cut into windows as a held-out document is."""
    windowing.check_positions(lm.max_window, lm.name)
    size, context = windowing.window, windowing.context
    pieces = [np.array(tokens, np.int32)]
    if windowing.boundary == Boundary.document:
        windows = document_windows(0, pieces, lm.start_token, size, context)
    else:
        pieces.insert(0, np.array([lm.start_token], np.int32))
        windows = stream_windows([(0, pieces)], size, context, np.empty(0, np.int32))
    return score_windows(lm, windows, request)


def score_windows(
    lm: LanguageModel, windows: Iterable[Window], request: ScoreRequest
) -> Iterator[Scores]:
    """Yield the scores of consecutive windows, some thousands of tokens at a time."""
    scorer = _Scorer(lm, request)
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(window.new for window in group) >= QUERIES_AT_ONCE:
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
        starts = np.cumsum([0] + [window.new for window in windows]).tolist()
        log_probs = torch.empty(len(targets))
        queries = torch.empty(len(targets), lm.dimension)
        summaries: dict[int, LMSummary] = {}
        likeliest: dict[int, Likeliest] = {}
        for scores in read_scores(lm, windows, request.summary, request.likeliest):
            new = slice(starts[scores.number], starts[scores.number + 1])
            log_probs[new], queries[new] = scores.log_probs, scores.keys
            if scores.summary is not None:
                summaries[scores.number] = scores.summary.cpu()
            if scores.likeliest is not None:
                likeliest[scores.number] = scores.likeliest
        read = time.perf_counter()
        neighbors = tuple(retriever.search(queries) for retriever in request.retrievers)
        cache_neighbors = self._find_in_cache(
            windows, torch.split(queries, [window.new for window in windows])
        )
        searched = time.perf_counter()
        numbers = range(len(windows))
        return Scores(
            windows,
            targets,
            log_probs,
            neighbors,
            cache_neighbors,
            LMSummary.join([summaries[number] for number in numbers]) if summaries else None,
            Likeliest.join([likeliest[number] for number in numbers]) if likeliest else None,
            read - started,
            searched - read,
        )

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
