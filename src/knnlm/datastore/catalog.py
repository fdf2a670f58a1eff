"""The catalog: a datastore's settings, shards and documents in SQLite.

Knows the tables and nothing of tensors. The tables: `settings` (name → JSON), `shards` (file, rows
and checksum of each), `documents` (name, text fingerprint, contiguous rows, whether forgotten).
SQLite notices damage to its own structure only, so settings and documents have checksums: each has
its own, and the setting `digest` holds one of all the others' names and checksums.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from knnlm.datastore.connection import (
    connect,
    damaged,
    database_exists,
    database_state,
    sqlite_errors,
)
from knnlm.datastore.files import ASIDE, publish, writing
from knnlm.errors import DatastoreCorruptError, DatastoreNotFoundError

FILE_NAME = "catalog.sqlite"
SHARDS = "shards"
"""The folder, beside the catalog, of the shard files."""
FORMAT = 2
_SCHEMA = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE shards (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL,
    name TEXT NOT NULL, rows INTEGER NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL, fingerprint TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL,
    tokens INTEGER NOT NULL, complete INTEGER NOT NULL, forgotten INTEGER NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX documents_by_name ON documents (name);
"""
_DIGEST = "digest"


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


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document and its rows, start to stop.

    tokens: how many of its tokens were read; more than its rows only at the head of a stream,
    where the first tokens are read but not stored. complete: whether its last token is stored.
    """

    id: int
    name: str
    fingerprint: str
    start: int
    stop: int
    tokens: int
    complete: bool
    forgotten: bool


DocumentRecord: TypeAlias = tuple[Any, ...]
"""A document as its row in the catalog: the fields of `StoredDocument`, and a checksum of them."""
_DOCUMENT_COLUMNS = "id, name, fingerprint, start, stop, tokens, complete, forgotten, checksum"


def _record(document: StoredDocument) -> DocumentRecord:
    *fields, complete, forgotten = astuple(document)
    fields += [int(complete), int(forgotten)]
    return *fields, _checksum(fields)


def _checksum(fields: Sequence[Any]) -> int:
    return zlib.crc32(repr(list(fields)).encode("utf-8", "replace"))


def _setting_sha256(name: str, value: str) -> str:
    return hashlib.sha256(f"{name} {value}".encode()).hexdigest()


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
        with sqlite_errors(path):
            self._connection = connect(path)
            # before all else, so that no commit is missed
            self._opened = database_state(path, self._connection)
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            statements = self._connection.execute("SELECT sql FROM sqlite_master").fetchall()
        if version != FORMAT:
            remedy = "build the datastore again from its text, or use the version that made it"
            raise DatastoreCorruptError(
                f"{path} has format {version}; this version of knnlm reads format {FORMAT}: "
                f"{remedy}"
            )
        wanted = {statement.strip() for statement in _SCHEMA.split(";")} - {""}
        if {statement for (statement,) in statements} != wanted:
            raise self.damaged("its tables are not those of a catalog")

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> "Catalog":
        """Make the catalog of a new datastore; it appears under its name only when it is whole."""
        aside = folder / (FILE_NAME + ASIDE)
        with writing(folder):
            aside.unlink(missing_ok=True)
            with sqlite_errors(aside, writes=True), closing(connect(aside)) as connection:
                # no journal file: a half-made catalog is made anew
                connection.execute("PRAGMA journal_mode = MEMORY")
                connection.executescript(_SCHEMA)
                _set(connection, "generation", 0)
                _set(connection, "datastore", asdict(settings))
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            publish(aside, folder / FILE_NAME)
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
            if sha256s.pop(_DIGEST, None) != _digest(sha256s):
                raise self.damaged("its settings differ from their checksum")
        return rows

    def _value(self, name: str, sha256: str, value: str) -> Any:
        if _setting_sha256(name, value) != sha256:
            raise self.damaged(f"the setting {name} differs from its checksum")
        return json.loads(value)

    def set(self, name: str, value: Any) -> None:
        """Set a setting; inside a transaction."""
        self._checked_settings(name)  # damage must not get a checksum of its own
        with sqlite_errors(self._path, writes=True):
            _set(self._connection, name, value)

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
        return self._select(
            f"SELECT {_DOCUMENT_COLUMNS} FROM documents {condition} ORDER BY id", arguments
        )

    def documents(self, where: str = "", *arguments: object) -> list[StoredDocument]:
        """Return the documents that fulfil an SQL condition. Raises DatastoreCorruptError."""
        return [self.document(record) for record in self.records(where, *arguments)]

    def document(self, record: DocumentRecord) -> StoredDocument:
        """Return a document from its record. Raises DatastoreCorruptError."""
        if _checksum(record[:-1]) != record[-1]:
            raise self.damaged(f"the record of document {record[1]} differs from its checksum")
        return StoredDocument(*record[:6], *map(bool, record[6:8]))

    def latest_document(self, name: str) -> StoredDocument | None:
        """Return the newest document of that name that is not forgotten."""
        documents = self.documents("name = ? AND NOT forgotten", name)
        return documents[-1] if documents else None

    def add_document(self, name: str, fingerprint: str, start: int) -> int:
        """Add a document without rows and return its id; inside a transaction."""
        ((last,),) = self._select("SELECT max(id) FROM documents")
        number = (last or 0) + 1
        added = StoredDocument(number, name, fingerprint, start, start, 0, False, False)
        self._put_document(added)
        return number

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
        self._change(
            "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", _record(document)
        )

    def problems(self) -> list[str]:
        """Check SQLite's structure and all settings; return what is wrong."""
        try:
            with sqlite_errors(self._path):
                answer = str(self._connection.execute("PRAGMA integrity_check").fetchone()[0])
            if answer != "ok":
                raise self.damaged(answer.splitlines()[0])
            with self._damage():
                for row in self._select("SELECT name, sha256, value FROM settings"):
                    if row[0] != _DIGEST:
                        self._value(*row)
            self._checked_settings(_DIGEST)
            self.shards()
        except DatastoreCorruptError as error:
            return [str(error)]
        return []


def catalog_exists(folder: Path) -> bool:
    """Return whether a folder has a catalog. Raises DatastoreCorruptError if it is unreadable."""
    return database_exists(folder / FILE_NAME)


def _shard_name(number: int) -> str:
    return f"{number:08d}.safetensors"


def _digest(sha256s: dict[str, str]) -> str:
    return _setting_sha256(_DIGEST, json.dumps(sha256s, sort_keys=True))


def _set(connection: sqlite3.Connection, name: str, value: Any) -> None:
    text = json.dumps(value)
    put = "INSERT OR REPLACE INTO settings VALUES (?, ?, ?)"
    connection.execute(put, (name, _setting_sha256(name, text), text))
    rows = connection.execute("SELECT name, sha256 FROM settings WHERE name != ?", (_DIGEST,))
    connection.execute(put, (_DIGEST, _digest(dict(rows.fetchall())), "null"))
