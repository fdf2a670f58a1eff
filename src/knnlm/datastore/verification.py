"""Verification: rereading every file of a datastore against its checksums."""

from contextlib import closing
from dataclasses import dataclass

from knnlm.datastore.catalog import SHARDS, Catalog, StoredShard
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.facts import Snapshot, row_problems
from knnlm.datastore.files import file_problem
from knnlm.datastore.folder import stray_problems
from knnlm.datastore.shards import check_values, open_shard, shard_problem
from knnlm.datastore.stored_index import StoredIndex, stored_index
from knnlm.errors import DatastoreCorruptError, KNNLMError
from knnlm.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Verification:
    """How much was verified, and the problems found, each one line that names the file."""

    shards: int
    rows: int
    problems: tuple[str, ...]


def verify(store: Datastore, progress: Progress = SILENT) -> Verification:
    """Reread every byte against its checksum, and check that rows and documents fit together.

    The catalog's settings, the shards and the index's files have checksums; files that do not
    belong are named.
    """
    try:
        # another connection, because the store's own may remember pages that were damaged since
        with closing(Catalog(store.path)) as catalog:
            problems = catalog.problems()
            if problems:  # what else it says cannot be relied on
                return Verification(len(store.shards), store.rows, tuple(problems))
            snapshot, index = Snapshot.read(catalog), stored_index(catalog)
            problems += _file_problems(store, snapshot.shards, index, progress)
            problems += row_problems(store.path, catalog, snapshot)
            problems += stray_problems(store.path, catalog)
            changed = snapshot.generation != catalog.generation or index != stored_index(catalog)
    except DatastoreCorruptError as error:
        return Verification(len(store.shards), store.rows, (str(error),))
    if problems and changed:  # another process changed it meanwhile
        return verify(store, progress)
    return Verification(len(snapshot.shards), snapshot.rows, tuple(problems))


def _file_problems(
    store: Datastore, shards: list[StoredShard], index: StoredIndex, progress: Progress
) -> list[str]:
    problems = []
    size_bytes = sum(shard.file.size_bytes for shard in shards)
    size_bytes += sum(file.size_bytes for file in index.files)
    with progress.task("verify", size_bytes, "bytes") as advance:
        for shard in shards:
            problem = shard_problem(store.path / SHARDS, shard.file)
            problem = problem or _contents_problem(store, shard)
            problems += [problem] if problem else []
            advance(shard.file.size_bytes)
        for file in index.files:
            problem = file_problem(store.path / file.name, file.size_bytes, file.sha256)
            problems += [f"{problem}; run: knnlm index {store.path}"] if problem else []
            advance(file.size_bytes)
    return problems


def _contents_problem(store: Datastore, shard: StoredShard) -> str | None:
    folder = store.path / SHARDS
    try:
        contents = open_shard(folder, shard.file, store.settings)
        finite = contents.keys.isfinite().all(dim=1)
        if not bool(finite.all()):
            raise store.unfit_key(shard.start + int(finite.int().argmin()))
        check_values(folder / shard.file.name, contents.values, store.settings.vocab_size)
    except KNNLMError as error:
        return str(error)
    return None
