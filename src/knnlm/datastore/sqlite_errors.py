"""What went wrong in SQLite, as our own errors of one line: reading, writing, and damage."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.datastore.files import unreadable
from knnlm.errors import DatastoreCorruptError, DatastoreWriteError


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
