"""Pointers: where the neighbors of a sequence's last position lead (RetoMaton, Alon et al. 2022).

What followed a neighbor in its text is a candidate for the sequence's next neighbors, if the
neighbor's value is the token that the sequence went on with. Knows neither the language model nor
when a search is made instead.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.protocol import Neighbors
from knnlm.retrieval.retriever import Retriever

_NONE = torch.empty(0, dtype=torch.int64)


class Pointers:
    """The entries of one datastore that one sequence's last neighbors lead to.

    They are rows of the snapshot that the datastore is at: whatever is committed to it afterwards
    and seen by it (`Datastore.refresh`), pointers from before are gone, as rows may have moved.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._successors = _Successors(retriever.store)
        self._neighbors = _NONE  # rows near the last position
        self._rows = _NONE  # what followed those with the right token

    def __len__(self) -> int:
        """Return how many entries can be reached."""
        return len(self._rows)

    def copy(self) -> "Pointers":
        """Return the same pointers, to go on from differently."""
        return copy.copy(self)  # tensors are replaced, never written to

    def start(self, rows: Int[Tensor, " neighbor"]) -> None:
        """Take the neighbors of the newest position, −1 where absent, as those to go on from."""
        self._neighbors, self._rows = rows[rows >= 0].cpu(), _NONE

    def follow(self, token: int) -> None:
        """Go on to what followed the neighbors whose value is the token that came."""
        if not self._successors.are_current:
            self._successors = _Successors(self._retriever.store)
            self._neighbors = _NONE
        values = self._retriever.store.values
        agreeing = self._neighbors[values[self._neighbors] == token]
        self._rows = self._successors.of(agreeing)
        self._neighbors = _NONE

    def reach(self, key: Float[Tensor, " dim"]) -> Neighbors:
        """Return the reached entries nearest to a key, one query's, with exact distances.

        They are the neighbors to go on from. As many as a search returns, absent ones among them.
        """
        k = self._retriever.parameters.k
        stored = self._retriever.store.keys_at(self._rows).float()
        squared = (stored - key.detach().float().cpu()).square().sum(dim=1)
        nearest, places = squared.sort(stable=True)
        missing = max(k - len(nearest), 0)
        distances = torch.nn.functional.pad(nearest[:k], (0, missing), value=torch.inf)
        rows = torch.nn.functional.pad(self._rows[places[:k]], (0, missing), value=-1)
        self.start(self._rows)
        return Neighbors(distances[None].to(key.device), rows[None].to(key.device))


class _Successors:
    """Which row follows a row in its document, in one state of a datastore."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self._generation = store.generation
        stored = sorted((d.start, d.stop) for d in store.documents() if d.stop > d.start)
        edges = torch.tensor(stored, dtype=torch.int64).reshape(-1, 2)
        self._starts, self._stops = edges[:, 0].contiguous(), edges[:, 1].contiguous()

    @property
    def are_current(self) -> bool:
        """Whether the datastore is still in that state."""
        return self._store.generation == self._generation

    def of(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " successor"]:
        """Return the rows that follow; none after a document's end, or in a forgotten one."""
        if not len(self._starts):
            return _NONE
        places = torch.searchsorted(self._starts, rows, right=True) - 1
        follows = (places >= 0) & (rows + 1 < self._stops[places.clamp_min(0)])
        return rows[follows] + 1
