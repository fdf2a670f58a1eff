"""Converting the catalogs of older versions, so that no datastore has to be built again.

Only the catalog is converted: shards have been the same in every format. The new one is written
aside and renamed, so that a killed conversion leaves the old catalog or the new one.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from knnlm.datastore.connection import connect, damaged, sqlite_errors
from knnlm.datastore.files import writer_lock
from knnlm.datastore.tables import (
    DIGEST,
    FILE_NAME,
    FORMAT,
    StoredDocument,
    new_catalog,
    put_document,
    put_setting,
    record_checksum,
    setting_sha256,
    settings_digest,
)
from knnlm.errors import DatastoreWriteError

OLDER_FORMATS = (1, 2)
NAMED_BY_PATH = "named_by_path"
"""The setting with the last document whose identity is its name, as older versions stored it."""

_FIELDS = "name, fingerprint, start, stop, tokens, complete, forgotten"


def format_of(folder: Path) -> int:
    """Return the format of a datastore's catalog. Raises DatastoreCorruptError."""
    path = folder / FILE_NAME
    with sqlite_errors(path), closing(connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def upgrade(folder: Path) -> None:
    """Convert the catalog of a datastore to the present format.

    The index of format 1, whose files have no checksums, is dropped; its kind is kept, to be built
    again with the next change. Raises DatastoreWriteError if the folder is not writable,
    DatastoreLockedError, and DatastoreCorruptError.
    """
    path = folder / FILE_NAME
    version = format_of(folder)
    try:
        with writer_lock(folder):
            if format_of(folder) == FORMAT:  # another process was faster
                return
            with sqlite_errors(path), closing(connect(path)) as old:
                settings, shards, documents = _contents(path, old, version)
            if version == 1:
                try:
                    settings |= _settings_since_format_1(folder, settings, shards)
                except (KeyError, TypeError) as error:
                    raise damaged(path, error) from error
            settings[NAMED_BY_PATH] = max((document.id for document in documents), default=0)
            _write(folder, settings, shards, documents)
    except DatastoreWriteError as error:
        raise DatastoreWriteError(
            f"{path} is of an older version (format {version}) and has to be converted once: "
            f"make {folder} writable, or copy it, and run: knnlm info {folder} ({error})"
        ) from error


def _write(
    folder: Path,
    settings: dict[str, Any],
    shards: list[tuple[Any, ...]],
    documents: list[StoredDocument],
) -> None:
    with new_catalog(folder) as new:
        new.execute("BEGIN")
        for name, value in settings.items():
            put_setting(new, name, value)
        new.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)", shards)
        for document in documents:
            put_document(new, document)
        new.execute("COMMIT")


def _contents(
    path: Path, old: sqlite3.Connection, version: int
) -> tuple[dict[str, Any], list[tuple[Any, ...]], list[StoredDocument]]:
    """Read an older catalog: settings, shards and documents. Raises DatastoreCorruptError."""
    answer = str(old.execute("PRAGMA integrity_check").fetchone()[0])
    if answer != "ok":
        raise damaged(path, answer)
    sha256, checksum = ("sha256", "checksum") if version > 1 else ("NULL", "NULL")
    settings = old.execute(f"SELECT name, value, {sha256} FROM settings").fetchall()
    shards = old.execute("SELECT id, start, name, rows, size_bytes, sha256 FROM shards").fetchall()
    records = old.execute(f"SELECT id, {_FIELDS}, {checksum} FROM documents ORDER BY id").fetchall()
    if version > 1:
        sha256s = {name: own for name, _, own in settings}
        sound = sha256s.pop(DIGEST, None) == settings_digest(sha256s)
        sound &= all(setting_sha256(*row[:2]) == row[2] for row in settings if row[0] != DIGEST)
        if not sound or any(record_checksum(fields) != own for *fields, own in records):
            raise damaged(path, "its contents differ from their checksums")
    try:
        values = {name: json.loads(value) for name, value, _ in settings if name != DIGEST}
    except (TypeError, ValueError) as error:
        raise damaged(path, error) from error
    documents = [  # whose names are their identities
        StoredDocument(*record[:2], *record[1:6], *map(bool, record[6:8])) for record in records
    ]
    return values, shards, documents


def _settings_since_format_1(
    folder: Path, settings: dict[str, Any], shards: list[tuple[Any, ...]]
) -> dict[str, Any]:
    """Return the settings that format 1 kept elsewhere, in another form, or only once."""
    added: dict[str, Any] = {"last_shard": max((number for number, *_ in shards), default=0)}
    if "parameters" in settings:
        added["parameters again"] = settings["parameters"]
    if "index" in settings:
        kind, asked = settings["index"]["kind"], settings["index"]["asked"]
        factory = _faiss_factory(folder) if kind == "faiss" else None
        if kind == "faiss" and factory is None:
            kind, asked = "exact", "auto"
        added["index"] = {"kind": kind, "asked": asked, "factory": factory}
        added["index"] |= {"report": None, "files": []}
    return added


def _faiss_factory(folder: Path) -> str | None:
    """Return the factory string of a FAISS index, which format 1 kept in a file beside it."""
    try:
        report = json.loads((folder / "index" / "faiss" / "report.json").read_bytes())
        return str(report["factory"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no such index; or damaged, and then there is nothing to build again
