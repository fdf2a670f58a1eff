"""Compaction: removing the entries of forgotten documents from the disk."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from knnlm.datastore.catalog import SHARDS, Catalog, StoredShard
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.folder import remove_strays
from knnlm.datastore.shards import open_shard, shard_problem, write_shard
from knnlm.datastore.stored_index import store_index, stored_index
from knnlm.errors import DatastoreCorruptError
from knnlm.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction removed."""

    documents: int
    rows: int
    size_bytes: int


def compact(store: Datastore, progress: Progress = SILENT) -> Compaction:
    """Remove the entries of forgotten documents, renumbering the rows after them.

    Shards without forgotten rows are kept as they are. New shards are written first, then one
    transaction switches to them, and only then are the old files deleted: if killed at any moment,
    the datastore is either as before or fully compacted. An index of the old rows goes with them:
    until it is built again, search is exact. Raises DatastoreLockedError, DatastoreWriteError.
    """
    with store.writer() as catalog:
        alive = store.alive
        old = catalog.shards()
        new = _rewritten(store, alive, progress)
        documents = len(catalog.documents("forgotten"))
        _switch(catalog, alive, old, new)
        remove_strays(store.path, catalog)
    store.refresh()
    return Compaction(documents, len(alive) - int(alive.sum()), _size_bytes(old) - _size_bytes(new))


def _size_bytes(shards: list[StoredShard]) -> int:
    return sum(shard.file.size_bytes for shard in shards)


def _rewritten(
    store: Datastore, alive: Bool[Tensor, " rows"], progress: Progress
) -> list[StoredShard]:
    """Return the shards after compaction; those with forgotten rows are written as new files."""
    shards: list[StoredShard] = []
    folder = store.path / SHARDS
    number = int(store.catalog.next_shard_name().partition(".")[0])
    rows = 0
    with progress.task("compact", store.rows, "entries") as advance:
        for shard in store.catalog.shards():
            live = alive[shard.start : shard.stop]
            count = int(live.sum())
            if count == shard.file.rows:
                shards.append(replace(shard, start=rows))
            elif count > 0:
                if problem := shard_problem(folder, shard.file):
                    raise DatastoreCorruptError(f"{problem}; restore it from a copy")
                contents = open_shard(folder, shard.file, store.settings)
                file = write_shard(
                    folder,
                    f"{number:08d}.safetensors",
                    contents.keys[live],
                    contents.values[live],
                )
                shards.append(StoredShard(rows, file))
                number += 1
            rows += count
            advance(shard.file.rows)
    return shards


def _switch(
    catalog: Catalog,
    alive: Bool[Tensor, " rows"],
    old: list[StoredShard],
    new: list[StoredShard],
) -> None:
    """Replace the old shards by the new ones and renumber all rows, in one transaction."""
    live_before = torch.cat([torch.zeros(1, dtype=torch.int64), alive.long().cumsum(0)])
    old_names = {shard.file.name for shard in old}
    starts = {shard.file.name: shard.start for shard in new}
    with catalog.transaction():
        if not bool(alive.all()):
            catalog.renumber()
            store_index(catalog, stored_index(catalog).dropped())
        for shard in old:
            catalog.move_shard(shard.file.name, starts.get(shard.file.name))
        for shard in new:
            if shard.file.name not in old_names:
                catalog.add_shard(shard)
        for document in catalog.documents():
            if document.forgotten:
                catalog.remove_document(document.id)
            else:
                start, stop = int(live_before[document.start]), int(live_before[document.stop])
                catalog.move_document(document.id, start, stop)
