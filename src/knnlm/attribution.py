"""Which entries of which documents spoke for each token of a text."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.corpus import Document
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.language_model import LanguageModel
from knnlm.memory import Memory
from knnlm.mixer import Mixer
from knnlm.mixture.interpolation import Votes, interpolate
from knnlm.perplexity import evaluation_scores
from knnlm.scoring import Scores, Wanted

THIS_TEXT = "(this text)"
"""The document of a source that the continuous cache remembers."""


@dataclass(frozen=True, slots=True)
class Source:
    """One neighbor of a token.

    store: the path of its datastore; "", with row −1, of what the continuous cache remembers.
    weight: its share of p_kNN. position: of the entry in its document, in tokens. value: the token
    that it votes for, in the passage before + value + after.
    """

    store: str
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

    knn_prob: p_kNN of the token; of several datastores, their mean by λ. sources: the neighbors
    with the greatest weight, whatever they vote for.
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
    mixer = model.mixer
    if mixer.gate is None:
        memories = tuple(memory for memory in model.memories if len(memory.store) > 0)
        mixer = replace(mixer, memories=memories)
    if not any(len(memory.store) > 0 for memory in mixer.memories):
        raise InvalidArgumentError(
            f"{model.memories[0].store.path} must have entries to explain with, got none"
        )
    for name, number in [("sources", sources), ("before", before), ("after", after)]:
        if number < 0:
            raise InvalidArgumentError(f"{name} must be at least 0, got {number}")
    explanations: list[Explanation] = []
    wanted = replace(Wanted.by(mixer, model.windowing.boundary), memories=mixer.memories)
    for scores in evaluation_scores(model.lm, wanted, [Document("text", text)], model.windowing):
        text_before = [explanation.token for explanation in explanations]
        explanations += explain_scores(model.lm, mixer, scores, sources, before, after, text_before)
    if not explanations:
        raise InvalidArgumentError("the text to explain must have a token, got none")
    return explanations


def explain_scores(
    lm: LanguageModel,
    mixer: Mixer,
    scores: Scores,
    sources: int,
    before: int,
    after: int,
    text_before: Sequence[int] = (),
) -> Iterator[Explanation]:
    """Explain the targets of some scores, the neighbors being those of all the mixer's memories.

    text_before: the tokens before the targets, which a continuous cache remembers.
    """
    memories = mixer.memories
    recalled = scores.recalled[0] if scores.recalled else None
    votes = mixer.votes(memories, scores.neighbors, recalled, scores.lm)
    of_targets = [of_source.for_targets(scores.targets) for of_source in votes]
    shares = _shares(votes)
    of_shares = [of_source.log_probs.exp() for of_source in of_targets]
    knn_probs = (shares * torch.stack(of_shares, dim=1)).sum(dim=1)
    mixed = interpolate(scores.lm_log_probs, of_targets).tolist()
    weights = [
        of_source.log_weights.exp() * shares[:, which, None]
        for which, of_source in enumerate(votes)
    ]
    # nearest first among equals
    strongest = torch.cat(weights, dim=1).sort(dim=1, descending=True, stable=True)
    text = [*text_before, *scores.targets.tolist()]
    for number, token in enumerate(scores.targets.tolist()):
        named = []
        for weight, place in zip(
            strongest.values[number, :sources].tolist(),
            strongest.indices[number, :sources].tolist(),
            strict=True,
        ):
            which = 0
            while place >= votes[which].tokens.shape[1]:
                place -= votes[which].tokens.shape[1]
                which += 1
            if which == len(memories):
                assert recalled is not None
                age = int(recalled.ages[number, place])
                if recalled.tokens[number, place] >= 0:
                    remembered = len(text_before) + number - age
                    distance = float(recalled.squared_distances[number, place])
                    named.append(
                        _recalled_source(lm, text, remembered, weight, distance, before, after)
                    )
                continue
            neighbors = scores.neighbors[which]
            if neighbors.rows[number, place] >= 0:
                row = int(neighbors.rows[number, place])
                distance = float(neighbors.squared_distances[number, place])
                named.append(_source(lm, memories[which], row, weight, distance, before, after))
        yield Explanation(
            token=token,
            text=lm.decode([token]),
            lm_log_prob=float(scores.lm_log_probs[number]),
            knn_prob=float(knn_probs[number]),
            log_prob=mixed[number],
            sources=tuple(named),
        )


def _shares(votes: Sequence[Votes]) -> Float[Tensor, "query source"]:
    """Return the part of p_kNN that each source speaks for: by its λ, where it has a say."""
    present = torch.stack([of_source.present for of_source in votes], dim=1)
    lmbdas = torch.stack([torch.as_tensor(v.lmbda).expand(len(v.present)) for v in votes], dim=1)
    lmbdas = torch.where(present, lmbdas, 0.0)
    total = lmbdas.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0.0, lmbdas, present.float())  # of no weight: alike
    return shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-30)


def _recalled_source(
    lm: LanguageModel,
    text: Sequence[int],
    position: int,
    weight: float,
    squared_distance: float,
    before: int,
    after: int,
) -> Source:
    return Source(
        store="",
        row=-1,
        document=THIS_TEXT,
        position=position,
        weight=weight,
        squared_distance=squared_distance,
        before=lm.decode(text[max(position - before, 0) : position]),
        value=lm.decode([text[position]]),
        after=lm.decode(text[position + 1 : position + 1 + after]),
    )


def _source(
    lm: LanguageModel,
    memory: Memory,
    row: int,
    weight: float,
    squared_distance: float,
    before: int,
    after: int,
) -> Source:
    passage = memory.store.passage(row, before, after)
    return Source(
        store=str(memory.store.path),
        row=row,
        document=passage.document.name,
        position=row - passage.document.start,
        weight=weight,
        squared_distance=squared_distance,
        before=lm.decode(passage.before),
        value=lm.decode([passage.value]),
        after=lm.decode(passage.after),
    )
