"""The facts about a datastore's index, as kept in its catalog and shown by `knnlm info`.

Plain values only: importing this file loads neither torch nor any search library.
"""

from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from knnlm.choices import IndexKind
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.facts import read_facts

SETTING = "index"
_NEVER_BUILT = {"kind": IndexKind.exact, "asked": IndexKind.auto, "report": {"recall": 1.0}}
_UNKNOWN = {"recall": None}  # older versions kept no report in the catalog


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

    rows, generation, numbering: the datastore's when the index was built; files of older versions
    may have no generation. nprobe: how many lists a query looks into; 1 without lists.
    """

    rows: int
    numbering: int
    nprobe: int
    bytes_per_entry: float
    measured: Measured
    generation: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as an index keeps it in its own files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "IndexReport":
        """Read a report from the metadata of an index's files, which may say more."""
        known = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        return cls(**known | {"measured": Measured(**plain["measured"])})

    def facts(self) -> dict[str, Any]:
        """Return the facts that the catalog keeps."""
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


def index_setting(catalog: Catalog) -> dict[str, Any]:
    """Return the kind of index that was built, the kind that was asked for, and the report."""
    setting: dict[str, Any] = catalog.get(SETTING) or _NEVER_BUILT
    return setting


def describe_index(catalog: Catalog) -> dict[str, Any]:
    """Return the kind of a datastore's index and the facts about it, as plain values.

    recall: the share of the k true nearest found, measured when the index was built; None where
    an older version built it.
    """
    setting = index_setting(catalog)
    return {"kind": setting["kind"], **setting.get("report", _UNKNOWN)}


def describe_datastore(path: str | Path, list_documents: bool = False) -> dict[str, Any]:
    """Return what `knnlm info --json` prints: the facts about a datastore and its index.

    See `read_facts`. Raises DatastoreNotFoundError and DatastoreCorruptError.
    """
    facts = read_facts(path, list_documents)
    with closing(Catalog(Path(path))) as catalog:
        return facts | {"index": describe_index(catalog)}
