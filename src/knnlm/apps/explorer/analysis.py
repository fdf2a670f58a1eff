"""A text → all that the page needs to recompute its mixture for any λ, k and temperature.

Knows the kNN-LM; knows no page and no protocol.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.apps.engine.turns import Turns, finish
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.documents_by_row import DocumentsByRow
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import explain_scores, read_passage
from knnlm.evaluation.explanation import Explanation
from knnlm.evaluation.scoring import (
    QUERIES_AT_ONCE,
    ScoreRequest,
    Scores,
    mixed_log_probs,
    score_text,
)
from knnlm.index.protocol import Neighbors
from knnlm.index.report import describe_index
from knnlm.knn_lm import KNNLM
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import Likeliest
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever

LEAST_K = 256
"""The least number of neighbors to search for, so that k can be raised too."""
_LM_TOKENS = 10  # how many of the LM's likeliest tokens are shown for each position
_MOST_DOCUMENTS = 1000  # that are named for each datastore
_BEFORE, _AFTER = 40, 16  # tokens of a passage
_NEIGHBOR_BYTES = 16  # of a neighbor in the page's data
_PASSAGES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Analysis:
    """A text's tokens with their LM probabilities and neighbors, for any λ, k and T.

    generated_from: the number of the first token that the model generated; that of all tokens if
    it generated none. lm_top: the LM's likeliest tokens at each position. neighbors: in each
    retriever, its k nearest or more. weights: those of the model's own mixture (see
    `Mixer.weights`); log_probs: the tokens' under that mixture. Log-probabilities are in nats.
    """

    lm: LanguageModel
    retrievers: tuple[Retriever, ...]
    weights: str
    tokens: Int[Tensor, " token"]
    generated_from: int
    lm_log_probs: Float[Tensor, " token"]
    lm_top: Int[Tensor, "token top"]
    lm_top_log_probs: Float[Tensor, "token top"]
    neighbors: tuple[Neighbors, ...]
    log_probs: Float[Tensor, " token"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; arrays as base64, little-endian."""
        return finish(self.to_dict_in_turns())

    def to_dict_in_turns(self) -> Turns[dict[str, Any]]:
        """Do what `to_dict` does, in turns."""
        values, datastores = [], []
        for retriever, neighbors in zip(self.retrievers, self.neighbors, strict=True):
            values.append(retriever.tokens(neighbors))
            datastores.append(_retrieved_to_dict(retriever, neighbors, values[-1]))
            yield
        mentioned = torch.cat([self.tokens, self.lm_top.flatten(), *(v.flatten() for v in values)])
        named = np.unique(mentioned.numpy()).tolist()
        yield
        texts = self.lm.token_texts
        named = [token for token in named if token >= 0]
        vocabulary = dict(zip(map(str, named), texts.names(named), strict=True))
        yield
        return {
            "model": self.lm.name,
            "pieces": list(texts.split(self.tokens.tolist())),
            "tokens": _packed(self.tokens, "<i4"),
            "generated_from": self.generated_from,
            "lm_log_probs": _packed(self.lm_log_probs, "<f4"),
            "lm_top": _packed(self.lm_top, "<i4"),
            "lm_top_log_probs": _packed(self.lm_top_log_probs, "<f4"),
            "tuned_log_probs": None if self.weights == "fixed" else _packed(self.log_probs, "<f4"),
            "vocabulary": vocabulary,
            "datastores": datastores,
        }

    def strongest_rows(self, sources: int) -> list[list[int]]:
        """Return the rows, in each retriever, that matter most for some token.

        These are each token's `sources` nearest neighbors, and the `sources` nearest of those that
        vote for it.
        """
        rows = []
        for retriever, neighbors in zip(self.retrievers, self.neighbors, strict=True):
            chosen = retriever.tokens(neighbors) == self.tokens[:, None]
            chosen &= chosen.cumsum(dim=1) <= sources
            chosen[:, :sources] |= neighbors.present[:, :sources]
            rows.append(np.unique(neighbors.rows[chosen].numpy()).tolist())
        return rows


def analyze(model: KNNLM, text: str, generated: Sequence[int] = ()) -> Analysis:
    """Read a text and find its neighbors.

    generated: the tokens that the model generated after it. The continuous cache is left out.
    Raises InvalidArgumentError for a text without tokens.
    """
    return finish(analyze_in_turns(model, model.encode(text), generated))


def analyze_in_turns(
    model: KNNLM,
    tokens: Sequence[int],
    generated: Sequence[int] = (),
    tokens_at_once: int = QUERIES_AT_ONCE,
) -> Turns[Analysis]:
    """Do what `analyze` does with the tokens of a text; each turn reads some of them."""
    if not tokens and not generated:
        raise InvalidArgumentError("text must have a token, got none: write something")
    scores = []
    for part in _read(model, [*tokens, *generated], tokens_at_once):
        scores.append(part)
        yield
    return _analysis(model, scores, len(tokens))


def answer_bytes(model: KNNLM, tokens: int) -> int:
    """Return the size of an analysis as JSON, about, without making it."""
    return tokens * _NEIGHBOR_BYTES * sum(_deep_k(one) for one in model.retrievers)


def analyze_and_explain(
    model: KNNLM, text: str, generated: Sequence[int] = (), sources: int = 3
) -> tuple[Analysis, list[Explanation]]:
    """Return the results of `analyze` and `model.explain` from one reading of the text."""
    tokens = [*model.encode(text), *generated]
    if not tokens:
        raise InvalidArgumentError("the text to explain must have a token, got none")
    scores = list(_read(model, tokens))
    explanations = list(explain_scores(model, tokens, scores, sources=sources))
    return _analysis(model, scores, len(tokens) - len(generated)), explanations


def _deep_k(retriever: Retriever) -> int:
    return max(retriever.parameters.k, min(LEAST_K, len(retriever.store)))


def _read(
    model: KNNLM, tokens: Sequence[int], tokens_at_once: int = QUERIES_AT_ONCE
) -> Iterator[Scores]:
    """Read a text, with more neighbors of each token than its retrievers' k."""
    deep = tuple(
        replace(retriever, parameters=replace(retriever.parameters, k=_deep_k(retriever)))
        for retriever in model.retrievers
    )
    request = replace(
        ScoreRequest.for_mixer(model.mixer, model.windowing.boundary),
        retrievers=deep,
        likeliest=_LM_TOKENS,
    )
    return score_text(model.lm, tokens, model.windowing, request, tokens_at_once)


def _analysis(model: KNNLM, scores: Sequence[Scores], generated_from: int) -> Analysis:
    # a gate that has the cache among its inputs cannot mix without it
    mixer = model.mixer
    if mixer.cache is not None:
        mixer = Mixer(mixer.retrievers)
    likeliest = Likeliest.join([part.likeliest for part in scores if part.likeliest is not None])
    return Analysis(
        lm=model.lm,
        retrievers=mixer.retrievers,
        weights=mixer.weights,
        tokens=torch.cat([part.targets for part in scores]).long(),
        generated_from=generated_from,
        lm_log_probs=torch.cat([part.lm_log_probs for part in scores]),
        lm_top=likeliest.tokens,
        lm_top_log_probs=likeliest.log_probs,
        neighbors=tuple(
            Neighbors(
                torch.cat([part.neighbors[number].squared_distances for part in scores]),
                torch.cat([part.neighbors[number].rows for part in scores]),
            )
            for number in range(len(mixer.retrievers))
        ),
        log_probs=torch.cat([_mixed_log_probs(part, mixer) for part in scores]),
    )


def _mixed_log_probs(scores: Scores, mixer: Mixer) -> Float[Tensor, " token"]:
    searched = mixer.searched
    neighbors = tuple(
        retriever.keep_nearest(neighbors)
        for retriever, neighbors in zip(mixer.retrievers, scores.neighbors, strict=True)
        if retriever in searched
    )
    return mixed_log_probs(replace(scores, neighbors=neighbors, cache_neighbors=()), mixer)


def read_passages(
    lm: LanguageModel, retrievers: Sequence[Retriever], rows: Sequence[Sequence[int]]
) -> list[dict[str, dict[str, str]]]:
    """Return the text before, at and after some rows of each retriever; by row.

    rows: for each retriever. Passages of forgotten documents are left out. Raises
    InvalidArgumentError for a row beyond the datastore's last.
    """
    return finish(read_passages_in_turns(lm, retrievers, rows))


def read_passages_in_turns(
    lm: LanguageModel, retrievers: Sequence[Retriever], rows: Sequence[Sequence[int]]
) -> Turns[list[dict[str, dict[str, str]]]]:
    """Do what `read_passages` does, in turns."""
    passages_by_retriever = []
    for retriever, retriever_rows in zip(retrievers, rows, strict=True):
        passages = {}
        for number, row in enumerate(retriever_rows, start=1):
            if number % _PASSAGES_AT_ONCE == 0:
                yield
            if not 0 <= row < retriever.store.rows:
                raise InvalidArgumentError(
                    f"rows must be below {retriever.store.rows}, the entries of "
                    f"{retriever.store.path}, got {row}"
                )
            passage, texts = read_passage(lm, retriever.store, row, _BEFORE, _AFTER)
            if not passage.document.forgotten:
                passages[str(row)] = dict(zip(("before", "value", "after"), texts, strict=True))
        passages_by_retriever.append(passages)
    return passages_by_retriever


def stores_to_dicts(retrievers: Sequence[Retriever]) -> list[dict[str, Any]]:
    """Return facts about each datastore, its index, its parameters and its largest documents."""
    dicts = []
    for retriever in retrievers:
        store = retriever.store
        documents = sorted(store.documents(), key=lambda document: document.start - document.stop)
        dicts.append(
            {
                "path": str(store.path),
                "model": store.settings.model,
                "key": store.settings.key,
                "entries": len(store),
                "forgotten_entries": store.forgotten_rows,
                "size_bytes": sum(shard.file.size_bytes for shard in store.shards),
                "index": describe_index(store.catalog),
                "parameters": asdict(retriever.parameters),
                "is_tuned": store.parameters is not None,
                "is_learned": store.is_learned,
                "is_unverified": store.is_unverified,
                "documents": len(documents),
                "largest_documents": [
                    {"name": document.name, "entries": document.stop - document.start}
                    for document in documents[:_MOST_DOCUMENTS]
                ],
            }
        )
    return dicts


def _retrieved_to_dict(
    retriever: Retriever, neighbors: Neighbors, values: Int[Tensor, "token k"]
) -> dict[str, Any]:
    """Return what was found in a retriever as plain values. values: the neighbors' tokens."""
    return {
        "path": str(retriever.store.path),
        "entries": len(retriever.store),
        "numbering": retriever.store.numbering,
        "parameters": asdict(retriever.parameters),
        "k": neighbors.rows.shape[1],
        "squared_distances": _packed(neighbors.squared_distances, "<f4"),
        "rows": _packed(neighbors.rows, "<i4"),
        "values": _packed(values, "<i4"),
        "documents": _documents_to_dicts(retriever.store, neighbors.rows),
    }


def _documents_to_dicts(store: Datastore, rows: Int[Tensor, "token k"]) -> list[dict[str, Any]]:
    """Return the documents that hold some of the rows, in order."""
    return [
        {"name": document.name, "start": document.start, "stop": document.stop}
        for document in DocumentsByRow(store).holding(rows[rows >= 0])
    ]


def _packed(values: Tensor, dtype: str) -> str:
    return base64.b64encode(values.numpy().astype(dtype).tobytes()).decode("ascii")
