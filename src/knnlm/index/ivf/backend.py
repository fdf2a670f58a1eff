"""The inverted file as a search backend: with a copy of the keys, or compressed to codes."""

from typing import Any

from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import IndexOptions
from knnlm.index.ivf.index import IVFIndex

_GROWN = 1.25  # times the rows it was built from: then an index is built again


class IVFBackend:
    """One of the two kinds of inverted file; both are opened alike."""

    takes_factory = False

    def __init__(self, *, compressed: bool = False) -> None:
        self._compressed = compressed

    def build(self, store: Datastore, options: IndexOptions) -> IVFIndex:
        """See `IVFIndex.build`."""
        return IVFIndex.build(store, options, compressed=self._compressed)

    def open(self, store: Datastore, device: str) -> IVFIndex:
        """Open the index that `build` wrote."""
        return IVFIndex(store, device)

    def report(self, store: Datastore) -> dict[str, Any]:
        """Return the facts in the report of the index's file."""
        return IVFIndex.stored_report(store).facts()

    def keep(self, store: Datastore, options: IndexOptions) -> None:
        """Build the index again after a compaction or much growth, else write the appended rows.

        Until they are a quarter of the whole, appended and forgotten entries need no rebuilding.
        """
        report = IVFIndex.stored_report(store)
        if report.numbering != store.numbering or store.rows > _GROWN * report.rows:
            self.build(store, options)
        elif store.rows > report.rows:
            IVFIndex.keep_appended(store, options.progress)
