"""The facts about a datastore's index, as kept in its catalog and shown by `knnlm info`.

Plain values only: importing this file loads neither torch nor any search library.
"""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knnlm.choices import IndexKind
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.facts import read_facts
from knnlm.datastore.stored_cluster import stored_cluster
from knnlm.datastore.stored_index import stored_index


@dataclass(frozen=True, slots=True)
class Measured:
    """The quality of an index, measured when it was built.

    recall: the share of the k true neighbors that it found for `queries` queries.
    milliseconds_per_query: in batches, on the machine that built the index.
    """

    k: int
    target_recall: float
    recall: float
    queries: int
    milliseconds_per_query: float


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an approximate index was built from and how well it searches.

    rows, generation, numbering: the datastore's when the index was built. nprobe: how many lists a
    query looks into; 1 without lists. slope, offset: what turns estimates from codes into squared
    distances, offset + slope · estimate, where no keys are read.
    """

    rows: int
    generation: int
    numbering: int
    nprobe: int
    bytes_per_entry: float
    measured: Measured
    slope: float = 1.0
    offset: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as the catalog keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "IndexReport":
        """Read a report from its form in the catalog."""
        return cls(**plain | {"measured": Measured(**plain["measured"])})

    def facts(self) -> dict[str, Any]:
        """Return the facts that `knnlm info` shows."""
        return {
            "recall": self.measured.recall,
            "target_recall": self.measured.target_recall,
            "k": self.measured.k,
            "nprobe": self.nprobe,
            "bytes_per_entry": self.bytes_per_entry,
            "milliseconds_per_query": self.measured.milliseconds_per_query,
            "entries": self.rows,
            "generation": self.generation,
        }


def describe_index(catalog: Catalog) -> dict[str, Any]:
    """Return how a datastore is searched now, and the facts about its index, as plain values.

    kind: "exact" also while an index that a compaction invalidated is not built again. recall: the
    share of the k true nearest found, measured when the index was built.
    """
    stored = stored_index(catalog)
    if stored.report is None:
        return {"kind": IndexKind.exact, "recall": 1.0}
    return {"kind": stored.kind, **IndexReport.from_dict(stored.report).facts()}


def describe_datastore(path: str | Path, list_documents: bool = False) -> dict[str, Any]:
    """Return what `knnlm info --json` prints: the facts about a datastore and its index.

    See `read_facts`. dropped_index: the kind that a compaction or the conversion from an older
    version dropped and that is not built again yet. cluster: what searches the datastore, None for
    the process that opens it. Raises DatastoreNotFoundError and DatastoreCorruptError.
    """
    facts = read_facts(path, list_documents)
    with closing(Catalog(Path(path))) as catalog:
        stored = stored_index(catalog)
        dropped = stored.report is None and stored.kind != IndexKind.exact
        facts["dropped_index"] = stored.kind if dropped else None
        cluster = stored_cluster(catalog)
        facts["cluster"] = None if cluster is None else asdict(cluster)
        return facts | {"index": describe_index(catalog)}
