"""The documents of many rows at once."""

import torch
from jaxtyping import Int
from torch import Tensor

from knnlm.datastore.catalog import StoredDocument
from knnlm.datastore.datastore import Datastore


class DocumentsByRow:
    """The documents of a datastore, without forgotten ones, for finding those of many rows.

    Holds the documents of one moment.
    """

    def __init__(self, store: Datastore) -> None:
        self.store = str(store.path)
        self._documents = store.documents()
        starts = [document.start for document in self._documents]
        self._starts = torch.tensor(starts, dtype=torch.int64)

    def at(self, rows: Int[Tensor, " n"]) -> list[StoredDocument]:
        """Return the document of each row."""
        return [self._documents[place] for place in self._places(rows).tolist()]

    def holding(self, rows: Int[Tensor, " n"]) -> list[StoredDocument]:
        """Return the documents that hold any of the rows, each once, in order."""
        return [self._documents[place] for place in torch.unique(self._places(rows)).tolist()]

    def _places(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return torch.searchsorted(self._starts, rows.contiguous(), right=True) - 1
