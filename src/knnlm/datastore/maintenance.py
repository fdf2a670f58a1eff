"""Looking after a datastore: `compact` removes forgotten bytes, `verify` rereads everything."""

from dataclasses import dataclass, replace

import torch

from knnlm.datastore.catalog import StoredShard
from knnlm.datastore.datastore import SHARDS, Datastore
from knnlm.datastore.shards import open_shard, remove_files_except, shard_problem, write_shard
from knnlm.errors import KNNLMError
from knnlm.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Compaction:
    """What `compact` removed."""

    documents: int
    rows: int
    size_bytes: int


def compact(store: Datastore, progress: Progress = SILENT) -> Compaction:
    """Remove the entries of forgotten documents from the disk, renumbering the rows after them.

    Shards without forgotten rows are kept as they are. New shards are written first, one
    transaction then switches to them, and only after it the old files go: a kill at any moment
    leaves the datastore as it was or as it will be. Raises DatastoreLockedError,
    DatastoreWriteError.
    """
    with store.writer() as catalog:
        alive = store.alive
        old = catalog.shards()
        kept: list[StoredShard] = []
        added: list[StoredShard] = []
        number = int(catalog.next_shard_name().partition(".")[0])
        rows = 0
        with progress.task("compact", store.rows, "entries") as advance:
            for shard in old:
                live = alive[shard.start : shard.stop]
                count = int(live.sum())
                if count == shard.file.rows:
                    kept.append(replace(shard, start=rows))
                elif count > 0:
                    contents = open_shard(store.path / SHARDS, shard.file.name)
                    file = write_shard(
                        store.path / SHARDS,
                        f"{number:08d}.safetensors",
                        contents.keys[live],
                        contents.values[live],
                    )
                    number += 1
                    added.append(StoredShard(rows, file))
                rows += count
                advance(shard.file.rows)
        live_before = torch.cat([torch.zeros(1, dtype=torch.int64), alive.long().cumsum(0)])
        forgotten = catalog.documents("forgotten")
        with catalog.transaction():
            if rows < len(alive):
                catalog.renumber()
            kept_starts = {shard.file.name: shard.start for shard in kept}
            for shard in old:
                catalog.move_shard(shard.file.name, kept_starts.get(shard.file.name))
            for shard in added:
                catalog.add_shard(shard)
            for document in forgotten:
                catalog.remove_document(document.id)
            for document in catalog.documents():
                catalog.move_document(
                    document.id,
                    int(live_before[document.start]),
                    int(live_before[document.stop]),
                )
        remaining = {shard.file.name for shard in kept + added}
        remove_files_except(store.path / SHARDS, remaining)
    removed = Compaction(
        documents=len(forgotten),
        rows=len(alive) - rows,
        size_bytes=sum(shard.file.size_bytes for shard in old)
        - sum(shard.file.size_bytes for shard in kept + added),
    )
    store.refresh()
    return removed


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` read, and every problem found, each in a line that names the file."""

    shards: int
    rows: int
    problems: tuple[str, ...]


def verify(store: Datastore, progress: Progress = SILENT) -> Verification:
    """Reread every byte against its checksum, and check that rows and documents fit together."""
    store.refresh()
    catalog, shards = store.catalog, store.shards
    documents = catalog.documents()
    folder = store.path / SHARDS
    problems = [problem] if (problem := catalog.problem()) else []
    with progress.task("verify", sum(s.file.size_bytes for s in shards), "bytes") as advance:
        expected_start = 0
        for shard in shards:
            problem = shard_problem(folder, shard.file)
            if problem is None:
                problem = _contents_problem(store, shard)
            if problem is not None:
                problems.append(problem)
            if shard.start != expected_start:
                problems.append(
                    f"{folder / shard.file.name}: starts at row {shard.start}, "
                    f"expected {expected_start}"
                )
            expected_start = shard.stop
            advance(shard.file.size_bytes)
    expected_start = 0
    for document in sorted(documents, key=lambda d: (d.start, d.stop)):
        if document.start != expected_start:
            problems.append(
                f"{store.path}: document {document.name} starts at row {document.start}, "
                f"expected {expected_start}"
            )
        expected_start = document.stop
    if expected_start != store.rows:
        problems.append(f"{store.path}: documents end at row {expected_start} of {store.rows}")
    if problems and store.refresh():  # another process changed it meanwhile
        return verify(store, progress)
    return Verification(len(shards), store.rows, tuple(problems))


def _contents_problem(store: Datastore, shard: StoredShard) -> str | None:
    path = store.path / SHARDS / shard.file.name
    try:
        contents = open_shard(store.path / SHARDS, shard.file.name)
    except KNNLMError as error:
        return str(error)
    expected = (shard.file.rows, store.settings.dimension)
    if tuple(contents.keys.shape) != expected or len(contents.values) != shard.file.rows:
        return f"{path}: keys are {tuple(contents.keys.shape)}, expected {expected}"
    if not bool(contents.keys.isfinite().all()):
        return f"{path}: a key is not finite"
    outside = (contents.values < 0) | (contents.values >= store.settings.vocab_size)
    return f"{path}: a value is outside the vocabulary" if bool(outside.any()) else None
