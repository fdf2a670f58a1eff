"""Durable changes to files: publishing, fsync, the writer's lock, and one error for a failed write.

The only owner of fsync and rename. Knows nothing of shards or documents, and imports no torch.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from knnlm.errors import DatastoreLockedError, DatastoreWriteError, KNNLMError

ASIDE = ".part"
"""Suffix of a file that is still being written."""
LOCK_NAME = "writer.lock"


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Give a finished file its final name, durably."""
    _sync(aside)
    aside.rename(path)
    _sync(path.parent)


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold a datastore's writer lock; the system releases it however the process ends.

    Raises DatastoreLockedError at once if another process holds it.
    """
    lock = FileLock(path / LOCK_NAME)
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DatastoreLockedError(
                f"{path} is being written by another process; wait for it to end and try again"
            ) from error
    try:
        yield
    finally:
        lock.release()


def remove_files_except(folder: Path, names: set[str]) -> None:
    """Delete all files in a folder but `names`, such as the leftovers of a killed writer."""
    with writing(folder):
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
