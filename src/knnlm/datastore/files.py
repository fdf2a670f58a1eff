"""Files: durable changes, the writer's lock, checksums, and one error for a failed write.

The only owner of fsync and rename. Knows nothing of shards or documents, and imports no torch.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreLockedError,
    DatastoreWriteError,
    KNNLMError,
)

ASIDE = ".part"
"""Suffix of a file that is still being written."""
LOCK_NAME = "writer.lock"
PATIENCE_S = 1.0
"""How long a writer waits for the lock: `verify` holds it while it lists the folder's files."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a DatastoreWriteError of one line."""
    try:
        yield
    except KNNLMError:
        raise  # some are OSErrors too, and already say what is wrong
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            rule = "the disk is full; free some space and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            rule = "the folder is not writable; change its permissions or choose another"
        else:
            rule = f"{error.strerror or error}"
        raise DatastoreWriteError(f"cannot write {path}: {rule}") from error


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Give a finished file, or a folder of finished files, its final name, durably."""
    for file in aside.iterdir() if aside.is_dir() else ():
        sync(file)
    sync(aside)
    aside.rename(path)
    sync(path.parent)


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold a datastore's writer lock; the system releases it however the process ends.

    Raises DatastoreLockedError if another process holds it for longer than PATIENCE_S.
    """
    lock = FileLock(path / LOCK_NAME)
    with writing(path):
        try:
            lock.acquire(timeout=PATIENCE_S)
        except Timeout as error:
            raise DatastoreLockedError(
                f"{path} is being written by another process; wait for it to end and try again"
            ) from error
    try:
        yield
    finally:
        lock.release()


def unreadable(path: Path, error: Exception) -> DatastoreCorruptError:
    """Return the error for a file that is there and cannot be read."""
    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[:1]
    remedy = "restore it from a copy"
    if isinstance(error, PermissionError):
        remedy = "change its permissions"
    return DatastoreCorruptError(f"{path} cannot be read ({''.join(reason)[:200]}); {remedy}")


def size_of(path: Path) -> int | None:
    """Return a file's size in bytes, None if there is none. Raises DatastoreCorruptError."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def check_file(path: Path, size_bytes: int, remedy: str) -> None:
    """Raise DatastoreCorruptError unless a file has the size that it was written with."""
    found = size_of(path)
    if found != size_bytes:
        state = "missing" if found is None else f"{found} bytes long"
        raise DatastoreCorruptError(f"{path} is {state}, written with {size_bytes} bytes; {remedy}")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problem(path: Path, size_bytes: int, sha256: str) -> str | None:
    """Reread a whole file against its checksum; return what is wrong with it, if anything."""
    try:
        found = size_of(path)
        if found is None:
            return f"{path}: missing"
        if found != size_bytes:
            return f"{path}: {found} bytes, written with {size_bytes}"
        if sha256_of(path) != sha256:
            return f"{path}: the contents differ from the checksum taken when it was written"
    except FileNotFoundError:
        return f"{path}: missing"
    except DatastoreCorruptError as error:
        return str(error)
    except OSError as error:
        return str(unreadable(path, error))
    return None
