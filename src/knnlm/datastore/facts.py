"""Facts about a datastore, read from its catalog alone; quick to load, as it imports no torch."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knnlm.datastore.catalog import SHARDS, Catalog, ShardFile, StoredDocument, StoredShard
from knnlm.errors import DatastoreCorruptError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A datastore's shards and documents at one moment.

    documents: all of them, or only those that were asked for; always the forgotten ones.
    """

    generation: int
    numbering: int
    shards: list[StoredShard]
    documents: list[StoredDocument]

    @property
    def rows(self) -> int:
        """Entries stored, forgotten ones included."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def forgotten(self) -> list[StoredDocument]:
        """The forgotten documents whose entries are still stored."""
        return [document for document in self.documents if document.forgotten]

    @property
    def forgotten_rows(self) -> int:
        """Entries of forgotten documents."""
        return sum(document.stop - document.start for document in self.forgotten)


def read_snapshot(folder: Path, catalog: Catalog, where: str = "") -> Snapshot:
    """Read the shards and documents that are committed now.

    where: an SQL condition that documents must fulfil. Raises DatastoreCorruptError if a shard's
    file is missing or truncated.
    """
    while True:
        with catalog.snapshot():
            snapshot = Snapshot(
                catalog.generation, catalog.numbering, catalog.shards(), catalog.documents(where)
            )
        try:
            for shard in snapshot.shards:
                check_size(folder, shard.file)
            return snapshot
        except DatastoreCorruptError:
            if catalog.generation == snapshot.generation:
                raise  # no compaction has replaced the file meanwhile


def check_size(folder: Path, file: ShardFile) -> None:
    """Raise DatastoreCorruptError unless a shard's file has the size it was written with."""
    path = folder / SHARDS / file.name
    size_bytes = path.stat().st_size if path.exists() else None
    if size_bytes != file.size_bytes:
        state = "missing" if size_bytes is None else f"{size_bytes} bytes long"
        raise DatastoreCorruptError(
            f"{path} is {state}, written with {file.size_bytes} bytes; restore it from a copy or "
            "build the datastore again"
        )


def read_facts(path: str | Path, list_documents: bool = False) -> dict[str, Any]:
    """Return what `knnlm info --json` prints, except for the index.

    list_documents: add "document_list", the name, rows and completeness of each document. Raises
    DatastoreNotFoundError and DatastoreCorruptError.
    """
    folder = Path(path)
    with closing(Catalog(folder)) as catalog:
        snapshot = read_snapshot(folder, catalog)
        documents = [document for document in snapshot.documents if not document.forgotten]
        facts = {
            "path": str(folder),
            "entries": snapshot.rows - snapshot.forgotten_rows,
            "forgotten_entries": snapshot.forgotten_rows,
            "documents": len(documents),
            "incomplete_documents": [d.name for d in documents if not d.complete],
            "shards": len(snapshot.shards),
            "size_bytes": sum(shard.file.size_bytes for shard in snapshot.shards),
            "generation": snapshot.generation,
            "settings": asdict(catalog.settings),
            "parameters": catalog.get("parameters"),
            "tuning": catalog.get("tuning"),
        }
    if list_documents:
        facts["document_list"] = [
            {"name": d.name, "start": d.start, "stop": d.stop, "complete": d.complete}
            for d in documents
        ]
    return facts


def is_learned(catalog: Catalog) -> bool:
    """Return whether `tune` stored a gate, which chooses the weights of each token."""
    stored = catalog.get("mixture")
    return stored is not None and "gate" in stored["gates"]
