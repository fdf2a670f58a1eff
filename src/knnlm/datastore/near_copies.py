"""Which stored documents are copies of others, or nearly: they say nothing about new text.

A near-copy is known by the runs of 32 tokens that both documents have: at least half of the
different runs of the shorter one. A phrase, a license or a table that many documents have is far
less than half of a document; two versions of a page have most of their runs in common.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.overlap import RUN, run_hashes

SHARE = 0.5
"""So large a part of the shorter document's runs makes a near-copy."""
_MOST_RUNS = 1 << 20  # that are compared: of longer texts only some, which their content chooses
_ROWS_AT_ONCE = 1 << 20

Places = Int64[np.ndarray, " document"]  # numbers of documents, in the order of `documents()`


class _Runs(NamedTuple):
    """The different runs of some documents, and which of the documents has which of them."""

    hashes: UInt64[np.ndarray, " run"]  # ascending
    of_document: list[Int64[np.ndarray, " _"]]  # numbers of runs


def places_of_rows(store: Datastore) -> Int32[np.ndarray, " rows"]:
    """Return each row's document, as its place among `store.documents()`; −1 where forgotten."""
    documents = store.documents()
    places = np.full(store.rows, -1, np.int32)
    sizes = [document.stop - document.start for document in documents]
    places[store.alive.numpy()] = np.repeat(np.arange(len(documents), dtype=np.int32), sizes)
    return places


def find_copies(
    owner: Datastore, chosen: Sequence[int], stores: Sequence[Datastore]
) -> list[list[Places]]:
    """Return the copies and near-copies of some documents, itself included where it is stored.

    chosen: their places among the documents of `owner`. Returns, for each of the stores, the places
    among its own documents for each that was chosen. Documents without a run are copies if their
    whole texts are equal. Reads the values of the datastores once, but no keys.
    """
    documents = owner.documents()
    own = [documents[place] for place in chosen]
    total = sum(document.stop - document.start for document in own)
    highest = np.uint64((1 << 64) // max(1, -(-total // _MOST_RUNS)) - 1)
    values = owner.values.numpy()
    kept = [_kept(run_hashes(values[d.start : d.stop]), highest) for d in own]
    hashes, places = np.unique(np.concatenate(kept), return_inverse=True)
    bounds = np.cumsum([len(each) for each in kept])[:-1]
    runs = _Runs(hashes, [np.unique(each) for each in np.split(places, bounds)])
    found = []
    for store in stores:
        by_fingerprint: dict[str, list[int]] = {}
        for place, document in enumerate(store.documents()):
            by_fingerprint.setdefault(document.fingerprint, []).append(place)
        near = _near_copies(store, runs, highest)
        found.append(
            [
                np.union1d(some, np.array(by_fingerprint.get(document.fingerprint, []), np.int64))
                for some, document in zip(near, own, strict=True)
            ]
        )
    return found


def _kept(hashes: UInt64[np.ndarray, " run"], highest: np.uint64) -> UInt64[np.ndarray, " kept"]:
    """Leave out runs where there are very many; a run is left out wherever it stands."""
    kept: np.ndarray = hashes[hashes <= highest]
    return kept


def _near_copies(store: Datastore, runs: _Runs, highest: np.uint64) -> list[Places]:
    """Return the places of the documents of `store` that share enough runs with each document."""
    held, holders, sizes = _holders(store, runs.hashes, highest)
    starts = np.searchsorted(held, np.arange(len(runs.hashes) + 1))
    found = []
    for own in runs.of_document:
        counts = starts[own + 1] - starts[own]
        ends = np.cumsum(counts)
        # the entries of `holders` for each of its runs, one range after the other
        entries = np.arange(counts.sum()) + np.repeat(starts[own] - ends + counts, counts)
        places, shared = np.unique(holders[entries], return_counts=True)
        found.append(places[shared >= SHARE * np.minimum(sizes[places], len(own))])
    return found


def _holders(
    store: Datastore, hashes: UInt64[np.ndarray, " run"], highest: np.uint64
) -> tuple[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"], Int64[np.ndarray, " document"]]:
    """Return (run, document) for each run that a document holds, ascending by run.

    Also returns how many different runs each document has.
    """
    values, places = store.values.numpy(), places_of_rows(store)
    sizes = np.zeros(len(store.documents()), np.int64)
    pairs = [np.empty(0, np.int64)]
    for start in range(0, len(values) if len(hashes) else 0, _ROWS_AT_ONCE):
        stored = run_hashes(values[start : start + _ROWS_AT_ONCE + RUN - 1])
        first = places[start : start + len(stored)]
        last = places[start + RUN - 1 :][: len(stored)]
        whole = (first == last) & (first >= 0) & (stored <= highest)
        stored, own = stored[whole], first[whole].astype(np.int64)
        order = np.lexsort((stored, own))  # a run that a document repeats counts once
        stored, own = stored[order], own[order]
        new = np.ones(len(own), bool)
        new[1:] = (stored[1:] != stored[:-1]) | (own[1:] != own[:-1])
        stored, own = stored[new], own[new]
        sizes += np.bincount(own, minlength=len(sizes))
        numbers = np.searchsorted(hashes, stored).clip(max=len(hashes) - 1)
        same = hashes[numbers] == stored
        pairs.append(numbers[same] * len(sizes) + own[same])
    held, holders = np.divmod(np.unique(np.concatenate(pairs)), max(len(sizes), 1))
    return held, holders, sizes
