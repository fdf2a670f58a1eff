"""Writing imported entries as a datastore, in a folder aside that takes the name when it is whole.

Knows folders, shards and the catalog; neither models nor how the entries were found.
"""

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Boundary
from knnlm.datastore.catalog import SHARDS, Catalog, Settings, StoredShard, catalog_exists
from knnlm.datastore.files import LOCK_NAME, publish, writer_lock, writing
from knnlm.datastore.origin import read_origin, store_origin
from knnlm.datastore.shards import write_shard
from knnlm.datastore.tables import StoredDocument
from knnlm.datastore.unfit_keys import measurable, why_unmeasurable
from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreLockedError,
    DatastoreWriteError,
    KNNLMError,
    NonFiniteKeysError,
)
from knnlm.exchange.entries import Entries, ranges
from knnlm.progress import Progress

_ASIDE = ".importing"
_SHARD_BYTES = 1 << 28
_CHECKED_ROWS = 1 << 14


@dataclass(frozen=True, slots=True)
class Staged:
    """What an import writes: its settings, where it comes from, its documents, and how many rows.

    documents: by row, which they divide.
    """

    settings: Settings
    origin: dict[str, Any]
    documents: list[StoredDocument]
    rows: int


def write_aside(
    path: Path, staged: Staged, entries: Entries, keys_path: Path, progress: Progress
) -> None:
    """Write a datastore aside and give it its name; goes on where a killed import of it ended.

    keys_path: for messages. What is refused leaves nothing; a full disk leaves what was copied.
    """
    aside = path.with_name(path.name + _ASIDE)
    with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
    with writer_lock(aside):
        try:
            with closing(_open_catalog(aside, staged)) as catalog:
                _copy(aside, catalog, staged, entries, keys_path=keys_path, progress=progress)
                _finish(catalog, staged, entries)
        except (DatastoreWriteError, DatastoreLockedError):
            raise
        except KNNLMError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        with writing(path):
            publish(aside, path)


def _open_catalog(aside: Path, staged: Staged) -> Catalog:
    """Open the catalog of a killed import of the same files, or begin anew."""
    try:
        if catalog_exists(aside):
            catalog = Catalog(aside)
            origin = read_origin(catalog) or {}
            if catalog.settings == staged.settings and _same(origin, staged.origin):
                return catalog
            catalog.close()
    except DatastoreCorruptError:
        pass
    with writing(aside):
        for left in aside.iterdir():
            if left.name != LOCK_NAME:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        (aside / SHARDS).mkdir()
    catalog = Catalog.create(aside, staged.settings)
    with catalog.transaction(entries_change=False):
        store_origin(catalog, staged.origin)
    return catalog


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two imports are of the same files; a proof may differ in a last digit."""
    return one | {"proof": None} == other | {"proof": None}


def _copy(
    aside: Path,
    catalog: Catalog,
    staged: Staged,
    entries: Entries,
    *,
    keys_path: Path,
    progress: Progress,
) -> None:
    dtype: torch.dtype = getattr(torch, staged.settings.key_dtype)
    shards = catalog.shards()
    done = shards[-1].stop if shards else 0
    step = max(
        1, _SHARD_BYTES // (entries.dimension * max(dtype.itemsize, entries.key_dtype.itemsize))
    )
    with progress.task("import", staged.rows, "entries") as advance:
        advance(done)
        for start, stop in ranges(done, staged.rows, step):
            given = entries.keys(start, stop)
            keys = given.to(dtype)
            for first, last in ranges(0, len(keys), _CHECKED_ROWS):
                _check_keys(given[first:last], keys[first:last], start + first, keys_path)
            values = entries.values(start, stop).int()
            file = write_shard(aside / SHARDS, catalog.next_shard_name(), keys, values)
            with catalog.transaction():
                catalog.add_shard(StoredShard(start, file))
            advance(stop - start)


def _check_keys(
    given: Float[Tensor, "rows dim"], keys: Float[Tensor, "rows dim"], start: int, path: Path
) -> None:
    """Refuse keys without distances, and rows that were never written."""
    for one, remedy in ((given, ""), (keys, "; choose another key_dtype")):
        if not bool((fit := measurable(one)).all()):
            row = int((~fit).int().argmax())
            raise NonFiniteKeysError(
                f"{path}: the key of row {start + row} is {why_unmeasurable(one[row][None])}"
                f"{remedy or ': it has no distance from any other; compute it again'}"
            )
    if not bool((written := given.any(dim=1)).all()):
        row = start + int((~written).int().argmax())
        raise DatastoreCorruptError(
            f"{path}: the key of row {row} is all zeros, as rows are that were never written; "
            f"compute it again, or take only the {row} rows before it (max_entries)"
        )


def _finish(catalog: Catalog, staged: Staged, entries: Entries) -> None:
    """Record the documents, and the end of a stream for what is stored later to follow."""
    settings = staged.settings
    with catalog.transaction():
        for record in catalog.records():  # of an import that was killed after this transaction
            catalog.remove_document(record[0])
        for document in staged.documents:
            number = catalog.add_document(
                document.name, document.identity, document.fingerprint, document.start
            )
            catalog.extend_document(number, document.stop, document.tokens, document.complete)
        store_origin(catalog, staged.origin)
        if settings.boundary == Boundary.stream:
            first = max(0, staged.rows - settings.context - 1)
            catalog.set("stream_tail", entries.values(first, staged.rows).tolist())
