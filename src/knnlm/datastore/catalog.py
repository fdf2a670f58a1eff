"""The catalog: a datastore's settings, shards and documents in SQLite.

Knows the tables and nothing of tensors. The tables: `settings` (name → JSON), `shards` (file, rows
and checksum of each), `documents` (name, identity, text fingerprint, contiguous rows, whether
forgotten).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from knnlm.datastore.connection import (
    connect,
    damaged,
    database_exists,
    database_state,
    sqlite_errors,
)
from knnlm.datastore.tables import (
    DIGEST,
    FILE_NAME,
    FORMAT,
    SCHEMA,
    DocumentRecord,
    StoredDocument,
    new_catalog,
    put_document,
    put_setting,
    record_checksum,
    setting_sha256,
    settings_digest,
)
from knnlm.datastore.upgrade import OLDER_FORMATS, format_of, upgrade
from knnlm.errors import DatastoreCorruptError, DatastoreNotFoundError

SHARDS = "shards"
"""The folder, beside the catalog, of the shard files."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that all entries of a datastore share; fixed when it is created."""

    model: str
    revision: str | None
    model_dtype: str
    weights_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    start_token: int
    key: str
    dimension: int
    key_dtype: str
    window: int
    context: int
    boundary: str
    control_tokens: bool = False


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard's file: its name, rows, size and checksum."""

    name: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A shard's file and the first of its rows."""

    start: int
    file: ShardFile

    @property
    def stop(self) -> int:
        """One past the shard's last row."""
        return self.start + self.file.rows


class Catalog:
    """The open catalog of one datastore; any thread may use it, one at a time.

    Raises DatastoreNotFoundError if there is none, DatastoreCorruptError if it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE_NAME
        if not catalog_exists(folder):
            raise DatastoreNotFoundError(
                f"{folder} is not a datastore (it has no {FILE_NAME}); make one with: knnlm build"
            )
        self._path = path
        version = format_of(folder)
        if version in OLDER_FORMATS:
            upgrade(folder)
        elif version != FORMAT:
            raise DatastoreCorruptError(
                f"{path} has format {version}; this version of knnlm reads formats up to {FORMAT}: "
                "use the version that made it"
            )
        with sqlite_errors(path):
            self._connection = connect(path)
            # before all else, so that no commit is missed
            self._opened = database_state(path, self._connection)
            statements = self._connection.execute("SELECT sql FROM sqlite_master").fetchall()
        wanted = {statement.strip() for statement in SCHEMA.split(";")} - {""}
        if {statement for (statement,) in statements} != wanted:
            raise self.damaged("its tables are not those of a catalog")

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> "Catalog":
        """Make the catalog of a new datastore; it appears under its name only when it is whole."""
        with new_catalog(folder) as connection:
            put_setting(connection, "generation", 0)
            put_setting(connection, "datastore", asdict(settings))
        return cls(folder)

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    def damaged(self, problem: object) -> DatastoreCorruptError:
        """Return the error for a catalog that does not say what was written to it."""
        return damaged(self._path, problem)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, KeyError) as error:
            raise self.damaged(error) from error

    def _select(self, query: str, arguments: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with sqlite_errors(self._path):
            return self._connection.execute(query, arguments).fetchall()

    def _change(self, query: str, arguments: Sequence[object]) -> None:
        with sqlite_errors(self._path, writes=True):
            self._connection.execute(query, arguments)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Make all reads inside see one state of the catalog, whatever other processes commit."""
        with sqlite_errors(self._path), self._connection:
            self._connection.execute("BEGIN")
            yield

    @contextmanager
    def transaction(self, *, entries_change: bool = True) -> Iterator[None]:
        """Make all changes inside visible at once and durably, or none of them.

        If entries change, the datastore's generation grows.
        """
        with sqlite_errors(self._path, writes=True), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            if entries_change:
                self.set("generation", self.generation + 1)

    def get(self, name: str) -> Any:
        """Return a setting's value, None if it was never set. Raises DatastoreCorruptError."""
        found = [row for row in self._checked_settings(name) if row[0] == name]
        with self._damage():
            return self._value(*found[0]) if found else None

    def _checked_settings(self, name: str) -> list[tuple[Any, ...]]:
        """Return names and checksums of all settings, which have to fit, and the value of one."""
        rows = self._select(
            "SELECT name, sha256, CASE name WHEN ? THEN value END FROM settings", (name,)
        )
        sha256s = {row[0]: row[1] for row in rows}
        with self._damage():
            if sha256s.pop(DIGEST, None) != settings_digest(sha256s):
                raise self.damaged("its settings differ from their checksum")
        return rows

    def _value(self, name: str, sha256: str, value: str) -> Any:
        if setting_sha256(name, value) != sha256:
            raise self.damaged(f"the setting {name} differs from its checksum")
        return json.loads(value)

    def set(self, name: str, value: Any) -> None:
        """Set a setting; inside a transaction."""
        self._checked_settings(name)  # damage must not get a checksum of its own
        with sqlite_errors(self._path, writes=True):
            put_setting(self._connection, name, value)

    @property
    def settings(self) -> Settings:
        """The datastore's fixed settings."""
        with self._damage():
            return Settings(**self.get("datastore"))

    @property
    def generation(self) -> int:
        """A number that grows with every change of the entries."""
        with self._damage():
            return int(self.get("generation"))

    @property
    def numbering(self) -> int:
        """A number that grows whenever rows are renumbered."""
        return int(self.get("numbering") or 0)

    def renumber(self) -> None:
        """Record that rows were renumbered, for readers to notice; inside a transaction."""
        self.set("numbering", self.numbering + 1)

    @property
    def has_changed(self) -> bool:
        """Whether another connection has committed anything since this one was opened.

        A catalog that was put in the place of this one counts too. Raises DatastoreNotFoundError.
        """
        return database_state(self._path, self._connection) != self._opened

    def shards(self) -> list[StoredShard]:
        """Return all shards in row order."""
        rows = self._select(
            "SELECT id, start, name, rows, size_bytes, sha256 FROM shards ORDER BY start"
        )
        for number, *columns in rows:
            if [*map(type, columns)] != [int, str, int, int, str] or (
                columns[1] != _shard_name(number) or columns[2] < 1
            ):
                raise self.damaged(f"the record of shard {number} cannot be right")
        return [StoredShard(start, ShardFile(*file)) for _, start, *file in rows]

    def next_shard_name(self) -> str:
        """Return a file name that no shard of this datastore has ever had."""
        return _shard_name(int(self.get("last_shard") or 0) + 1)

    def add_shard(self, shard: StoredShard) -> None:
        """Add a shard; inside a transaction."""
        file = shard.file
        number = int(file.name.partition(".")[0])
        self._change(
            "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)",
            (number, shard.start, file.name, file.rows, file.size_bytes, file.sha256),
        )
        self.set("last_shard", number)

    def move_shard(self, name: str, start: int | None) -> None:
        """Renumber a shard's rows, or remove it (None); inside a transaction."""
        if start is None:
            self._change("DELETE FROM shards WHERE name = ?", (name,))
        else:
            self._change("UPDATE shards SET start = ? WHERE name = ?", (start, name))

    def records(self, where: str = "", *arguments: object) -> list[DocumentRecord]:
        """Return the records of documents that fulfil an SQL condition, in the order stored."""
        condition = f"WHERE {where}" if where else ""
        return self._select(f"SELECT * FROM documents {condition} ORDER BY id", arguments)

    def documents(self, where: str = "", *arguments: object) -> list[StoredDocument]:
        """Return the documents that fulfil an SQL condition. Raises DatastoreCorruptError."""
        return [self.document(record) for record in self.records(where, *arguments)]

    def document(self, record: DocumentRecord) -> StoredDocument:
        """Return a document from its record. Raises DatastoreCorruptError."""
        if record_checksum(record[:-1]) != record[-1]:
            raise self.damaged(f"the record of document {record[1]} differs from its checksum")
        return StoredDocument(*record[:7], *map(bool, record[7:9]))

    def live_documents(self) -> list[StoredDocument]:
        """Return the documents that are not forgotten, in the order stored."""
        return self.documents("NOT forgotten")

    def versions(self, identity: str) -> list[StoredDocument]:
        """Return the documents of an identity that are not forgotten, the newest last.

        There are several while a newer version is being stored.
        """
        return self.documents("identity = ? AND NOT forgotten", identity)

    @property
    def last_document(self) -> int:
        """The greatest id of a document, 0 if there is none."""
        ((last,),) = self._select("SELECT max(id) FROM documents")
        return last or 0

    def add_document(self, name: str, identity: str, fingerprint: str, start: int) -> int:
        """Add a document without rows and return its id; inside a transaction.

        Names are unique: one that another document has gives way to the identity.
        """
        number = self.last_document + 1
        name = self._free_name(number, name, identity)
        added = StoredDocument(number, name, identity, fingerprint, start, start, 0, False, False)
        self._put_document(added)
        return number

    def _free_name(self, document: int, name: str, identity: str) -> str:
        names = chain([name, identity], (f"{identity} ({n})" for n in count(2)))
        taken = "name = ? AND identity != ? AND id != ? AND NOT forgotten"
        return next(name for name in names if not self.records(taken, name, identity, document))

    def identify_document(self, document: int, name: str, identity: str) -> None:
        """Give a document another identity, and a name that is free; inside a transaction."""
        name = self._free_name(document, name, identity)
        self._change_document(document, name=name, identity=identity)

    def extend_document(self, document: int, stop: int, tokens: int, complete: bool) -> None:
        """Record how far a document is stored; inside a transaction."""
        self._change_document(document, stop=stop, tokens=tokens, complete=complete)

    def forget_document(self, document: int) -> None:
        """Mark a document forgotten; inside a transaction."""
        self._change_document(document, forgotten=True)

    def remove_document(self, document: int) -> None:
        """Delete a document's record; inside a transaction."""
        self._change("DELETE FROM documents WHERE id = ?", (document,))

    def move_document(self, document: int, start: int, stop: int) -> None:
        """Renumber a document's rows; inside a transaction."""
        self._change_document(document, start=start, stop=stop)

    def _change_document(self, document: int, **changes: Any) -> None:
        (stored,) = self.documents("id = ?", document)
        self._put_document(replace(stored, **changes))

    def _put_document(self, document: StoredDocument) -> None:
        with sqlite_errors(self._path, writes=True):
            put_document(self._connection, document)

    def problems(self) -> list[str]:
        """Check SQLite's structure and all settings; return what is wrong."""
        try:
            with sqlite_errors(self._path):
                answer = str(self._connection.execute("PRAGMA integrity_check").fetchone()[0])
            if answer != "ok":
                raise self.damaged(answer.splitlines()[0])
            with self._damage():
                for row in self._select("SELECT name, sha256, value FROM settings"):
                    if row[0] != DIGEST:
                        self._value(*row)
            self._checked_settings(DIGEST)
            self.shards()
        except DatastoreCorruptError as error:
            return [str(error)]
        return []


def catalog_exists(folder: Path) -> bool:
    """Return whether a folder has a catalog. Raises DatastoreCorruptError if it is unreadable."""
    return database_exists(folder / FILE_NAME)


def _shard_name(number: int) -> str:
    return f"{number:08d}.safetensors"
