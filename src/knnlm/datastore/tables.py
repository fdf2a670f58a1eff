"""The catalog's tables: their columns, their checksums, and a new file that holds them.

Knows SQLite and no queries. SQLite notices damage to its own structure only, so settings and
documents have checksums: each has its own, and the setting `digest` holds one of all the others'
names and checksums.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from knnlm.datastore.connection import connect, sqlite_errors
from knnlm.datastore.files import ASIDE, publish, writing

FILE_NAME = "catalog.sqlite"
FORMAT = 3
SCHEMA = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE shards (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL,
    name TEXT NOT NULL, rows INTEGER NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL, identity TEXT NOT NULL, fingerprint TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL,
    tokens INTEGER NOT NULL, complete INTEGER NOT NULL, forgotten INTEGER NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX documents_by_name ON documents (name);
CREATE INDEX documents_by_identity ON documents (identity);
CREATE INDEX documents_by_fingerprint ON documents (fingerprint);
"""
DIGEST = "digest"


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document and its rows, start to stop.

    identity: what makes it the same document when it is built again: for a file its full path, for
    a row its file's and the row's own; otherwise the name. tokens: how many of its tokens were
    read; more than its rows only at the head of a stream, where the first tokens are read but not
    stored. complete: whether its last token is stored.
    """

    id: int
    name: str
    identity: str
    fingerprint: str
    start: int
    stop: int
    tokens: int
    complete: bool
    forgotten: bool


DocumentRecord: TypeAlias = tuple[Any, ...]
"""A document as its row in the catalog: the fields of `StoredDocument`, and a checksum of them."""


def document_record(document: StoredDocument) -> DocumentRecord:
    """Return a document's row in the catalog."""
    *fields, complete, forgotten = astuple(document)
    fields += [int(complete), int(forgotten)]
    return *fields, record_checksum(fields)


def put_document(connection: sqlite3.Connection, document: StoredDocument) -> None:
    """Store a document's row, instead of an older one with its id."""
    places = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
    connection.execute(
        f"INSERT OR REPLACE INTO documents VALUES ({places})", document_record(document)
    )


def record_checksum(fields: Sequence[Any]) -> int:
    """Return the checksum of a document's fields."""
    return zlib.crc32(repr(list(fields)).encode("utf-8", "replace"))


def put_setting(connection: sqlite3.Connection, name: str, value: Any) -> None:
    """Store a setting, and the checksum of all of them."""
    text = json.dumps(value)
    put = "INSERT OR REPLACE INTO settings VALUES (?, ?, ?)"
    connection.execute(put, (name, setting_sha256(name, text), text))
    rows = connection.execute("SELECT name, sha256 FROM settings WHERE name != ?", (DIGEST,))
    connection.execute(put, (DIGEST, settings_digest(dict(rows.fetchall())), "null"))


def setting_sha256(name: str, value: str) -> str:
    """Return the checksum of a setting."""
    return hashlib.sha256(f"{name} {value}".encode()).hexdigest()


def settings_digest(sha256s: Mapping[str, str]) -> str:
    """Return the checksum of all settings but itself, from their names and checksums."""
    return setting_sha256(DIGEST, json.dumps(sha256s, sort_keys=True))


@contextmanager
def new_catalog(folder: Path) -> Iterator[sqlite3.Connection]:
    """Make empty tables to be filled; they appear under the catalog's name when they are whole."""
    aside = folder / (FILE_NAME + ASIDE)
    with writing(folder):
        aside.unlink(missing_ok=True)
        with sqlite_errors(aside, writes=True), closing(connect(aside)) as connection:
            # no journal file: a half-made catalog is made anew
            connection.execute("PRAGMA journal_mode = MEMORY")
            connection.executescript(SCHEMA)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            yield connection
        publish(aside, folder / FILE_NAME)
