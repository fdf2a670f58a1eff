"""SQLite's connections, and what goes wrong in them as our own errors of one line.

Knows no tables. Nothing here opens a database's file itself: closing it would release the locks
that all connections of this process hold on it.
"""

import errno
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.datastore.files import unreadable
from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreNotFoundError,
    DatastoreWriteError,
    InvalidArgumentError,
)

_NOT_IN_PATHS = re.compile("[\\0\\ud800-\\udfff]")  # bytes that are not UTF-8 become the latter


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, for any thread, one at a time."""
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = EXTRA")  # a commit survives power loss
    return connection


def database_exists(path: Path) -> bool:
    """Return whether there is a file.

    Raises DatastoreCorruptError if it is unreadable, and InvalidArgumentError for a path that is
    not UTF-8: neither shards nor indexes could be read from it.
    """
    if _NOT_IN_PATHS.search(str(path)):
        raise InvalidArgumentError(
            f"datastore {str(path.parent)!a} must have a path in UTF-8: rename it, or choose "
            "another"
        )
    try:
        exists = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    if exists and not os.access(path, os.R_OK):
        raise unreadable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return exists


def database_state(path: Path, connection: sqlite3.Connection) -> tuple[int, int]:
    """Return what changes when another connection commits, or another file takes the path.

    Raises DatastoreNotFoundError.
    """
    try:
        file = path.stat().st_ino
    except OSError as error:
        raise DatastoreNotFoundError(f"{path} is gone ({error.strerror})") from error
    with sqlite_errors(path):
        return file, int(connection.execute("PRAGMA data_version").fetchone()[0])


@contextmanager
def sqlite_errors(path: Path, *, writes: bool = False) -> Iterator[None]:
    """Turn errors of SQLite into a DatastoreCorruptError, or for changes DatastoreWriteError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "no such" in str(error) or "decode" in str(error):  # a table, a column, or text
            raise damaged(path, error) from error
        if not writes:
            raise unreadable(path, error) from error
        if "full" in str(error):
            rule = "the disk is full; free some space and run the same command again"
        elif "readonly" in str(error) or "unable to open" in str(error):
            rule = "the folder is not writable; change its permissions or choose another"
        else:
            rule = str(error)
        raise DatastoreWriteError(f"cannot write {path}: {rule}") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # messages quote damaged text
        raise damaged(path, error) from error


def damaged(path: Path, problem: object) -> DatastoreCorruptError:
    """Return the error for a catalog that does not say what was written to it."""
    reason = str(problem).splitlines()[:1]
    return DatastoreCorruptError(
        f"{path} is damaged ({''.join(reason)[:200]}); restore it from a copy"
    )
