"""Verification: rereading every file of a datastore against its checksums."""

from collections.abc import Iterable
from dataclasses import dataclass

from knnlm.datastore.catalog import SHARDS, StoredShard
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import open_shard, shard_problem
from knnlm.errors import KNNLMError
from knnlm.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Verification:
    """How much was verified, and the problems found, each one line that names the file."""

    shards: int
    rows: int
    problems: tuple[str, ...]


def verify(store: Datastore, progress: Progress = SILENT) -> Verification:
    """Reread every byte against its checksum, and check that rows and documents fit together."""
    store.refresh()
    documents = store.catalog.documents()
    problems = [problem] if (problem := store.catalog.problem()) else []
    size_bytes = sum(shard.file.size_bytes for shard in store.shards)
    with progress.task("verify", size_bytes, "bytes") as advance:
        expected_start = 0
        for shard in store.shards:
            problems += _shard_problems(store, shard, expected_start)
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
    return Verification(len(store.shards), store.rows, tuple(problems))


def _shard_problems(store: Datastore, shard: StoredShard, expected_start: int) -> Iterable[str]:
    folder = store.path / SHARDS
    problem = shard_problem(folder, shard.file) or _contents_problem(store, shard)
    if problem is not None:
        yield problem
    if shard.start != expected_start:
        path = folder / shard.file.name
        yield f"{path}: starts at row {shard.start}, expected {expected_start}"


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
