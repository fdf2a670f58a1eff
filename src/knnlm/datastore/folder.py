"""The folder of a datastore: which files belong to it, and what becomes of those that do not.

The only owner of that question, for shards and for indexes of every kind. A file belongs if the
catalog names it, or if it is of an index that was begun and can be gone on with; whatever else a
killed writer, a compaction or another kind of index left does not.
"""

from pathlib import Path

from knnlm.datastore.catalog import SHARDS, Catalog
from knnlm.datastore.facts import check_size
from knnlm.datastore.files import LOCK_NAME, writer_lock, writing
from knnlm.datastore.stored_index import FOLDER, stored_index
from knnlm.datastore.tables import FILE_NAME
from knnlm.datastore.unfinished import (
    discard_unfinished,
    is_current,
    read_manifest,
    unfinished_folder,
)
from knnlm.errors import DatastoreLockedError, DatastoreWriteError

_JOURNALS = [FILE_NAME + suffix for suffix in ("-journal", "-wal", "-shm")]  # SQLite's
_BESIDE = {FILE_NAME, *_JOURNALS, LOCK_NAME, "tuning.png"}


def remove_strays(folder: Path, catalog: Catalog) -> None:
    """Delete all files among the shards and the indexes that do not belong.

    For the one writer. Raises DatastoreWriteError, and DatastoreCorruptError, deleting nothing, if
    a shard is missing: then the catalog may name the wrong one.
    """
    for shard in catalog.shards():
        check_size(folder, shard.file)
    with writing(folder):
        for path in _unnamed(folder, catalog):
            path.unlink(missing_ok=True)
        if not is_current(read_manifest(folder), catalog):
            discard_unfinished(folder)  # its folder


def stray_problems(folder: Path, catalog: Catalog) -> list[str]:
    """Return a line for every file that does not belong; none while another process writes."""
    return [
        f"{path}: does not belong to the datastore; "
        + ("remove it" if path.parent == folder else "the next change of the datastore removes it")
        for path in _find_strays(folder, catalog)
    ]


def _find_strays(folder: Path, catalog: Catalog) -> list[Path]:
    if not _all_strays(folder, catalog):
        return []
    try:
        with writer_lock(folder):
            return _all_strays(folder, catalog)
    except DatastoreLockedError:
        return []  # files that are being written look like strays
    except DatastoreWriteError:
        return _all_strays(folder, catalog)  # nobody can write here


def _all_strays(folder: Path, catalog: Catalog) -> list[Path]:
    known = {*_BESIDE, SHARDS, FOLDER}
    beside = [path for path in folder.iterdir() if path.name not in known]
    return sorted([*beside, *_unnamed(folder, catalog)])


def _unnamed(folder: Path, catalog: Catalog) -> list[Path]:
    named = {folder / SHARDS / shard.file.name for shard in catalog.shards()}
    named |= {folder / file.name for file in stored_index(catalog).files}
    begun = unfinished_folder(folder)
    if is_current(read_manifest(folder), catalog):
        named |= set(begun.rglob("*"))
    return [
        path
        for part in (SHARDS, FOLDER)
        for path in (folder / part).rglob("*")
        if path not in named and (path.is_symlink() or not path.is_dir())
    ]
