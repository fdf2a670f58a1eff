"""The states of a datastore, as client and actors compare them: equal ones are searched alike."""

import hashlib
import json
from dataclasses import asdict
from typing import NamedTuple

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import StoredIndex, stored_index


class State(NamedTuple):
    """A state of a datastore and its index.

    fingerprint: a digest of all that a search depends on: files, numbers of rows, what is
    forgotten, the index. A copy of a datastore has the fingerprints of the original.
    """

    generation: int
    fingerprint: str


def state_of(store: Datastore, index: StoredIndex | None = None) -> State:
    """Return the state of an open datastore; index: its record, by default the newest."""
    index = index or stored_index(store.catalog)
    contents = [
        asdict(store.settings),
        store.generation,
        store.numbering,
        [asdict(shard) for shard in store.shards],
        asdict(index),
    ]
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return State(store.generation, digest)
