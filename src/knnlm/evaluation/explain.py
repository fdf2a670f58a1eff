"""Which entries of which documents spoke for each token of a text."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import DocumentsByRow
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.scoring import Scores, Wanted, score_windows
from knnlm.index.protocol import Neighbors
from knnlm.mixture.interpolation import Votes, interpolate
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever
from knnlm.text.windows import Window, Windowing, document_windows, stream_windows

THIS_TEXT = "(this text)"
"""The document of a source that the continuous cache remembers."""
_HEAVIEST_VOTES = 5


@runtime_checkable
class Explainable(Protocol):
    """What is explained: a language model and what is mixed with it, such as a KNNLM."""

    lm: LanguageModel
    mixer: Mixer

    @property
    def windowing(self) -> Windowing:
        """How text is cut into windows."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """One neighbor of a token.

    store: the path of its datastore; "", with row −1, of what the continuous cache remembers.
    weight: its share of p_kNN. position: of the entry in its document, in tokens. token: what it
    votes for; value is its text, in the passage before + value + after.
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
    """A token that neighbors vote for: how many, and their weight together, a share of p_kNN."""

    token: int
    text: str
    weight: float
    neighbors: int


@dataclass(frozen=True, slots=True)
class Credit:
    """What the entries of one document gave to the probability of a token, or of several.

    p is a sum of parts, (1 − λ) p_LM and λ times the weight of each neighbor that votes for the
    token. tokens: the document's parts, divided by p; of several tokens added up, so that those of
    all documents and the LM's rest are the number of tokens. store: as in `Source`.
    """

    store: str
    document: str
    tokens: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the LM and the datastore gave to one token of a text; log-probabilities in nats.

    knn_prob: p_kNN of the token; of several datastores, their mean by λ. sources: the neighbors
    with the greatest weight, whatever they vote for. votes: the heaviest, and in any case those of
    the sources and for the token itself. credits: of every document, the greatest first.
    """

    token: int
    text: str
    lm_log_prob: float
    knn_prob: float
    log_prob: float
    sources: tuple[Source, ...]
    votes: tuple[Vote, ...] = ()
    credits: tuple[Credit, ...] = ()

    @property
    def gain(self) -> float:
        """Nats that the datastore added to the token's log-probability."""
        return self.log_prob - self.lm_log_prob

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self) | {"gain": self.gain}


def explain(
    model: Explainable,
    text: str,
    *,
    generated: Sequence[int] = (),
    sources: int = 3,
    before: int = 24,
    after: int = 8,
) -> list[Explanation]:
    """Explain every token of a text.

    generated: tokens that follow it, such as a generation's, explained too. sources: neighbors
    named for each token. before, after: tokens of their passages. Raises InvalidArgumentError for a
    text without tokens and a datastore without entries.
    """
    lm, mixer = model.lm, model.mixer
    stores = [retriever.store for retriever in mixer.retrievers]
    if mixer.gate is None:
        mixer = replace(mixer, retrievers=tuple(m for m in mixer.retrievers if len(m.store) > 0))
    if not any(len(store) > 0 for store in stores):
        raise InvalidArgumentError(f"{stores[0].path} must have entries to explain with, got none")
    for name, number in [("sources", sources), ("before", before), ("after", after)]:
        if number < 0:
            raise InvalidArgumentError(f"{name} must be at least 0, got {number}")
    tokens = [*lm.encode([text])[0].tolist(), *generated]
    if not tokens:
        raise InvalidArgumentError("the text to explain must have a token, got none")
    explanations: list[Explanation] = []
    wanted = replace(Wanted.by(mixer, model.windowing.boundary), retrievers=mixer.retrievers)
    documents = [DocumentsByRow(retriever.store) for retriever in mixer.retrievers]
    for scores in score_windows(lm, text_windows(lm, tokens, model.windowing), wanted):
        text_before = [explanation.token for explanation in explanations]
        explanations += explain_scores(
            lm, mixer, scores, sources, before, after, text_before, documents
        )
    return explanations


def text_windows(
    lm: LanguageModel, tokens: Sequence[int], windowing: Windowing
) -> Iterator[Window]:
    """Cut one text's tokens into windows, as held-out documents are cut."""
    windowing.check_positions(lm.max_window, lm.name)
    size, context = windowing.window, windowing.context
    pieces = [np.array(tokens, np.int32)]
    if windowing.boundary == "document":
        return document_windows(0, pieces, lm.start_token, size, context)
    pieces.insert(0, np.array([lm.start_token], np.int32))
    return stream_windows([(0, pieces)], size, context, np.empty(0, np.int32))


def sum_credits(explanations: Iterable[Explanation]) -> tuple[Credit, ...]:
    """Return what each document gave to some tokens together, the greatest first."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for explanation in explanations:
        for credit in explanation.credits:
            sums[credit.store, credit.document] += credit.tokens
    return _sorted_credits(sums)


def _sorted_credits(sums: dict[tuple[str, str], float]) -> tuple[Credit, ...]:
    places = sorted(sums, key=lambda place: -sums[place])
    return tuple(Credit(store, document, sums[store, document]) for store, document in places)


def explain_scores(
    lm: LanguageModel,
    mixer: Mixer,
    scores: Scores,
    sources: int,
    before: int,
    after: int,
    text_before: Sequence[int] = (),
    documents: Sequence[DocumentsByRow] | None = None,
) -> Iterator[Explanation]:
    """Explain the targets of some scores, the neighbors being those of all the mixer's retrievers.

    text_before: the tokens before the targets, which a continuous cache remembers. documents: of
    each memory; None for explanations without credits.
    """
    retrievers = mixer.retrievers
    cache_neighbors = scores.cache_neighbors[0] if scores.cache_neighbors else None
    votes = mixer.votes(retrievers, scores.neighbors, cache_neighbors, scores.lm)
    of_targets = [of_source.for_targets(scores.targets) for of_source in votes]
    shares = _shares(votes)
    of_shares = [of_source.log_probs.exp() for of_source in of_targets]
    knn_probs = (shares * torch.stack(of_shares, dim=1)).sum(dim=1)
    log_probs = interpolate(scores.lm_log_probs, of_targets)
    weights = torch.cat(
        [v.log_weights.exp() * shares[:, which, None] for which, v in enumerate(votes)], dim=1
    )
    strongest = weights.sort(dim=1, descending=True, stable=True)  # nearest first among equals
    tokens = torch.cat([of_source.tokens for of_source in votes], dim=1)
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
            if which == len(retrievers):
                assert cache_neighbors is not None
                age = int(cache_neighbors.ages[number, place])
                if cache_neighbors.tokens[number, place] >= 0:
                    remembered = len(text_before) + number - age
                    distance = float(cache_neighbors.squared_distances[number, place])
                    named.append(
                        _recalled_source(lm, text, remembered, weight, distance, before, after)
                    )
                continue
            neighbors = scores.neighbors[which]
            if neighbors.rows[number, place] >= 0:
                row = int(neighbors.rows[number, place])
                distance = float(neighbors.squared_distances[number, place])
                named.append(_source(lm, retrievers[which], row, weight, distance, before, after))
        yield Explanation(
            token=token,
            text=lm.decode([token]),
            lm_log_prob=float(scores.lm_log_probs[number]),
            knn_prob=float(knn_probs[number]),
            log_prob=float(log_probs[number]),
            sources=tuple(named),
            votes=_heaviest_votes(
                lm, weights[number], tokens[number], {token, *(one.token for one in named)}
            ),
            credits=()
            if documents is None
            else _credits(votes, scores.neighbors, number, token, log_probs[number], documents),
        )


def _heaviest_votes(
    lm: LanguageModel,
    weights: Float[Tensor, " voter"],
    tokens: Int[Tensor, " voter"],
    wanted: Collection[int],
) -> tuple[Vote, ...]:
    """Return the heaviest votes and those for `wanted`; a token of −1 is that of no voter."""
    present = (tokens >= 0).numpy()
    found, group, counts = np.unique(
        tokens.numpy()[present], return_inverse=True, return_counts=True
    )
    sums = np.bincount(group, weights=weights.numpy()[present], minlength=len(found))
    return tuple(
        Vote(int(found[place]), lm.decode(found[[place]]), float(sums[place]), int(counts[place]))
        for rank, place in enumerate(np.argsort(-sums, kind="stable"))
        if rank < _HEAVIEST_VOTES or found[place] in wanted
    )


def _credits(
    votes: Sequence[Votes],
    neighbors: Sequence[Neighbors],
    number: int,
    token: int,
    log_prob: Float[Tensor, ""],
    documents: Sequence[DocumentsByRow],
) -> tuple[Credit, ...]:
    """Return what each document gave to the probability of one token."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for which, of_source in enumerate(votes):
        is_own = of_source.tokens[number] == token
        if which < len(neighbors):
            rows = neighbors[which].rows[number][is_own]
            places = [(documents[which].store, found.name) for found in documents[which].at(rows)]
        else:
            places = [("", THIS_TEXT)] * int(is_own.sum())
        lmbda = torch.as_tensor(of_source.lmbda).expand(len(of_source.tokens))[number]
        parts = (lmbda.log() + of_source.log_weights[number][is_own] - log_prob).exp()
        for place, part in zip(places, parts.tolist(), strict=True):
            if part > 0.0:
                sums[place] += part
    return _sorted_credits(sums)


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
        token=int(text[position]),
        weight=weight,
        squared_distance=squared_distance,
        before=lm.decode(text[max(position - before, 0) : position]),
        value=lm.decode([text[position]]),
        after=lm.decode(text[position + 1 : position + 1 + after]),
    )


def _source(
    lm: LanguageModel,
    retriever: Retriever,
    row: int,
    weight: float,
    squared_distance: float,
    before: int,
    after: int,
) -> Source:
    passage = retriever.store.passage(row, before, after)
    return Source(
        store=str(retriever.store.path),
        row=row,
        document=passage.document.name,
        position=row - passage.document.start,
        token=passage.value,
        weight=weight,
        squared_distance=squared_distance,
        before=lm.decode(passage.before),
        value=lm.decode([passage.value]),
        after=lm.decode(passage.after),
    )
