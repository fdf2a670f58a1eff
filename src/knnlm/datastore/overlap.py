"""Held-out text that datastores hold already: what is measured on it does not hold for new text."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt64

from knnlm.datastore.datastore import Datastore
from knnlm.model.reading import EncodedDocument

RUN = 32
"""So many tokens in the order of a stored text are a copy of it, not a common phrase."""
MUCH = 0.2
"""The share of copied tokens from which on a text is warned of: licenses and tables are less."""
_FACTOR = 0x9E3779B97F4A7C15
_ROWS_AT_ONCE = 1 << 20
_MARK_BITS = 22

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of a held-out text is stored.

    documents: how many have the same text as a stored one; one that was cut does not count.
    tokens: how many belong to runs of 32 or more that are stored in the same order.
    """

    documents: int
    tokens: int


def find_overlap(
    stores: Sequence[Datastore],
    documents: Sequence[EncodedDocument],
    targets: Sequence[Int32[np.ndarray, " _"]],
) -> Overlap:
    """Compare a held-out text with what is stored and not forgotten; warn of a large overlap.

    documents: those that were read. targets: their tokens, in consecutive parts. Reads the values
    of the datastores once, but no keys.
    """
    fingerprints = {stored.fingerprint for store in stores for stored in store.documents()}
    same = sum(one.exhausted and one.fingerprint() in fingerprints for one in documents)
    tokens = np.concatenate(targets) if targets else np.empty(0, np.int32)
    overlap = Overlap(same, _copied(tokens, stores))
    if overlap.documents or overlap.tokens > MUCH * len(tokens):
        _LOG.warning(
            "the held-out text is stored: %d of its %d documents are in the datastore, and %.0f %% "
            "of its tokens belong to passages that are; what is measured or tuned on them does not "
            "hold for new text, so use other text",
            overlap.documents,
            len(documents),
            100 * overlap.tokens / max(len(tokens), 1),
        )
    return overlap


def _copied(tokens: Int32[np.ndarray, " token"], stores: Sequence[Datastore]) -> int:
    """Return how many tokens belong to a run that is stored too."""
    runs, places = np.unique(run_hashes(tokens), return_inverse=True)
    if len(runs) == 0:
        return 0
    is_stored = np.zeros(len(runs), bool)
    marks = np.zeros(1 << _MARK_BITS, bool)  # rules most stored runs out at once
    marks[_mark(runs)] = True
    for store in stores:
        values, alive = store.values.numpy(), store.alive.numpy()
        for start in range(0, len(values), _ROWS_AT_ONCE):
            stored = run_hashes(values[start : start + _ROWS_AT_ONCE + RUN - 1])
            stored = stored[alive[start : start + len(stored)] & marks[_mark(stored)]]
            nearest = np.searchsorted(runs, stored).clip(max=len(runs) - 1)
            is_stored[nearest[runs[nearest] == stored]] = True
    edges = np.zeros(len(tokens) + 1, np.int64)
    begins = np.flatnonzero(is_stored[places])
    edges[begins] += 1
    edges[begins + RUN] -= 1
    return int((edges.cumsum() > 0).sum())


def _mark(hashes: UInt64[np.ndarray, " run"]) -> UInt64[np.ndarray, " run"]:
    marks: np.ndarray = hashes >> np.uint64(64 - _MARK_BITS)
    return marks


def run_hashes(tokens: Int32[np.ndarray, " token"]) -> UInt64[np.ndarray, " run"]:
    """Return a hash of the RUN tokens that begin at each token: a polynomial modulo 2⁶⁴.

    Fewer than RUN tokens have none.
    """
    hashes = tokens.astype(np.uint64) + np.uint64(1)
    length = 1
    while length < RUN:
        factor = np.uint64(pow(_FACTOR, length, 1 << 64))
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    return hashes
