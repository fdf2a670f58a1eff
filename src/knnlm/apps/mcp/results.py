"""What the tools return: plain values with a schema, and the same as text that a model reads.

Knows explanations and passages; knows no protocol. The types have no slots, which the protocol's
SDK would take for default values when it makes their schemas.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.tables import StoredDocument
from knnlm.evaluation.explanation import Explanation, Source, sum_credits
from knnlm.evaluation.passages import FoundPassage

_MOST_CREDITS = 10


@dataclass(frozen=True)
class PassageResult:
    """A passage; start and stop are its tokens in the document, from 0."""

    document: str
    start: int
    stop: int
    score: float
    text: str
    store: str


@dataclass(frozen=True)
class SearchResult:
    """The passages nearest to a text, the nearest first."""

    passages: list[PassageResult]

    @classmethod
    def of(cls, found: Sequence[FoundPassage]) -> "SearchResult":
        """Return the result of a search."""
        return cls([PassageResult(**passage.to_dict()) for passage in found])

    def readable(self) -> str:
        """Return it as text."""
        if not self.passages:
            return "nothing is stored"
        return "\n\n".join(
            f"[{number}] {passage.document}, tokens {passage.start} to {passage.stop - 1} "
            f"(score {passage.score:.1f})\n{passage.text}"
            for number, passage in enumerate(self.passages, 1)
        )


@dataclass(frozen=True)
class SourceResult:
    """An entry that voted, with its passage; weight is its share of p_kNN."""

    document: str
    position: int
    before: str
    value: str
    after: str
    weight: float
    store: str


@dataclass(frozen=True)
class TokenResult:
    """A token of a text, its probabilities, and the entries with most weight; gain is in nats."""

    text: str
    p_lm: float
    p_knn: float
    p: float
    gain: float
    sources: list[SourceResult]


@dataclass(frozen=True)
class CreditResult:
    """A document's share of the text's probability, of 1 for each of its tokens."""

    document: str
    share: float
    store: str


@dataclass(frozen=True)
class ExplainResult:
    """Why a text is likely: token by token, and which documents account for it."""

    perplexity_lm: float
    perplexity: float
    documents: list[CreditResult]
    tokens: list[TokenResult]

    @classmethod
    def of(cls, explanations: Sequence[Explanation]) -> "ExplainResult":
        """Return the result of an explanation of at least one token."""
        count = len(explanations)
        return cls(
            math.exp(-sum(one.lm_log_prob for one in explanations) / count),
            math.exp(-sum(one.log_prob for one in explanations) / count),
            [
                CreditResult(credit.document, credit.tokens / count, credit.store)
                for credit in sum_credits(explanations)[:_MOST_CREDITS]
            ],
            [_token(explanation) for explanation in explanations],
        )

    def readable(self, shown: int) -> str:
        """Return it as text, with the sources of so many tokens: those that changed the most."""
        lines = [
            f"{len(self.tokens)} tokens; perplexity {self.perplexity_lm:.2f} by the language model "
            f"alone, {self.perplexity:.2f} with the memory"
        ]
        lines += [f"{one.share:7.1%}  {one.document}" for one in self.documents]
        rest = 1.0 - sum(one.share for one in self.documents)
        lines.append(f"{rest:7.1%}  the language model, and other documents")
        numbers = sorted(range(len(self.tokens)), key=lambda one: -abs(self.tokens[one].gain))
        for number in sorted(numbers[:shown]):
            token = self.tokens[number]
            lines.append(
                f"\ntoken {number} {token.text!r}: p_LM {token.p_lm:.3f}, p_kNN "
                f"{token.p_knn:.3f}, p {token.p:.3f}, {token.gain:+.2f} nats"
            )
            lines += [
                f"  {one.weight:.1%} {one.document}, token {one.position}: "
                f"…{one.before}[{one.value}]{one.after}…"
                for one in token.sources
            ]
        return "\n".join(lines)


def _token(one: Explanation) -> TokenResult:
    return TokenResult(
        one.name,
        math.exp(one.lm_log_prob),
        one.knn_prob,
        math.exp(one.log_prob),
        _finite(one.gain),
        [_source(source) for source in one.sources],
    )


def _source(source: Source) -> SourceResult:
    return SourceResult(
        source.document,
        source.position,
        source.before,
        source.value,
        source.after,
        source.weight,
        source.store,
    )


def _finite(gain: float) -> float:
    """Return a number that JSON can hold: log 0 is no such number."""
    return min(max(gain, -9999.0), 9999.0)


@dataclass(frozen=True)
class DocumentResult:
    """A stored document and how many of its tokens are stored."""

    document: str
    tokens: int
    store: str


@dataclass(frozen=True)
class DocumentsResult:
    """Some of the stored documents, in the order they were stored; total counts all that match."""

    total: int
    offset: int
    documents: list[DocumentResult]

    @classmethod
    def of(
        cls, matching: Sequence[tuple[Datastore, StoredDocument]], limit: int, offset: int
    ) -> "DocumentsResult":
        """Return `limit` of the matching documents, from number `offset` on."""
        page = matching[offset : offset + limit]
        documents = [
            DocumentResult(one.name, one.stop - one.start, str(store.path)) for store, one in page
        ]
        return cls(len(matching), offset, documents)

    def readable(self) -> str:
        """Return it as text."""
        if not self.documents:
            return f"none of {self.total} documents from number {self.offset} on"
        last = self.offset + len(self.documents)
        lines = [f"documents {self.offset + 1} to {last} of {self.total}, with their tokens:"]
        return "\n".join([*lines, *(f"{one.tokens:>9,}  {one.document}" for one in self.documents)])


def as_structured(result: Any) -> dict[str, Any]:
    """Return a result as the protocol's structured content."""
    plain: dict[str, Any] = asdict(result)
    return plain
