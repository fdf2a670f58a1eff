"""Which index a datastore is searched with: the registry of backends, the choice and the upkeep."""

from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Coverage, IndexKind, parse_choice
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.datastore.folder import remove_strays
from knnlm.datastore.stored_cluster import stored_cluster
from knnlm.datastore.stored_index import IndexFile, StoredIndex, store_index, stored_index
from knnlm.datastore.unfinished import discard_unfinished
from knnlm.errors import (
    DatastoreChangedError,
    DatastoreCorruptError,
    DatastoreNotFoundError,
    InvalidArgumentError,
)
from knnlm.index.available_memory import memory_bytes
from knnlm.index.backend import Backend, IndexOptions
from knnlm.index.exact import ExactBackend, ExactIndex
from knnlm.index.faiss import FaissBackend
from knnlm.index.ivf.backend import IVFBackend
from knnlm.index.protocol import Index
from knnlm.model.device import parse_device
from knnlm.progress import SILENT, Progress
from knnlm.rules import check_memory

BACKENDS: dict[IndexKind, Backend] = {
    IndexKind.exact: ExactBackend(),
    IndexKind.ivf: IVFBackend(IndexKind.ivf),
    IndexKind.compressed: IVFBackend(IndexKind.compressed),
    IndexKind.codes: IVFBackend(IndexKind.codes),
    IndexKind.faiss: FaissBackend(),
}
EXACT_UP_TO = 50_000  # entries: below, exact search costs less than the model


def choose_kind(store: Datastore, memory: int | None = None) -> IndexKind:
    """Return what "auto" means for a datastore.

    "exact" up to 50,000 entries; above, "ivf", which copies the keys list by list; "compressed",
    which keeps codes only and reads the datastore's own keys, where that copy would fill more than
    `memory` bytes; None: than half of the memory, the machine's or the part that a control group
    leaves to this process.
    """
    if len(store) <= EXACT_UP_TO:
        return IndexKind.exact
    copy_bytes = store.rows * store.settings.dimension * store.key_dtype.itemsize
    most = memory_bytes() / 2 if memory is None else memory
    return IndexKind.ivf if copy_bytes <= most else IndexKind.compressed


def build_index(
    store: Datastore | str | Path,
    kind: str = "auto",
    *,
    factory: str | None = None,
    nprobe: int | None = None,
    recall: float = 0.95,
    k: int = 1024,
    queries: Float[Tensor, "query dim"] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = SILENT,
    memory: int | str | None = None,
) -> Index:
    """Build the index that a datastore is searched with from now on.

    store: a datastore or its folder's path. kind: see `IndexKind`, and `choose_kind` for "auto".
    memory: how much this process may use of its own, without mapped files: bytes, or a text such as
    "8GiB"; None: half of the memory. The rest: see `IndexOptions`.

    A large ivf or compressed index that was begun with the same options, and of the same entries,
    is gone on with. Raises InvalidArgumentError, also where the memory cannot suffice,
    DatastoreLockedError and DatastoreWriteError, also where the disk cannot.
    """
    store, asked = open_datastore(store), parse_choice(IndexKind, "kind", kind)
    options = IndexOptions(
        factory,
        nprobe,
        recall,
        k,
        queries,
        seed,
        str(parse_device(device)),
        progress,
        None if memory is None else check_memory(memory),
    )
    with store.writer():
        chosen = _chosen(store, asked, options.memory)
        if (factory is not None) != BACKENDS[chosen].takes_factory:
            raise InvalidArgumentError(
                f"factory goes with kind faiss and only with it, got kind {kind!r} and factory "
                f"{factory!r}: for instance kind faiss, factory IVF1024,Flat"
            )
        return _build(store, chosen, asked, options)


def open_index(
    store: Datastore | str | Path, device: str = "cpu", coverage: str = "whole"
) -> Index:
    """Open the index that a datastore is searched with, on its cluster where one was started.

    Exact where none was built, and where a compaction has left it behind. coverage: see `Coverage`;
    without a cluster, searches leave out nothing. Raises DatastoreCorruptError, with the command
    that builds it again, ClusterError, and InvalidArgumentError.
    """
    store, device = open_datastore(store), str(parse_device(device))
    allowed = parse_choice(Coverage, "coverage", coverage)
    while True:
        cluster = stored_cluster(store.catalog)
        if cluster is not None and cluster.is_open:
            from knnlm.index.cluster.index import ClusterIndex

            return ClusterIndex(store, cluster, allowed)
        stored = stored_index(store.catalog)
        if stored.numbering != store.numbering:
            return ExactIndex(store, device)
        try:
            index = BACKENDS[IndexKind(stored.kind)].open(store, device)
        except (DatastoreNotFoundError, DatastoreCorruptError, DatastoreChangedError):
            if stored_index(store.catalog) == stored:
                raise
            continue  # another process has replaced the index meanwhile
        if stored_index(store.catalog) == stored:
            return index


def index_kind(store: Datastore) -> IndexKind:
    """Return the kind of index that was last built for a datastore."""
    return IndexKind(stored_index(store.catalog).kind)


def keep_index(
    store: Datastore | str | Path, device: str = "cpu", progress: Progress = SILENT
) -> None:
    """Bring a datastore's index up to date after a build or a compaction.

    Where "auto" was asked for and now means another kind, that kind is built; an index of a kind
    asked for by name stays of that kind; a damaged one is built again. Raises
    DatastoreLockedError, DatastoreWriteError.
    """
    store = open_datastore(store)
    with store.writer() as catalog:
        stored = stored_index(catalog)
        kind = _chosen(store, stored.asked, stored.memory)
        options = IndexOptions(
            stored.factory, device=device, progress=progress, memory=stored.memory
        )
        files = _kept_files(store, stored, kind, options)
        if files is None:
            _build(store, kind, stored.asked, options)
        else:
            _commit(store, replace(stored, files=files))


def _chosen(store: Datastore, asked: str, memory: int | None) -> IndexKind:
    return choose_kind(store, memory) if asked == IndexKind.auto else IndexKind(asked)


def _kept_files(
    store: Datastore, stored: StoredIndex, kind: IndexKind, options: IndexOptions
) -> tuple[IndexFile, ...] | None:
    """Return the files that hold an index from now on; None if it has to be built again."""
    if kind != stored.kind:
        return None
    if kind != IndexKind.exact and stored.numbering != store.numbering:
        return None
    try:
        return BACKENDS[kind].keep(store, stored, options)
    except DatastoreCorruptError:
        return None  # if it is the datastore that is damaged, building says so


def _build(store: Datastore, kind: IndexKind, asked: str, options: IndexOptions) -> Index:
    built = BACKENDS[kind].build(store, options)
    report = None if built.report is None else built.report.to_dict()
    _commit(store, StoredIndex(kind, asked, options.factory, report, built.files, options.memory))
    discard_unfinished(store.path)  # of another kind, or with other options
    return built.index


def _commit(store: Datastore, index: StoredIndex) -> None:
    """Make an index's files visible, and remove those of the older one."""
    if index != stored_index(store.catalog):
        with store.catalog.transaction(entries_change=False):
            store_index(store.catalog, index)
    remove_strays(store.path, store.catalog)
