"""The catalog: a datastore's settings, shards and documents in SQLite.

Knows the tables and nothing of tensors. The tables: `settings` (name → JSON), `shards` (file, rows
and checksum of each), `documents` (name, text fingerprint, contiguous rows, whether forgotten).
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knnlm.datastore.files import ASIDE, publish, writing
from knnlm.errors import DatastoreCorruptError, DatastoreNotFoundError, DatastoreWriteError

FILE_NAME = "catalog.sqlite"
SHARDS = "shards"
"""The folder, beside the catalog, of the shard files."""
FORMAT = 1
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shards (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    start INTEGER NOT NULL,
    name TEXT NOT NULL, rows INTEGER NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, fingerprint TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL,
    tokens INTEGER NOT NULL, complete INTEGER NOT NULL, forgotten INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX documents_by_name ON documents (name);
CREATE INDEX documents_by_start ON documents (start);
"""


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


_DOCUMENT_COLUMNS = "id, name, fingerprint, start, stop, tokens, complete, forgotten"


def _document(row: tuple[Any, ...]) -> StoredDocument:
    return StoredDocument(*row[:6], *map(bool, row[6:]))


class Catalog:
    """The open catalog of one datastore; any thread may use it, one at a time.

    Raises DatastoreNotFoundError if there is none, DatastoreCorruptError if it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE_NAME
        if not path.is_file():
            raise DatastoreNotFoundError(
                f"{folder} is not a datastore (it has no {FILE_NAME}); make one with: knnlm build"
            )
        self._path = path
        self._connection = _connect(path)
        self._opened = self._state()  # before anything is read, so that no commit is missed
        with self._errors():
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version != FORMAT:
            raise DatastoreCorruptError(
                f"{path} has format {version}; this version of knnlm reads format {FORMAT}"
            )

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> "Catalog":
        """Make the catalog of a new datastore; it appears under its name only when it is whole."""
        aside = folder / (FILE_NAME + ASIDE)
        with writing(folder):
            aside.unlink(missing_ok=True)
            with _sqlite_errors(aside), closing(_connect(aside)) as connection:
                # no journal file: a half-made catalog is made anew
                connection.execute("PRAGMA journal_mode = MEMORY")
                connection.executescript(_SCHEMA)
                connection.executemany(
                    "INSERT INTO settings VALUES (?, ?)",
                    [("generation", "0"), ("datastore", json.dumps(asdict(settings)))],
                )
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            publish(aside, folder / FILE_NAME)
        return cls(folder)

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with _sqlite_errors(self._path):
            yield

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError) as error:
            raise _damaged(self._path, error) from error

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Make all reads inside see one state of the catalog, whatever other processes commit."""
        with self._errors(), self._connection:
            self._connection.execute("BEGIN")
            yield

    @contextmanager
    def transaction(self, *, entries_change: bool = True) -> Iterator[None]:
        """Make all changes inside visible at once and durably, or none of them.

        If entries change, the datastore's generation grows.
        """
        with self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            if entries_change:
                self.set("generation", self.generation + 1)

    def get(self, name: str) -> Any:
        """Return a setting's value, None if it was never set."""
        with self._errors():
            row = self._connection.execute(
                "SELECT value FROM settings WHERE name = ?", (name,)
            ).fetchone()
        with self._damage():
            return None if row is None else json.loads(row[0])

    def set(self, name: str, value: Any) -> None:
        """Set a setting: with the surrounding transaction if there is one, else at once."""
        with self._errors():
            self._connection.execute(
                "INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value))
            )

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
        return self._state() != self._opened

    def _state(self) -> tuple[int, int]:
        try:
            file = self._path.stat().st_ino
        except OSError as error:
            raise DatastoreNotFoundError(f"{self._path} is gone ({error.strerror})") from error
        return file, int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def shards(self) -> list[StoredShard]:
        """Return all shards in row order."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT start, name, rows, size_bytes, sha256 FROM shards ORDER BY start"
            ).fetchall()
        return [StoredShard(start, ShardFile(*file)) for start, *file in rows]

    def next_shard_name(self) -> str:
        """Return a file name that no shard of this datastore has ever had."""
        with self._errors():
            row = self._connection.execute(
                "SELECT seq FROM sqlite_sequence WHERE name = 'shards'"
            ).fetchone()
        return f"{(row[0] if row else 0) + 1:08d}.safetensors"

    def add_shard(self, shard: StoredShard) -> None:
        """Add a shard; inside a transaction."""
        file = shard.file
        self._connection.execute(
            "INSERT INTO shards (start, name, rows, size_bytes, sha256) VALUES (?, ?, ?, ?, ?)",
            (shard.start, file.name, file.rows, file.size_bytes, file.sha256),
        )

    def move_shard(self, name: str, start: int | None) -> None:
        """Renumber a shard's rows, or remove it (None); inside a transaction."""
        if start is None:
            self._connection.execute("DELETE FROM shards WHERE name = ?", (name,))
        else:
            self._connection.execute("UPDATE shards SET start = ? WHERE name = ?", (start, name))

    def documents(self, where: str = "", *arguments: object) -> list[StoredDocument]:
        """Return the documents that fulfil an SQL condition, in the order they were stored."""
        condition = f"WHERE {where}" if where else ""
        with self._errors():
            rows = self._connection.execute(
                f"SELECT {_DOCUMENT_COLUMNS} FROM documents {condition} ORDER BY id", arguments
            ).fetchall()
        return [_document(row) for row in rows]

    def latest_document(self, name: str) -> StoredDocument | None:
        """Return the newest document of that name that is not forgotten."""
        with self._errors():
            row = self._connection.execute(
                f"SELECT {_DOCUMENT_COLUMNS} FROM documents WHERE name = ? AND NOT forgotten "
                "ORDER BY id DESC LIMIT 1",
                (name,),
            ).fetchone()
        return None if row is None else _document(row)

    def document_at(self, row: int) -> StoredDocument:
        """Return the document that holds a datastore row."""
        with self._errors():
            found = self._connection.execute(
                f"SELECT {_DOCUMENT_COLUMNS} FROM documents WHERE start <= ? AND stop > ? "
                "ORDER BY start DESC LIMIT 1",
                (row, row),
            ).fetchone()
        if found is None:
            raise DatastoreCorruptError(f"{self._path}: no document holds row {row}")
        return _document(found)

    def add_document(self, name: str, fingerprint: str, start: int) -> int:
        """Add a document without rows and return its id; inside a transaction."""
        cursor = self._connection.execute(
            "INSERT INTO documents (name, fingerprint, start, stop, tokens, complete) "
            "VALUES (?, ?, ?, ?, 0, 0)",
            (name, fingerprint, start, start),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def extend_document(self, document: int, stop: int, tokens: int, complete: bool) -> None:
        """Record how far a document is stored; inside a transaction."""
        self._connection.execute(
            "UPDATE documents SET stop = ?, tokens = ?, complete = ? WHERE id = ?",
            (stop, tokens, complete, document),
        )

    def forget_document(self, document: int) -> None:
        """Mark a document forgotten; inside a transaction."""
        self._connection.execute("UPDATE documents SET forgotten = 1 WHERE id = ?", (document,))

    def remove_document(self, document: int) -> None:
        """Delete a document's record; inside a transaction."""
        self._connection.execute("DELETE FROM documents WHERE id = ?", (document,))

    def move_document(self, document: int, start: int, stop: int) -> None:
        """Renumber a document's rows; inside a transaction."""
        self._connection.execute(
            "UPDATE documents SET start = ?, stop = ? WHERE id = ?", (start, stop, document)
        )

    def problem(self) -> str | None:
        """Run SQLite's own integrity check; return what is wrong, if anything."""
        try:
            answer = self._connection.execute("PRAGMA integrity_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            answer = str(error)
        return None if answer == "ok" else f"{self._path}: {answer}"


def _connect(path: Path) -> sqlite3.Connection:
    with _sqlite_errors(path):
        connection = sqlite3.connect(
            path, timeout=30.0, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA synchronous = EXTRA")  # a commit survives power loss
    return connection


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "no such" in str(error):  # a table or a column
            raise _damaged(path, error) from error
        if "full" in str(error):
            rule = "the disk is full; free some space and run the same command again"
        elif "readonly" in str(error) or "unable to open" in str(error):
            rule = "the folder is not writable; change its permissions or choose another"
        else:
            rule = str(error)
        raise DatastoreWriteError(f"cannot write {path}: {rule}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DatastoreCorruptError:
    return DatastoreCorruptError(f"{path} is damaged ({error}); restore it from a copy")
