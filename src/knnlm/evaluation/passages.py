"""The passages of the stored documents that are nearest to a text.

A search reads the text as the model does: the state after each of its tokens is a query. Of each
query's neighbors a passage counts with the nearest that it holds: 1 if that is the first of all,
1/2 if it is the second, and so on. Ranks, unlike distances, need no temperature.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.documents_by_row import DocumentsByRow
from knnlm.datastore.tables import StoredDocument
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import Explainable
from knnlm.model.encoding import check_text
from knnlm.model.language_model import LanguageModel
from knnlm.model.token_text import CONTEXT_TOKENS
from knnlm.retrieval.retriever import Retriever
from knnlm.rules import check_whole

NEIGHBORS = 64
"""How many neighbors of each token are looked at."""


@dataclass(frozen=True, slots=True)
class FoundPassage:
    """A stretch of a stored document that a search found.

    store: the path of its datastore. start, stop: its tokens, counted from the document's first.
    score: the sum over the text's tokens of 1 / rank of its nearest entry, of those that are among
    the 64 nearest; at most the number of tokens.
    """

    store: str
    document: str
    start: int
    stop: int
    score: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)


def search_passages(
    model: Explainable, text: str, *, passages: int = 5, tokens: int = 128
) -> list[FoundPassage]:
    """Return the stored passages nearest to a text, the nearest first.

    passages: how many at most. tokens: how long; documents are cut into stretches of this length.
    Raises InvalidArgumentError for numbers below 1, and for a text without tokens or with more than
    one window holds.
    """
    passages, tokens = check_whole("passages", passages), check_whole("tokens", tokens)
    keys = _keys(model, text)
    retrievers = [one for one in model.mixer.retrievers if len(one.store) > 0]
    scored = [passage for one in retrievers for passage in _score(one, keys, tokens)]
    scored.sort(key=lambda passage: -passage.score)
    return [_read(model.lm, passage, tokens) for passage in scored[:passages]]


class _Scored(NamedTuple):
    """A passage, which begins with a row of a document, before its text is read."""

    score: float
    store: Datastore
    document: StoredDocument
    row: int


def _keys(model: Explainable, text: str) -> Float[Tensor, "token dim"]:
    """Return the state after each token of a text."""
    check_text("text", text)
    lm = model.lm
    (encoded,) = lm.encode([text], control_tokens=model.windowing.control_tokens)
    most = model.windowing.window - 1
    if not 1 <= len(encoded) <= most:
        raise InvalidArgumentError(
            f"the text to search for must have 1 to {most} tokens, got {len(encoded)}: give "
            "a sentence or a paragraph"
        )
    return lm.keys(torch.tensor([[lm.start_token, *encoded.tolist()]]))[0, 1:]


def _score(retriever: Retriever, keys: Float[Tensor, "token dim"], tokens: int) -> list[_Scored]:
    """Return the passages near any key."""
    k = min(NEIGHBORS, len(retriever.store))
    neighbors = retriever.index.search(keys.float(), k)
    rows = neighbors.rows.cpu()
    queries, ranks = torch.nonzero(rows >= 0, as_tuple=True)
    rows = rows[queries, ranks]
    documents = DocumentsByRow(retriever.store).at(rows)
    starts = torch.tensor([document.start for document in documents], dtype=torch.int64)
    first = rows - (rows - starts) % tokens
    best = _best_of_each(queries, first, 1.0 / (1.0 + ranks))
    scores: dict[int, float] = {}
    for (_, passage), weight in best.items():
        scores[passage] = scores.get(passage, 0.0) + weight
    of_passage = dict(zip(first.tolist(), documents, strict=True))
    return [_Scored(scores[row], retriever.store, of_passage[row], row) for row in scores]


def _best_of_each(
    queries: Int[Tensor, " n"], passages: Int[Tensor, " n"], weights: Float[Tensor, " n"]
) -> dict[tuple[int, int], float]:
    """Return the greatest weight of each pair of a query and a passage."""
    best: dict[tuple[int, int], float] = {}
    for query, passage, weight in zip(
        queries.tolist(), passages.tolist(), weights.tolist(), strict=True
    ):
        best[query, passage] = max(best.get((query, passage), 0.0), weight)
    return best


def _read(lm: LanguageModel, passage: _Scored, tokens: int) -> FoundPassage:
    score, store, document, start = passage
    stop = min(start + tokens, document.stop)
    begin = max(start - CONTEXT_TOKENS, document.start)
    values: Sequence[int] = store.values[begin:stop].tolist()
    context = values[: start - begin]
    (text,) = lm.token_texts.cut([values[start - begin :]], context)
    first = document.start
    return FoundPassage(str(store.path), document.name, start - first, stop - first, score, text)
