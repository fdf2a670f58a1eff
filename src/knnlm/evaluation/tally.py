"""Counts of an evaluation: nats, by document and by the frequency of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from knnlm.evaluation.scoring import Scores
from knnlm.retrieval.retriever import Retriever

FEWEST_DOCUMENTS = 10  # for a bootstrap over documents; fewer say little about others
BLOCK = 256  # consecutive tokens, which resemble each other, are drawn together
HURT_NATS = 0.1
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class FrequencyBucket:
    """Tokens that occur `at_least` to `at_most` times among the values of the datastores."""

    at_least: int
    at_most: int
    tokens: int
    lm_perplexity: float
    knn_perplexity: float


class Errors(NamedTuple):
    """Standard errors of the LM's perplexity, the mixture's, and of their ratio.

    over: the units that the bootstrap drew, "documents" or "blocks of 256 tokens".
    """

    lm: float
    mixture: float
    change: float
    over: str


class Tally:
    """Sums of nats: over documents, and over tokens of similar frequency in the datastores.

    scored: the number of tokens counted in each document, by its number. helped, hurt: how many
    tokens are more, or less, probable under the mixture than under the LM. last_targets: the tokens
    counted in the last document, in parts.
    """

    def __init__(self, retrievers: Sequence[Retriever], vocab_size: int) -> None:
        self.scored: dict[int, int] = {}
        self.last_targets: list[Int[Tensor, " part"]] = []
        self.helped = self.hurt = 0
        self._hurt_much = 0.0
        # by document and block number: nats of the LM and of the mixture, and tokens
        self._blocks: dict[tuple[int, int], Float[Tensor, " count"]] = {}
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for retriever in retrievers:
            store = retriever.store
            counts += torch.bincount(store.values[store.alive], minlength=vocab_size)
        # 0 for none, 1 for 1 … 9, 2 for 10 … 99, …
        self._bucket = counts.double().log10().floor().clamp_min(-1).long() + 1
        buckets = int(self._bucket.max()) + 1
        self._bucket_tokens = torch.zeros(buckets, dtype=torch.int64)
        self._bucket_nats = torch.zeros(buckets, 2, dtype=torch.float64)

    def add(self, scores: Scores, mixed_log_probs: Float[Tensor, " token"]) -> None:
        """Count the scored tokens, which continue those counted before."""
        lm_log_probs = scores.lm_log_probs
        nats = -torch.stack([lm_log_probs.double(), mixed_log_probs.double()], dim=1)
        self.helped += int((mixed_log_probs > lm_log_probs).sum())
        self.hurt += int((mixed_log_probs < lm_log_probs).sum())
        self._hurt_much += share_hurt(mixed_log_probs, lm_log_probs) * len(nats)
        buckets = self._bucket[scores.targets.long()]
        self._bucket_tokens += torch.bincount(buckets, minlength=len(self._bucket_tokens))
        self._bucket_nats.index_add_(0, buckets, nats)
        counted = torch.cat([nats, torch.ones(len(nats), 1, dtype=torch.float64)], dim=1)
        spans = [span for window in scores.windows for span in window.spans]
        parts = (torch.split(own, [s.count for s in spans]) for own in (scores.targets, counted))
        for span, targets, own in zip(spans, *parts, strict=True):
            if span.document not in self.scored:
                self.last_targets = []
            self.last_targets.append(targets)
            self._add_to_blocks(span.document, own)

    def _add_to_blocks(self, document: int, counted: Float[Tensor, "token count"]) -> None:
        """Count the next tokens of a document."""
        before = self.scored.get(document, 0)
        self.scored[document] = before + len(counted)
        ends = range(BLOCK - before % BLOCK, len(counted), BLOCK)
        for block, part in enumerate(counted.tensor_split(list(ends)), start=before // BLOCK):
            key = document, block
            self._blocks[key] = self._blocks.get(key, 0) + part.sum(dim=0)

    @property
    def nats(self) -> tuple[float, float]:
        """The total nats of the LM and of the mixture."""
        lm, mixed, _ = torch.stack(list(self._blocks.values())).sum(dim=0).tolist()
        return lm, mixed

    @property
    def share_hurt(self) -> float:
        """The share of tokens that are at least 0.1 nats less probable than under the LM."""
        return self._hurt_much / sum(self.scored.values())

    def errors(self) -> Errors | None:
        """Return standard errors by a bootstrap, seeded; None for a text of one block.

        It draws documents or, if there are fewer than ten, blocks of 256 tokens.
        """
        over, parts = f"blocks of {BLOCK} tokens", list(self._blocks.values())
        if len(self.scored) >= FEWEST_DOCUMENTS:
            by_document = groupby(sorted(self._blocks), key=lambda key: key[0])
            parts = [
                torch.stack([self._blocks[key] for key in keys]).sum(dim=0)
                for _, keys in by_document
            ]
            over = "documents"
        if len(parts) < 2:
            return None
        counted = torch.stack(parts).numpy()
        per_token = bootstrap(counted[:, :2], counted[:, 2])
        with np.errstate(over="ignore", invalid="ignore"):  # λ = 1 may cost infinitely many nats
            perplexities = np.exp(per_token)
            ratios = np.exp(per_token[:, 1] - per_token[:, 0])
            lm, mixed = perplexities.std(axis=0, ddof=1).tolist()
            return Errors(lm, mixed, float(ratios.std(ddof=1)), over)

    def frequencies(self) -> tuple[FrequencyBucket, ...]:
        """Return the buckets that have tokens, the rarest first."""
        buckets = []
        for number, tokens in enumerate(self._bucket_tokens.tolist()):
            if tokens:
                lm, mixed = (self._bucket_nats[number] / tokens).tolist()
                at_least, at_most = (10 ** (number - 1), 10**number - 1) if number else (0, 0)
                perplexities = perplexity_of(lm), perplexity_of(mixed)
                buckets.append(FrequencyBucket(at_least, at_most, tokens, *perplexities))
        return tuple(buckets)


def bootstrap(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return nats per token, [resample, column], of 2,000 texts resampled from a text's parts.

    nats: [part, column], tokens: [part], of each part, such as a document. A resampled text has
    the same number of parts, drawn with replacement; seeded.
    """
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(tokens), size=(_RESAMPLES, len(tokens)))
    per_token: NDArray[np.float64] = nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)[:, None]
    return per_token


def perplexity_of(nats_per_token: float) -> float:
    """Return e^nats, infinity where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def share_hurt(
    mixed_log_probs: Float[Tensor, " token"], lm_log_probs: Float[Tensor, " token"]
) -> float:
    """Return the share of tokens that are at least 0.1 nats less probable than under the LM."""
    return float((mixed_log_probs < lm_log_probs - HURT_NATS).double().mean())
