"""Which entries of which documents spoke for each token of a text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from knnlm.corpus import Document
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.mixture.interpolation import neighbor_log_weights
from knnlm.perplexity import evaluation_scores
from knnlm.scoring import Scores, mixed_log_probs, votes_for_targets


@dataclass(frozen=True, slots=True)
class Source:
    """One neighbor of a token.

    weight: its share of p_kNN. position: of the entry in its document, in tokens. value: the token
    that it votes for, in the passage before + value + after.
    """

    row: int
    document: str
    position: int
    weight: float
    squared_distance: float
    before: str
    value: str
    after: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the LM and the datastore gave to one token of a text; log-probabilities in nats.

    knn_prob: p_kNN of the token. sources: the neighbors with the greatest weight, whatever they
    vote for.
    """

    token: int
    text: str
    lm_log_prob: float
    knn_prob: float
    log_prob: float
    sources: tuple[Source, ...]

    @property
    def gain(self) -> float:
        """Nats that the datastore added to the token's log-probability."""
        return self.log_prob - self.lm_log_prob

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self) | {"gain": self.gain}


def explain(
    model: KNNLM, text: str, *, sources: int = 3, before: int = 24, after: int = 8
) -> list[Explanation]:
    """Explain every token of a text.

    sources: neighbors named for each token. before, after: tokens of their passages. Raises
    InvalidArgumentError for a text without tokens and a datastore without entries.
    """
    if len(model.store) == 0:
        raise InvalidArgumentError(
            f"{model.store.path} must have entries to explain with, got none"
        )
    for name, number in [("sources", sources), ("before", before), ("after", after)]:
        if number < 0:
            raise InvalidArgumentError(f"{name} must be at least 0, got {number}")
    explanations: list[Explanation] = []
    for scores in evaluation_scores(
        model.lm,
        model.index,
        model.parameters.k,
        [Document("text", text)],
        model.store.windowing,
    ):
        explanations += _explain_scores(model, scores, sources, before, after)
    if not explanations:
        raise InvalidArgumentError("the text to explain must have a token, got none")
    return explanations


def _explain_scores(
    model: KNNLM, scores: Scores, sources: int, before: int, after: int
) -> Iterator[Explanation]:
    assert scores.neighbors is not None
    neighbors = scores.neighbors
    weights = neighbor_log_weights(neighbors.squared_distances, model.parameters.temperature).exp()
    votes = votes_for_targets(model.store, neighbors, scores.targets)
    knn_probs = (weights * votes).sum(dim=1).tolist()
    mixed = mixed_log_probs(scores, model.store, model.parameters).tolist()
    lm_log_probs = scores.lm_log_probs.tolist()
    for number, token in enumerate(scores.targets.tolist()):
        named = []
        # ascending distance is descending weight
        for place in torch.nonzero(neighbors.present[number])[:sources, 0].tolist():
            row = int(neighbors.rows[number, place])
            passage = model.store.passage(row, before, after)
            named.append(
                Source(
                    row=row,
                    document=passage.document.name,
                    position=row - passage.document.start,
                    weight=float(weights[number, place]),
                    squared_distance=float(neighbors.squared_distances[number, place]),
                    before=model.lm.decode(passage.before),
                    value=model.lm.decode([passage.value]),
                    after=model.lm.decode(passage.after),
                )
            )
        yield Explanation(
            token=token,
            text=model.lm.decode([token]),
            lm_log_prob=lm_log_probs[number],
            knn_prob=knn_probs[number],
            log_prob=mixed[number],
            sources=tuple(named),
        )
