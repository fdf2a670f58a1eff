"""A copy of a datastore in another folder, brought up to date: for disks that actors read alone.

A file that the copy's catalog names with the original's checksum is not copied again. The catalog
comes last: what it names is there.
"""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from knnlm.datastore.catalog import SHARDS, Catalog, catalog_exists
from knnlm.datastore.files import ASIDE, publish, unreadable, writing
from knnlm.datastore.folder import remove_strays
from knnlm.datastore.stored_index import stored_index
from knnlm.datastore.tables import FILE_NAME
from knnlm.errors import InvalidArgumentError

_LOCK_SUFFIX = ".lock"


class _File(NamedTuple):
    name: str
    size_bytes: int
    sha256: str


def update_copy(original: Path, copy: Path) -> None:
    """Make `copy` the newest state of a datastore; several processes may, one does it at a time.

    Raises DatastoreNotFoundError, DatastoreCorruptError and DatastoreWriteError, and
    InvalidArgumentError if the copy would replace the original.
    """
    if copy.resolve() == original.resolve():
        raise InvalidArgumentError(f"the copy must be in another folder than {original}")
    with writing(copy):
        copy.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name(copy.name + _LOCK_SUFFIX)):
            while not _copied(original, copy):
                pass


def _copied(original: Path, copy: Path) -> bool:
    """Return False if the original changed meanwhile, so that a file of it was gone."""
    aside = copy / (FILE_NAME + ASIDE)
    aside.unlink(missing_ok=True)
    with closing(Catalog(original)) as catalog:  # which refuses what is not a datastore
        with (
            closing(sqlite3.connect(original / FILE_NAME)) as source,
            closing(sqlite3.connect(aside)) as target,
        ):
            source.backup(target)
        wanted = _files(catalog)
        for file in wanted - _present(copy):
            path = copy / file.name
            path.parent.mkdir(exist_ok=True)
            partly = path.with_name(path.name + ASIDE)
            try:
                shutil.copyfile(original / file.name, partly)
            except FileNotFoundError as error:
                if _files(catalog) == wanted:
                    raise unreadable(original / file.name, error) from error
                return False
            publish(partly, path)
        if _files(catalog) != wanted:
            return False
    publish(aside, copy / FILE_NAME)
    with closing(Catalog(copy)) as catalog:
        remove_strays(copy, catalog)
    return True


def _present(copy: Path) -> set[_File]:
    """Return the files that the copy has, as its catalog knows them."""
    if not catalog_exists(copy):
        return set()
    with closing(Catalog(copy)) as catalog:
        return {file for file in _files(catalog) if _has_size(copy / file.name, file.size_bytes)}


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.exists() and path.stat().st_size == size_bytes


def _files(catalog: Catalog) -> set[_File]:
    shards = (shard.file for shard in catalog.shards())
    return {
        *(_File(f"{SHARDS}/{file.name}", file.size_bytes, file.sha256) for file in shards),
        *(_File(f.name, f.size_bytes, f.sha256) for f in stored_index(catalog).files),
    }
