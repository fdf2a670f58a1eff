"""Evaluation windows → per-token scores → PerplexityReport: the LM and the kNN-LM side by side."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from knnlm.choices import Boundary
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.scoring import Scores, Wanted, mixed_log_probs, score_windows
from knnlm.evaluation.tally import FrequencyBucket, Tally, perplexity_of
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.parameters import Parameters, parameters_to_dict
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import (
    EncodedDocument,
    Windowing,
    cut_windows,
    encode_documents,
    total_bytes,
)
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.mixer import Mixer
from knnlm.text.corpus import Document
from knnlm.text.windows import limit_windows


@dataclass(frozen=True, slots=True)
class Measure:
    """One model's fit to a text.

    perplexity and nats_per_token count the model's tokens; word_perplexity spreads the same nats
    over words separated by white space, bits_per_byte over the bytes of the text in UTF-8, so that
    both compare models with different tokenizers. perplexity_error: its standard error, see
    `PerplexityReport`.
    """

    perplexity: float
    nats_per_token: float
    word_perplexity: float
    bits_per_byte: float
    perplexity_error: float | None = None

    @classmethod
    def of(
        cls,
        total_nats: float,
        tokens: int,
        words: int,
        size_bytes: int,
        perplexity_error: float | None = None,
    ) -> "Measure":
        """Spread the nats over tokens, words and bytes."""
        return cls(
            perplexity_of(total_nats / tokens),
            total_nats / tokens,
            perplexity_of(total_nats / max(words, 1)),
            total_nats / math.log(2) / max(size_bytes, 1),
            perplexity_error,
        )


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of an evaluation went."""

    lm: float
    search: float
    total: float


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """The LM and the kNN-LM on one text.

    parameters: of each datastore. weights: what chose those of each token, see `Mixer.weights`.
    cache: the continuous cache, if one was mixed in. tokens_helped, tokens_hurt: tokens to which
    the mixture gives more, or less, than the LM alone. share_hurt: of tokens that it gives at least
    0.1 nats less. change, change_error: of perplexity against the LM's, −0.1 for 10 % less, and its
    standard error. errors_over: what the bootstrap of standard errors draws, "documents", or, where
    there are fewer than ten, "blocks of 256 tokens", which say nothing of other documents; None,
    like the errors, for a text of one block. frequencies: from tokens that the datastores lack to
    the most frequent.
    """

    documents: int
    tokens: int
    words: int
    size_bytes: int
    lm: Measure
    knn: Measure
    change: float
    change_error: float | None
    errors_over: str | None
    parameters: tuple[Parameters, ...]
    weights: str
    cache: CacheParameters | None
    tokens_helped: int
    tokens_hurt: int
    share_hurt: float
    frequencies: tuple[FrequencyBucket, ...]
    seconds: Seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `parameters` as `parameters_to_dict` gives them."""
        return asdict(self) | {"parameters": parameters_to_dict(self.parameters)}


def evaluation_scores(
    lm: LanguageModel,
    wanted: Wanted,
    documents: Iterable[Document],
    windowing: Windowing,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
    description: str = "eval",
    met: dict[int, EncodedDocument] | None = None,
) -> Iterator[Scores]:
    """Yield what is wanted of a held-out text, of every token once.

    max_tokens: stop after so many. met: filled with the documents read, by their number.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidArgumentError(f"max_tokens must be at least 1, got {max_tokens}")
    windowing.check_model(lm)
    met = {} if met is None else met

    def meeting() -> Iterator[EncodedDocument]:
        for encoded in encode_documents(lm, documents, windowing.boundary):
            met[encoded.number] = encoded
            yield encoded

    windows = limit_windows(cut_windows(meeting(), lm.start_token, windowing), max_tokens)
    corpus_bytes = total_bytes(documents)
    with progress.task(description, max_tokens, "tokens") as advance:
        for scores in score_windows(lm, windows, wanted):
            total: float | None = max_tokens
            if corpus_bytes is not None:
                tokens = sum(document.tokens for document in met.values())
                size_bytes = sum(document.size_bytes for document in met.values())
                total = min(max_tokens or math.inf, corpus_bytes * tokens / max(size_bytes, 1))
            advance(len(scores.targets), total)
            yield scores


def evaluate(
    lm: LanguageModel,
    mixer: Mixer,
    documents: Iterable[Document],
    windowing: Windowing,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> PerplexityReport:
    """Score a text with the LM and with the kNN-LM.

    Of a document that `max_tokens` cuts, words and bytes are counted in the decoded scored tokens.
    Raises InvalidArgumentError, also for a text without tokens.
    """
    started = time.perf_counter()
    lm_seconds = search_seconds = 0.0
    tally = Tally(mixer.retrievers, lm.vocab_size)
    last_document, last_targets = -1, list[np.ndarray]()
    met: dict[int, EncodedDocument] = {}
    wanted = Wanted.by(mixer, windowing.boundary)
    for scores in evaluation_scores(
        lm,
        wanted,
        documents,
        windowing,
        max_tokens,
        progress,
        met=met,
    ):
        tally.add(scores, mixed_log_probs(scores, mixer))
        lm_seconds += scores.lm_seconds
        search_seconds += scores.search_seconds
        for window in scores.windows:
            offset = 0
            for span in window.spans:
                if span.document != last_document:
                    last_document, last_targets = span.document, []
                last_targets.append(window.targets[offset : offset + span.count])
                offset += span.count
    scored = tally.scored
    if not scored:
        raise InvalidArgumentError("the text to evaluate must have a token, got none")
    words = sum(met[number].words for number in scored)
    size_bytes = sum(met[number].size_bytes for number in scored)
    last = met[max(scored)]
    # a stream predicts every document's start token but the first one's
    streaming = windowing.boundary == Boundary.stream
    unpredicted = int(streaming and last.number == min(met))
    if scored[last.number] < last.tokens - unpredicted:
        targets = np.concatenate(last_targets)
        text = lm.decode(targets[int(streaming) - unpredicted :])
        words += len(text.split()) - last.words
        size_bytes += len(text.encode()) - last.size_bytes
    errors = tally.errors()
    lm_nats, knn_nats = tally.nats
    tokens = sum(scored.values())
    return PerplexityReport(
        documents=len(scored),
        tokens=tokens,
        words=words,
        size_bytes=size_bytes,
        lm=Measure.of(lm_nats, tokens, words, size_bytes, errors and errors.lm),
        knn=Measure.of(knn_nats, tokens, words, size_bytes, errors and errors.mixture),
        change=perplexity_of((knn_nats - lm_nats) / tokens) - 1,
        change_error=errors and errors.change,
        errors_over=errors and errors.over,
        parameters=tuple(retriever.parameters for retriever in mixer.retrievers),
        weights=mixer.weights,
        cache=mixer.cache,
        tokens_helped=tally.helped,
        tokens_hurt=tally.hurt,
        share_hurt=tally.share_hurt,
        frequencies=tally.frequencies(),
        seconds=Seconds(lm_seconds, search_seconds, time.perf_counter() - started),
    )
