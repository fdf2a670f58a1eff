"""The kNN-LM behind the tools: one call at a time, each on the newest state of the datastores.

Knows no protocol.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from knnlm.apps.mcp.results import DocumentsResult, ExplainResult, SearchResult
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.rules import check_whole

MOST_PASSAGES, MOST_PASSAGE_TOKENS = 50, 1024
MOST_TOKENS = 1024  # in a text to explain
MOST_SOURCES = 10
MOST_DOCUMENTS = 1000


class Memory:
    """What the tools do. Every method raises InvalidArgumentError and what the model raises."""

    def __init__(self, model: KNNLM) -> None:
        self._model = model
        self._lock = threading.Lock()

    @contextmanager
    def _newest(self) -> Iterator[KNNLM]:
        with self._lock:
            self._model = self._model.reopened()
            yield self._model

    def search(self, text: str, passages: int, tokens: int) -> SearchResult:
        """Return the passages nearest to a text."""
        check_whole("passages", passages, most=MOST_PASSAGES)
        check_whole("tokens", tokens, most=MOST_PASSAGE_TOKENS)
        with self._newest() as model:
            return SearchResult.of(model.search(text, passages=passages, tokens=tokens))

    def explain(self, text: str, sources: int) -> ExplainResult:
        """Explain every token of a text."""
        check_whole("sources", sources, least=0, most=MOST_SOURCES)
        with self._newest() as model:
            length = len(model.encode(text))
            if not 1 <= length <= MOST_TOKENS:
                raise InvalidArgumentError(
                    f"text must have 1 to {MOST_TOKENS} tokens, got {length}: take a part of it"
                )
            return ExplainResult.of(model.explain(text, sources=sources))

    def documents(self, pattern: str, limit: int, offset: int) -> DocumentsResult:
        """Return the stored documents whose names match a pattern."""
        check_whole("limit", limit, most=MOST_DOCUMENTS)
        check_whole("offset", offset, least=0)
        with self._newest() as model:
            matching = [
                (retriever.store, document)
                for retriever in model.retrievers
                for document in retriever.store.documents()
                if fnmatchcase(document.name, pattern)
            ]
            return DocumentsResult.of(matching, limit, offset)
