"""Facts about a datastore, read from its catalog alone; quick to load, as it imports no torch."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knnlm.datastore.catalog import (
    SHARDS,
    Catalog,
    ShardFile,
    StoredShard,
)
from knnlm.datastore.files import check_file
from knnlm.datastore.origin import read_origin
from knnlm.datastore.tables import DocumentRecord, StoredDocument
from knnlm.errors import DatastoreCorruptError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A datastore's shards and documents, as their records in the catalog, at one moment."""

    generation: int
    numbering: int
    shards: list[StoredShard]
    documents: list[DocumentRecord]

    @classmethod
    def read(cls, catalog: Catalog) -> "Snapshot":
        """Read what is committed now. Raises DatastoreCorruptError."""
        with catalog.snapshot():
            return cls(catalog.generation, catalog.numbering, catalog.shards(), catalog.records())

    @property
    def rows(self) -> int:
        """Entries stored, forgotten ones included."""
        return self.shards[-1].stop if self.shards else 0


def read_snapshot(folder: Path, catalog: Catalog) -> Snapshot:
    """Read the shards and documents that are committed now.

    Raises DatastoreCorruptError if a shard's file is missing or truncated.
    """
    while True:
        snapshot = Snapshot.read(catalog)
        try:
            for shard in snapshot.shards:
                check_size(folder, shard.file)
            return snapshot
        except DatastoreCorruptError:
            if catalog.generation == snapshot.generation:
                raise  # no compaction has replaced the file meanwhile


def row_problems(folder: Path, catalog: Catalog, snapshot: Snapshot) -> Iterator[str]:
    """Yield how shards and documents do not fit together, and which records are damaged."""
    expected = 0
    for shard in snapshot.shards:
        if shard.start != expected:
            path = folder / SHARDS / shard.file.name
            yield f"{path}: starts at row {shard.start}, expected {expected}"
        expected = shard.stop
    for record in snapshot.documents:
        try:
            catalog.document(record)
        except DatastoreCorruptError as error:
            yield str(error)
    expected = 0
    ranges = [(start, stop, name) for _, name, _, _, start, stop, *_ in snapshot.documents]
    numbers = [each for each in ranges if type(each[0]) is type(each[1]) is int]
    for start, stop, name in sorted(numbers, key=lambda each: each[:2]):
        if start != expected:
            yield f"{folder}: document {name} starts at row {start}, expected {expected}"
        expected = stop
    if expected != snapshot.rows:
        yield f"{folder}: documents end at row {expected} of {snapshot.rows}"


def checked_documents(folder: Path, catalog: Catalog, snapshot: Snapshot) -> list[StoredDocument]:
    """Return the documents of a snapshot that fits together, forgotten ones among them.

    Raises DatastoreCorruptError.
    """
    for problem in row_problems(folder, catalog, snapshot):
        raise DatastoreCorruptError(f"{problem}; run: knnlm verify {folder}")
    return [catalog.document(record) for record in snapshot.documents]


def check_size(folder: Path, file: ShardFile) -> None:
    """Raise DatastoreCorruptError unless a shard's file has the size it was written with."""
    remedy = "restore it from a copy or build the datastore again"
    check_file(folder / SHARDS / file.name, file.size_bytes, remedy)


def read_facts(path: str | Path, list_documents: bool = False) -> dict[str, Any]:
    """Return what `knnlm info --json` prints, except for the index.

    origin: of imported entries, see `read_origin`; None where all were built from text.
    list_documents: add "document_list", the name, rows and completeness of each document, and its
    identity if that is another. Raises DatastoreNotFoundError and DatastoreCorruptError.
    """
    folder = Path(path)
    with closing(Catalog(folder)) as catalog:
        snapshot = read_snapshot(folder, catalog)
        stored = checked_documents(folder, catalog, snapshot)
        documents = [document for document in stored if not document.forgotten]
        forgotten_rows = sum(d.stop - d.start for d in stored if d.forgotten)
        facts = {
            "path": str(folder),
            "entries": snapshot.rows - forgotten_rows,
            "forgotten_entries": forgotten_rows,
            "documents": len(documents),
            "incomplete_documents": [d.name for d in documents if not d.complete],
            "shards": len(snapshot.shards),
            "size_bytes": sum(shard.file.size_bytes for shard in snapshot.shards),
            "generation": snapshot.generation,
            "settings": asdict(catalog.settings),
            "origin": read_origin(catalog),
            "parameters": tuned_parameters(catalog),
            "tuning": catalog.get("tuning"),
        }
    if list_documents:
        facts["document_list"] = [
            {"name": d.name, "start": d.start, "stop": d.stop, "complete": d.complete}
            | ({} if d.identity == d.name else {"identity": d.identity})
            for d in documents
        ]
    return facts


def tuned_parameters(catalog: Catalog) -> dict[str, Any] | None:
    """Return the parameters that `tune` stored, None before tuning. Raises DatastoreCorruptError.

    They are stored twice: damage to one neither changes a prediction nor costs another tuning.
    """
    try:
        parameters: dict[str, Any] | None = catalog.get("parameters")
    except DatastoreCorruptError:
        parameters = catalog.get("parameters again")
    return parameters


def store_parameters(catalog: Catalog, parameters: dict[str, Any]) -> None:
    """Store the parameters that `tune` found; inside a transaction."""
    catalog.set("parameters", parameters)
    catalog.set("parameters again", parameters)


def is_learned(catalog: Catalog) -> bool:
    """Return whether `tune` stored a gate, which chooses the weights of each token."""
    stored = catalog.get("mixture")
    return stored is not None and "gate" in stored["gates"]
