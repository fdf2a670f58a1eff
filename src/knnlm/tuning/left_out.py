"""Searching a datastore for its own text, as if that text were new.

A stored token's document has no vote for it, nor has a copy of the document: see
`datastore/near_copies.py`. Of a document that is a large part of the datastore only the
neighborhood of the token is left out, as new text would find the rest of such a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.near_copies import Places, find_copies, places_of_rows
from knnlm.index.protocol import Neighbors
from knnlm.retrieval.retriever import Retriever

LARGE = 0.2
"""A document with so large a part of the entries is not left out as a whole."""
_NEAR = 20  # of a large document, a twentieth of the datastore before a token and after it,
_LEAST_NEAR = 8  # and at least a window, if that is no more than an eighth of the datastore
_FOUND_AT_ONCE = 1 << 23  # neighbors, before any is left out


@dataclass(frozen=True, slots=True)
class Queries:
    """Stored entries whose own keys are searched for: their rows, and their documents' places."""

    rows: Int64[np.ndarray, " query"]
    places: Int64[np.ndarray, " query"]

    def __getitem__(self, some: slice | Int64[np.ndarray, " _"]) -> "Queries":
        return Queries(self.rows[some], self.places[some])


class LeftOut:
    """What has no vote for each token of some documents, in one datastore.

    copies: the places, in `store`, of the other documents that are copies of each of them. own:
    whether they are themselves in `store`. large: those of which only `reach` rows before and after
    a token are left out. Documents are named by their places in their own datastore.
    """

    def __init__(
        self, store: Datastore, copies: dict[int, Places], own: bool, large: set[int], reach: int
    ) -> None:
        self.copies = copies
        self._own = own
        self._large = large
        self._reach = reach
        self._places = places_of_rows(store)
        self._flags = np.zeros(len(store.documents()), bool)

    def has_no_vote(
        self, queries: Queries, rows: Int[Tensor, "query k"]
    ) -> Bool[Tensor, "query k"]:
        """Return which rows are left out for each query; arbitrary where a row is −1."""
        found = rows.clamp_min(0).numpy()
        places = self._places[found]
        left_out = np.zeros(found.shape, bool)
        for place in np.unique(queries.places).tolist():
            mine = queries.places == place
            self._flags[self.copies[place]] = True
            left_out[mine] = self._flags[places[mine]]
            self._flags[self.copies[place]] = False
            if self._own:
                near = places[mine] == place
                if place in self._large:
                    near &= np.abs(found[mine] - queries.rows[mine, None]) <= self._reach
                left_out[mine] |= near
        return torch.from_numpy(left_out)


def large_documents(store: Datastore) -> set[int]:
    """Return the places of the documents that are too large a part to be left out as a whole."""
    return {
        place
        for place, document in enumerate(store.documents())
        if document.stop - document.start > LARGE * len(store)
    }


def leave_out(
    owner: Datastore, chosen: Sequence[int], stores: Sequence[Datastore]
) -> list[LeftOut]:
    """Return what is left out of each datastore for the documents of `owner` at some places."""
    entries, large = len(owner), large_documents(owner)
    window = owner.windowing.window
    reach = max(entries // _NEAR, min(window, entries // _LEAST_NEAR))
    left_out = []
    for store, found in zip(stores, find_copies(owner, chosen, stores), strict=True):
        own = store is owner
        copies = dict(zip(chosen, found, strict=True))
        if own:
            copies = {place: np.setdiff1d(some, [place]) for place, some in copies.items()}
        left_out.append(LeftOut(store, copies, own, large, reach))
    return left_out


def search_others(
    retriever: Retriever, queries: Queries, keys: Float[Tensor, "query dim"], left_out: LeftOut
) -> Neighbors:
    """Return the `parameters.k` nearest entries of each query that are not left out.

    Asks for twice as many, and for more where too many of them are left out.
    """
    k, most = retriever.parameters.k, len(retriever.store)
    distances = torch.full((len(keys), k), torch.inf)
    rows = torch.full((len(keys), k), -1, dtype=torch.int64)
    waiting, wanted = np.arange(len(keys)), min(2 * k, most)
    while len(waiting):
        unresolved = []
        for some in np.array_split(waiting, -(-len(waiting) * wanted // _FOUND_AT_ONCE)):
            neighbors = retriever.index.search(keys[some].float(), wanted)
            absent = left_out.has_no_vote(queries[some], neighbors.rows) | ~neighbors.present
            nearest = neighbors.squared_distances.masked_fill(absent, torch.inf)
            nearest, columns = nearest.topk(k, dim=1, largest=False)
            distances[some] = nearest
            rows[some] = neighbors.rows.gather(1, columns).masked_fill(nearest.isinf(), -1)
            # where the search found fewer than it was asked for, there are no more
            more = nearest[:, -1].isinf() & neighbors.present[:, -1]
            unresolved.append(some[more.numpy()])
        if wanted == most:
            break
        waiting, wanted = np.concatenate(unresolved), min(2 * wanted, most)
    return Neighbors(distances, rows)
