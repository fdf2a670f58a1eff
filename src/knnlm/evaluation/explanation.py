"""Explanations: why a token got its probability, from which passages, by which documents."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from knnlm import display

THIS_TEXT = "(this text)"
"""The document of a source in the continuous cache."""
_SHOWN_TOKENS = 5  # with their sources, in notebooks
_SHOWN_DOCUMENTS = 10


@dataclass(frozen=True, slots=True)
class Source:
    """A neighbor that voted for a token, with its passage.

    store: the path of its datastore; "" for a pair in the continuous cache, whose row is −1.
    position: of the entry in its document, in tokens. token: the one it votes for; `value` is what
    it adds to the passage, before + value + after. weight: its share of p_kNN.
    """

    store: str
    row: int
    document: str
    position: int
    token: int
    weight: float
    squared_distance: float
    before: str
    value: str
    after: str


@dataclass(frozen=True, slots=True)
class Vote:
    r"""A token that neighbors vote for: how many they are, and their share of p_kNN.

    text: of the token after the text before it; `bytes:\xe4` for a part of a character.
    """

    token: int
    text: str
    weight: float
    neighbors: int


@dataclass(frozen=True, slots=True)
class Credit:
    """A document's share of the probability of a token, or of several tokens.

    p is a sum of parts: (1 − λ) p_LM, and λ times the weight of each neighbor that votes for the
    token. tokens: the document's parts, divided by p and summed over tokens, so that the credits of
    all documents and the LM's share add up to the number of tokens. store: as in `Source`.
    """

    store: str
    document: str
    tokens: float


@dataclass(frozen=True, slots=True)
class Explanation:
    r"""The probability of one token of a text, and where it comes from; log-probabilities in nats.

    text: what the token adds to the text; all the texts add up to it, and a character belongs to
    the token that completes it. name: the text, but `bytes:\xe4` for a part of a character.
    knn_prob: p_kNN of the token; with several datastores, their mean weighted by λ. sources: the
    neighbors with the greatest weight, whatever they vote for. votes: the heaviest, and always
    those of the sources and for the token itself. credits: of every document, the greatest first.
    """

    token: int
    text: str
    name: str
    lm_log_prob: float
    knn_prob: float
    log_prob: float
    sources: tuple[Source, ...] = ()
    votes: tuple[Vote, ...] = ()
    credits: tuple[Credit, ...] = ()

    @property
    def gain(self) -> float:
        """Nats that the datastore added to the token's log-probability."""
        return self.log_prob - self.lm_log_prob

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self) | {"gain": self.gain}

    def _probabilities(self) -> str:
        return (
            f"p_LM {exp(self.lm_log_prob):.3f}, p_kNN {self.knn_prob:.3f}, p "
            f"{exp(self.log_prob):.3f}, {self.gain:+.2f} nats"
        )

    def _repr_html_(self) -> str:
        """Return the token with its votes and sources, for notebooks."""
        votes = [
            (repr(vote.text), f"{vote.weight:.1%}", f"{vote.neighbors:,}") for vote in self.votes
        ]
        sources = (
            display.passage(
                one.before,
                one.value,
                one.after,
                f"{one.weight:.1%}  {one.document}, token {one.position}",
            )
            for one in self.sources
        )
        caption = f"{self.name!r}: {self._probabilities()}"
        shown = display.table(("vote", "weight", "neighbors"), votes, caption=caption)
        return shown + "".join(sources)


class Explanations(list[Explanation]):
    """The explanations of a text's tokens, in order; notebooks show them as colored text."""

    def _repr_html_(self) -> str:
        """Return the text, the sources of the tokens that changed most, and all documents."""
        text = display.colored((one.text, one.gain, one._probabilities()) for one in self)
        changed = sorted(range(len(self)), key=lambda number: -abs(self[number].gain))
        tokens = (self[number]._repr_html_() for number in sorted(changed[:_SHOWN_TOKENS]))
        documents = sum_credits(self)
        rows = [(one.document, one.tokens) for one in documents[:_SHOWN_DOCUMENTS]]
        rest = sum(one.tokens for one in documents[_SHOWN_DOCUMENTS:])
        rows += [("other documents", rest)] if rest else []
        rows.append(("the language model", len(self) - sum(tokens for _, tokens in rows)))
        shares = ((name, f"{part:.1f}", f"{part / len(self):.1%}") for name, part in rows)
        title = "who accounts for the text"
        return "".join([text, *tokens, display.table((title, "tokens", "share"), shares)])


def sum_credits(explanations: Iterable[Explanation]) -> tuple[Credit, ...]:
    """Return each document's credit for some tokens together, the greatest first."""
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for explanation in explanations:
        for credit in explanation.credits:
            sums[credit.store, credit.document] += credit.tokens
    return sorted_credits(sums)


def sorted_credits(sums: Mapping[tuple[str, str], float]) -> tuple[Credit, ...]:
    """Return the credits of documents, given by (store, name), the greatest first."""
    documents = sorted(sums, key=sums.__getitem__, reverse=True)
    return tuple(Credit(*document, sums[document]) for document in documents)
