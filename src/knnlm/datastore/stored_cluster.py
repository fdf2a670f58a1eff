"""What the catalog records of the cluster that searches a datastore.

The record is all that a client needs to find the actors. Without one, a datastore is searched in
the process that opens it.
"""

from dataclasses import asdict, dataclass

from knnlm.datastore.catalog import Catalog

_SETTING = "cluster"


@dataclass(frozen=True, slots=True)
class StoredCluster:
    """The actors that search a datastore.

    address: of the Ray cluster. namespace: in Ray, of the actors. Each of `shares` actors holds a
    share of the entries, and there are `replicas` actors for each share. deadline_seconds: for a
    request of up to 16 queries. is_open: whether all actors have been started and have opened
    their shares; until then the datastore is searched in the process that opens it.
    """

    address: str
    namespace: str
    shares: int
    replicas: int
    deadline_seconds: float
    is_open: bool = True

    @property
    def actors(self) -> list[tuple[int, int]]:
        """The share and the replica of every actor."""
        return [(s, r) for s in range(self.shares) for r in range(self.replicas)]


def stored_cluster(catalog: Catalog) -> StoredCluster | None:
    """Return the cluster that searches a datastore. Raises DatastoreCorruptError."""
    plain = catalog.get(_SETTING)
    try:
        return None if plain is None else StoredCluster(**plain)
    except TypeError as error:
        raise catalog.damaged(error) from error


def store_cluster(catalog: Catalog, cluster: StoredCluster | None) -> None:
    """Record a cluster, or that there is none; inside a transaction."""
    catalog.set(_SETTING, None if cluster is None else asdict(cluster))
