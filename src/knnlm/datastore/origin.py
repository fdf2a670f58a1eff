"""Where the entries of an imported datastore come from, and whether they are proved.

The only owner of that setting of the catalog. Imports no torch.
"""

from typing import Any

from knnlm.datastore.catalog import Catalog

_SETTING = "origin"


def read_origin(catalog: Catalog) -> dict[str, Any] | None:
    """Return what an import recorded; None for a datastore that was built from text.

    format: see `ArrayFormat`. files: path, size_bytes and time_ns of each. entries: how many were
    imported. cut_after: the token that ended documents, or None. first_block: the first row at
    which a whole block of a stream begins. verified: whether a model proved
    them, and proof: the fields of `Proof`, or None.
    """
    origin: dict[str, Any] | None = catalog.get(_SETTING)
    return origin


def store_origin(catalog: Catalog, origin: dict[str, Any]) -> None:
    """Record where entries come from; inside a transaction."""
    catalog.set(_SETTING, origin)


def is_unverified(catalog: Catalog) -> bool:
    """Return whether entries were imported, and no model has proved that their keys are its own."""
    origin = read_origin(catalog)
    return origin is not None and not origin["verified"]
