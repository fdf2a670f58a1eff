"""How each token of a text is explained: which entries of which documents voted for it."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import accumulate, compress
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore, Passage
from knnlm.datastore.documents_by_row import DocumentsByRow
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explanation import (
    THIS_TEXT,
    Credit,
    Explanation,
    Explanations,
    Source,
    Vote,
    sorted_credits,
)
from knnlm.evaluation.scoring import QUERIES_AT_ONCE, ScoreRequest, Scores, score_text
from knnlm.index.protocol import Neighbors
from knnlm.mixture.continuous_cache import CacheNeighbors
from knnlm.mixture.interpolation import Votes, interpolate
from knnlm.model.language_model import LanguageModel
from knnlm.model.token_text import CONTEXT_TOKENS
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever
from knnlm.rules import check_whole
from knnlm.text.windows import Windowing

_HEAVIEST_VOTES = 5


@runtime_checkable
class Explainable(Protocol):
    """A language model and everything that is mixed with it, such as a KNNLM."""

    lm: LanguageModel
    mixer: Mixer

    @property
    def windowing(self) -> Windowing:
        """How text is cut into windows."""
        ...


def explain(
    model: Explainable,
    text: str,
    *,
    generated: Sequence[int] = (),
    sources: int = 3,
    before: int = 24,
    after: int = 8,
) -> Explanations:
    """Explain every token of a text.

    generated: tokens that follow it, such as a generation's, which are explained too. sources: how
    many neighbors are named for each token. before, after: how many tokens of their passages.
    Raises InvalidArgumentError for a text without tokens and a datastore without entries.
    """
    if not isinstance(model, Explainable):
        raise InvalidArgumentError(
            f"model must be a KNNLM, got {model!r} ({type(model).__name__}): make one with "
            "KNNLM(model, store)"
        )
    (encoded,) = model.lm.encode([text], control_tokens=model.windowing.control_tokens)
    tokens = [*encoded.tolist(), *generated]
    explained = explain_tokens(model, tokens, sources=sources, before=before, after=after)
    return Explanations(explained)


def explain_tokens(
    model: Explainable,
    tokens: Sequence[int],
    *,
    sources: int = 3,
    before: int = 24,
    after: int = 8,
    tokens_at_once: int = QUERIES_AT_ONCE,
    with_credits: bool = True,
) -> Iterator[Explanation]:
    """Explain the tokens of a text one by one; see `explain`.

    tokens_at_once: how many are read and searched for together. with_credits: see `Explainer`.
    """
    if not tokens:
        raise InvalidArgumentError("the text to explain must have a token, got none")
    request = ScoreRequest.for_mixer(model.mixer, model.windowing.boundary)
    request = replace(request, retrievers=model.mixer.retrievers)
    scores = score_text(model.lm, tokens, model.windowing, request, tokens_at_once)
    return explain_scores(
        model,
        tokens,
        scores,
        sources=sources,
        before=before,
        after=after,
        with_credits=with_credits,
    )


def explain_scores(
    model: Explainable,
    tokens: Sequence[int],
    scores: Iterable[Scores],
    *,
    sources: int = 3,
    before: int = 24,
    after: int = 8,
    with_credits: bool = True,
) -> Iterator[Explanation]:
    """Explain the tokens of a text from their scores, in order; see `explain` and `Explainer`.

    The scores have neighbors from all the mixer's retrievers: k from each of them, or more.
    """
    mixer = model.mixer
    stores = [retriever.store for retriever in mixer.retrievers]
    if not any(len(store) > 0 for store in stores):
        raise InvalidArgumentError(f"{stores[0].path} must have entries to explain with, got none")
    for name, number in [("sources", sources), ("before", before), ("after", after)]:
        check_whole(name, number, least=0)
    has_votes = [mixer.gate is not None or len(store) > 0 for store in stores]
    retrievers = list(compress(mixer.retrievers, has_votes))
    explainer = Explainer(
        model.lm,
        retrievers,
        sources=sources,
        before=before,
        after=after,
        with_credits=with_credits,
    )
    texts = model.lm.token_texts.split(tokens)
    for part in scores:
        pairs = zip(retrievers, compress(part.neighbors, has_votes), strict=True)
        neighbors = [retriever.keep_nearest(deeper) for retriever, deeper in pairs]
        votes = mixer.votes(retrievers, neighbors, part.cache_neighbors, part.lm)
        evidence = Evidence(part.targets, part.lm_log_probs, votes, neighbors, part.cache_neighbors)
        yield from explainer.explain(evidence, texts)


class Evidence(NamedTuple):
    """All that the explanation of some consecutive tokens is made from.

    targets: the tokens; lm_log_probs: log p_LM of them. neighbors: of the key before each token,
    from each retriever. votes: of these neighbors, then of the continuous cache's, if it is used.
    """

    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    votes: Sequence[Votes]
    neighbors: Sequence[Neighbors]
    cache_neighbors: Sequence[CacheNeighbors] = ()


@dataclass
class Explainer:
    """Explains the tokens of one text, in order.

    retrievers: those that the evidence is from. text: the tokens before the first that is
    explained. sources, before, after: see `explain`. with_credits: whether to sum each document's
    part, for which all neighbors are looked up.
    """

    lm: LanguageModel
    retrievers: Sequence[Retriever]
    _: KW_ONLY
    text: Sequence[int] = ()
    sources: int = 3
    before: int = 24
    after: int = 8
    with_credits: bool = True

    def __post_init__(self) -> None:
        self._documents = [
            DocumentsByRow(own.store) for own in self.retrievers if self.with_credits
        ]
        self._text = [*self.text]  # and those so far, where the continuous cache's passages are

    def explain(self, evidence: Evidence, texts: Iterator[str]) -> Iterator[Explanation]:
        """Explain the next tokens of the text; `texts` are what they add to it."""
        targets, votes = evidence.targets.tolist(), evidence.votes
        seen = len(self._text)
        self._text += targets
        if not votes:
            for token, log_prob in zip(targets, evidence.lm_log_probs.tolist(), strict=True):
                text = next(texts)
                name = self.lm.token_texts.name(token, text)
                yield Explanation(token, text, name, log_prob, 0.0, log_prob)
            return
        components = [own.for_targets(evidence.targets) for own in votes]
        shares = _shares(votes)
        target_probs = torch.stack([component.log_probs.exp() for component in components], dim=1)
        knn_probs = (shares * target_probs).sum(dim=1)
        log_probs = interpolate(evidence.lm_log_probs, components)
        # the voters of all votes side by side
        weights = torch.cat(
            [own.log_weights.exp() * shares[:, n, None] for n, own in enumerate(votes)], dim=1
        )
        tokens = torch.cat([own.tokens for own in votes], dim=1)
        ordered = weights.sort(dim=1, descending=True, stable=True)  # nearest first among equals
        strongest = (part[:, : self.sources].tolist() for part in (ordered.indices, ordered.values))
        for number, (token, *named) in enumerate(zip(targets, *strongest, strict=True)):
            voters = map(partial(self._source, evidence, number), *named)
            sources = tuple(source for source in voters if source is not None)
            wanted = {token, *(source.token for source in sources)}
            text = next(texts)
            yield Explanation(
                token=token,
                text=text,
                name=self.lm.token_texts.name(token, text),
                lm_log_prob=float(evidence.lm_log_probs[number]),
                knn_prob=float(knn_probs[number]),
                log_prob=float(log_probs[number]),
                sources=sources,
                votes=self._heaviest_votes(
                    weights[number],
                    tokens[number],
                    wanted,
                    self._text[max(seen + number - CONTEXT_TOKENS, 0) : seen + number],
                ),
                credits=self._credits(evidence, number, log_probs[number]),
            )

    def _source(self, evidence: Evidence, number: int, column: int, weight: float) -> Source | None:
        """Return one voter of a token as a source, None where there is none.

        column: the voter's place in all votes side by side.
        """
        found: list[Neighbors | CacheNeighbors] = [*evidence.neighbors, *evidence.cache_neighbors]
        starts = [0, *accumulate(own.squared_distances.shape[1] for own in found)]
        which = bisect_right(starts, column) - 1
        nearest, place = found[which], (number, column - starts[which])
        if isinstance(nearest, Neighbors):
            row = int(nearest.rows[place])
            if row < 0:
                return None
            store = self.retrievers[which].store
            passage, texts = read_passage(self.lm, store, row, self.before, self.after)
            path, name = str(store.path), passage.document.name
            position, token = row - passage.document.start, passage.value
        else:
            if nearest.tokens[place] < 0:
                return None
            path, row, name, text = "", -1, THIS_TEXT, self._text
            position = len(text) - len(evidence.targets) + number - int(nearest.ages[place])
            token, start = text[position], max(position - self.before, 0)
            after = text[position + 1 : position + 1 + self.after]
            texts = self.lm.token_texts.cut([text[start:position], [token], after], text[:start])
        return Source(
            store=path,
            row=row,
            document=name,
            position=position,
            token=token,
            weight=weight,
            squared_distance=float(nearest.squared_distances[place]),
            before=texts[0],
            value=texts[1],
            after=texts[2],
        )

    def _heaviest_votes(
        self,
        weights: Float[Tensor, " voter"],
        tokens: Int[Tensor, " voter"],
        wanted: Collection[int],
        text: Sequence[int],
    ) -> tuple[Vote, ...]:
        """Return the heaviest votes and those for `wanted`; an absent voter's token is −1.

        text: the tokens before the one voted for.
        """
        present = (tokens >= 0).numpy()
        voted, group, counts = np.unique(
            tokens.numpy()[present], return_inverse=True, return_counts=True
        )
        sums = np.bincount(group, weights=weights.numpy()[present], minlength=len(voted))
        kept = [
            n
            for rank, n in enumerate(np.argsort(-sums, kind="stable"))
            if rank < _HEAVIEST_VOTES or voted[n] in wanted
        ]
        names = self.lm.token_texts.names(voted[kept].tolist(), text)
        return tuple(
            Vote(int(voted[n]), name, float(sums[n]), int(counts[n]))
            for n, name in zip(kept, names, strict=True)
        )

    def _credits(
        self, evidence: Evidence, number: int, log_prob: Float[Tensor, ""]
    ) -> tuple[Credit, ...]:
        """Return each document's part of the probability of one token."""
        if not self.with_credits:
            return ()
        sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        for which, own in enumerate(evidence.votes):
            for_token = own.tokens[number] == evidence.targets[number]
            if which < len(self.retrievers):
                rows = evidence.neighbors[which].rows[number][for_token]
                found = self._documents[which]
                documents = [(found.store, document.name) for document in found.at(rows)]
            else:
                documents = [("", THIS_TEXT)] * int(for_token.sum())
            log_weights = own.lmbda[number].log() + own.log_weights[number][for_token]
            parts = (log_weights - log_prob).exp()
            for document, part in zip(documents, parts.tolist(), strict=True):
                if part > 0.0:
                    sums[document] += part
        return sorted_credits(sums)


def read_passage(
    lm: LanguageModel, store: Datastore, row: int, before: int, after: int
) -> tuple[Passage, list[str]]:
    """Return the passage around an entry, and its text: before the value, of it, and after it.

    before, after: how many tokens; the passage also has the few before them that decide how they
    are written.
    """
    passage = store.passage(row, before + CONTEXT_TOKENS, after)
    left = passage.before.tolist()
    start = max(len(left) - before, 0)
    runs = [left[start:], [passage.value], passage.after.tolist()]
    return passage, lm.token_texts.cut(runs, left[:start])


def _shares(votes: Sequence[Votes]) -> Float[Tensor, "query source"]:
    """Return each source's share of p_kNN: by its λ, where it has neighbors.

    Where no source has weight, those with neighbors share it equally.
    """
    lmbdas = torch.stack([own.lmbda for own in votes], dim=1)
    present = torch.stack([own.log_weights.amax(dim=1) > -torch.inf for own in votes], dim=1)
    shares = lmbdas.where(lmbdas.any(dim=1, keepdim=True), present.float())
    return shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-30)
