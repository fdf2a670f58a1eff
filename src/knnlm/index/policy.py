"""Which index a datastore is searched with."""

from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Index

KINDS = ("auto", "exact")


def open_index(store: Datastore, kind: str = "auto", device: str = "cpu") -> Index:
    """Open the index of a datastore.

    kind: "exact", or "auto": what fits the datastore best, which is exact search.

    Raises InvalidArgumentError.
    """
    if kind not in KINDS:
        raise InvalidArgumentError(f"index must be one of {', '.join(KINDS)}, got {kind!r}")
    return ExactIndex(store, device)
