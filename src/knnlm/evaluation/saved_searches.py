"""Held-out text with few searches: the neighbors that generation would have had for each token.

A text that is known is searched for all of its tokens at once, which costs less than one after
another, so that pointers save no time here: what they would save is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from knnlm.choices import Boundary
from knnlm.evaluation.scoring import Scores
from knnlm.index.protocol import Neighbors
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.saved_searches import SavingRule, Walks


@dataclass(frozen=True, slots=True)
class Searches:
    """How many searches were made for a text, and which share of its tokens had none."""

    made: int
    saved: float


class SavedSearches:
    """Gives scored tokens the neighbors that they have where searches are saved.

    boundary: "document" begins anew with each document, "stream" does not.
    """

    def __init__(self, mixer: Mixer, rule: SavingRule, boundary: str) -> None:
        self._mixer = mixer
        self._rule = rule
        self._boundary = boundary
        self._walks: Walks | None = None
        self._document = -1
        self._last_token: int | None = None
        self.made = self.positions = 0

    @property
    def searches(self) -> Searches:
        """What was saved of the tokens so far."""
        return Searches(self.made, 1 - self.made / max(self.positions, 1))

    def thinned(self, scores: Scores) -> Scores:
        """Return the scores with fewer neighbors; they continue those before.

        scores: with neighbors of every token that `SavingRule.matters`.
        """
        matters = self._rule.matters(scores.lm, scores.keys)
        self.positions += len(matters)
        if self._rule.pointers is None or not scores.neighbors:
            self.made += int(matters.sum())
            return scores
        spans = [span for window in scores.windows for span in window.spans]
        parts: list[list[Neighbors]] = []
        token = 0
        for span in spans:
            if self._walks is None or self._begins(span.document):
                self._walks, self._last_token = Walks(self._mixer, self._rule), None
            self._document = span.document
            for number in range(token, token + span.count):
                parts.append(self._step(self._walks, scores, number, bool(matters[number])))
            token += span.count
        joined = (_join(own) for own in zip(*parts, strict=True))
        return replace(scores, neighbors=tuple(joined))

    def _begins(self, document: int) -> bool:
        return self._boundary == Boundary.document and document != self._document

    def _step(self, walks: Walks, scores: Scores, number: int, matters: bool) -> list[Neighbors]:
        one = slice(number, number + 1)

        def found(some: torch.Tensor) -> list[Neighbors]:
            return [replace_rows(own, one) for own in scores.neighbors]

        before = walks.made
        tokens = None if self._last_token is None else [self._last_token]
        found_now = walks.step(tokens, scores.keys[one], torch.tensor([matters]), found)
        self.made += walks.made - before
        self._last_token = int(scores.targets[number])
        return found_now


def replace_rows(neighbors: Neighbors, some: slice) -> Neighbors:
    """Return the neighbors of some queries."""
    return replace(
        neighbors,
        squared_distances=neighbors.squared_distances[some],
        rows=neighbors.rows[some],
    )


def _join(parts: Sequence[Neighbors]) -> Neighbors:
    return Neighbors(
        torch.cat([part.squared_distances for part in parts]),
        torch.cat([part.rows for part in parts]),
        min(part.coverage for part in parts),
    )
