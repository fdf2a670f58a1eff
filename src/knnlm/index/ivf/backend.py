"""The inverted file as a search backend: with a copy of the keys, or with codes alone."""

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import IndexFile, StoredIndex
from knnlm.index.backend import Built, IndexOptions
from knnlm.index.ivf.index import IVFIndex

_GROWN = 1.25  # times the rows it was built from: then an index is built again


class IVFBackend:
    """One of the kinds of inverted file; all are opened alike."""

    takes_factory = False

    def __init__(self, kind: IndexKind) -> None:
        self._kind = kind

    def build(self, store: Datastore, options: IndexOptions) -> Built:
        """See `IVFIndex.build`."""
        index = IVFIndex.build(store, options, kind=self._kind)
        return Built(index, index.report, (index.file,))

    def open(self, store: Datastore, device: str) -> IVFIndex:
        """Open the index that the catalog names."""
        return IVFIndex(store, device)

    def keep(
        self, store: Datastore, stored: StoredIndex, options: IndexOptions
    ) -> tuple[IndexFile, ...] | None:
        """Write the appended rows to a file; after much growth the index is to be built again.

        Until they are a quarter of the whole, appended and forgotten entries need no rebuilding.
        """
        if store.rows > _GROWN * stored.files[0].stop:
            return None
        return IVFIndex.keep_appended(store, stored.files, options.progress, options.memory)
