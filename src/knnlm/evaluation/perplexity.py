"""Held-out text → scores of its tokens → PerplexityReport: the LM and the kNN-LM compared."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from knnlm import display
from knnlm.choices import Boundary
from knnlm.datastore.overlap import Overlap, find_overlap
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.saved_searches import SavedSearches, Searches
from knnlm.evaluation.scoring import ScoreRequest, mixed_log_probs, score_documents
from knnlm.evaluation.tally import FrequencyBucket, Tally, perplexity_of
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.parameters import Parameters, parameters_to_dict
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import EncodedDocument
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.saved_searches import SavingRule
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing


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
    """How long the parts of an evaluation took."""

    lm: float
    search: float
    total: float


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """The LM and the kNN-LM on one text.

    parameters: of each datastore. weights: how they were chosen for each token, see
    `Mixer.weights`. cache: the continuous cache, if one was mixed in. tokens_helped, tokens_hurt:
    how many tokens are more, or less, probable than under the LM alone; share_hurt: the share that
    is at least 0.1 nats less probable. change: of perplexity, relative to the LM's, −0.1 for 10 %
    less; change_error: its standard error. errors_over: the units that the bootstrap of standard
    errors draws, "documents", or, with fewer than ten, "blocks of 256 tokens", which do not
    generalize to other documents; None, like the errors, for a text of one block. frequencies: from
    tokens that the datastores lack to the most frequent. overlap: how much of the text is stored.
    unverified: the datastores that were imported and not proved, whose keys may be another model's.
    searches: what was saved of them; None where every token was searched for.
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
    overlap: Overlap
    unverified: tuple[str, ...]
    searches: Searches | None
    seconds: Seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `parameters` as `parameters_to_dict` gives them."""
        return asdict(self) | {"parameters": parameters_to_dict(self.parameters)}

    def _repr_html_(self) -> str:
        """Return the two models side by side, for notebooks."""
        names = ("perplexity", "nats_per_token", "word_perplexity", "bits_per_byte")
        pairs = ((name, getattr(self.lm, name), getattr(self.knn, name)) for name in names)
        rows = [
            (name.replace("_", " "), f"{lm:.4f}", f"{knn:.4f}", f"{knn / lm - 1.0:+.1%}")
            for name, lm, knn in pairs
        ]
        return display.table(
            ("", "LM", "kNN-LM", "change"),
            rows,
            caption=f"{self.tokens:,} tokens of {self.documents:,} documents; "
            f"{self.tokens_helped / self.tokens:.0%} of the tokens are more probable, "
            f"{self.tokens_hurt / self.tokens:.0%} less",
            bold=0,
        )


def evaluate(
    lm: LanguageModel,
    mixer: Mixer,
    documents: Iterable[Document],
    windowing: Windowing,
    *,
    max_tokens: int | None = None,
    saving: SavingRule | None = None,
    progress: Progress = SILENT,
) -> PerplexityReport:
    """Score a text with the LM and with the kNN-LM.

    saving: gives each token the neighbors that it has where searches are saved.
    If `max_tokens` cuts a document, its words and bytes are counted in the decoded scored tokens.
    Raises InvalidArgumentError, also for a text without tokens.
    """
    started = time.perf_counter()
    lm_seconds = search_seconds = 0.0
    tally = Tally(mixer.retrievers, lm.vocab_size)
    request = ScoreRequest.for_mixer(mixer, windowing.boundary, saving)
    saved = None if saving is None else SavedSearches(mixer, saving, windowing.boundary)
    text = score_documents(
        lm, documents, windowing, request, max_tokens=max_tokens, progress=progress
    )
    for scored in text.scores:
        scores = scored if saved is None else saved.thinned(scored)
        tally.add(scores, mixed_log_probs(scores, mixer))
        lm_seconds += scores.lm_seconds
        search_seconds += scores.search_seconds
    if not tally.scored:
        raise InvalidArgumentError("the text to evaluate must have a token, got none")
    streaming = windowing.boundary == Boundary.stream
    words, size_bytes = _measure_text(lm, text.documents, tally, streaming)
    errors = tally.errors()
    lm_nats, knn_nats = tally.nats
    tokens = sum(tally.scored.values())
    return PerplexityReport(
        documents=len(tally.scored),
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
        overlap=find_overlap([r.store for r in mixer.retrievers], text.documents, text.targets),
        unverified=mixer.unverified,
        searches=None if saved is None else saved.searches,
        seconds=Seconds(lm_seconds, search_seconds, time.perf_counter() - started),
    )


def _measure_text(
    lm: LanguageModel, read: Sequence[EncodedDocument], tally: Tally, streaming: bool
) -> tuple[int, int]:
    """Return the words and bytes of the scored text, whose last document may have been cut."""
    documents = [document for document in read if document.number in tally.scored]
    words = sum(document.words for document in documents)
    size_bytes = sum(document.size_bytes for document in documents)
    last = documents[-1]
    # a stream predicts the start token of every document but the first
    has_start_target = streaming and last is not read[0]
    unpredicted = int(streaming and not has_start_target)
    if tally.scored[last.number] < last.tokens - unpredicted:
        text = lm.decode(torch.cat(tally.last_targets)[int(has_start_target) :])
        words += len(text.split()) - last.words
        size_bytes += len(text.encode()) - last.size_bytes
    return words, size_bytes
