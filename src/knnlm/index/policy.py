"""Which index a datastore is searched with: the registry of backends, the choice and the upkeep."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from knnlm.choices import IndexKind, parse_choice
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.available_memory import memory_bytes
from knnlm.index.backend import Backend, IndexOptions
from knnlm.index.exact import ExactBackend
from knnlm.index.faiss import FaissBackend
from knnlm.index.ivf.backend import IVFBackend
from knnlm.index.protocol import Index
from knnlm.index.report import SETTING, index_setting
from knnlm.model.device import parse_device
from knnlm.progress import SILENT, Progress

BACKENDS: dict[IndexKind, Backend] = {
    IndexKind.exact: ExactBackend(),
    IndexKind.ivf: IVFBackend(),
    IndexKind.compressed: IVFBackend(compressed=True),
    IndexKind.faiss: FaissBackend(),
}
EXACT_UP_TO = 50_000  # entries: below, exact search costs less than the model


def choose_kind(store: Datastore) -> IndexKind:
    """Return what "auto" means for a datastore.

    "exact" up to 50,000 entries; above, "ivf", which copies the keys list by list; "compressed",
    which keeps codes only and reads the datastore's own keys, where that copy would fill more than
    half of the memory: the machine's, or the part that a control group leaves to this process.
    """
    if len(store) <= EXACT_UP_TO:
        return IndexKind.exact
    copy_bytes = store.rows * store.settings.dimension * store.key_dtype.itemsize
    return IndexKind.ivf if copy_bytes <= memory_bytes() / 2 else IndexKind.compressed


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
) -> Index:
    """Build the index that a datastore is searched with from now on.

    store: a datastore or its folder's path. kind: see `IndexKind`, and `choose_kind` for "auto".
    The rest: see `IndexOptions`.

    Raises InvalidArgumentError, DatastoreLockedError, DatastoreWriteError.
    """
    store, asked = open_datastore(store), parse_choice(IndexKind, "kind", kind)
    options = IndexOptions(
        factory, nprobe, recall, k, queries, seed, str(parse_device(device)), progress
    )
    with store.writer() as catalog:
        chosen = _chosen(store, asked)
        backend = BACKENDS[chosen]
        if (factory is not None) != backend.takes_factory:
            raise InvalidArgumentError(
                f"factory goes with kind faiss and only with it, got kind {kind!r} and factory "
                f"{factory!r}: for instance kind faiss, factory IVF1024,Flat"
            )
        index = backend.build(store, options)
        _save(catalog, {"kind": chosen, "asked": asked, "report": backend.report(store)})
    return index


def open_index(store: Datastore | str | Path, device: str = "cpu") -> Index:
    """Open the index that a datastore is searched with; exact where none was built.

    Raises DatastoreChangedError, with the command to run, if the datastore was compacted since.
    """
    store = open_datastore(store)
    return BACKENDS[index_kind(store)].open(store, str(parse_device(device)))


def index_kind(store: Datastore) -> IndexKind:
    """Return the kind of index that a datastore is searched with."""
    return IndexKind(index_setting(store.catalog)["kind"])


def keep_index(
    store: Datastore | str | Path, device: str = "cpu", progress: Progress = SILENT
) -> None:
    """Bring a datastore's index up to date after a build or a compaction.

    Where "auto" was asked for and now means another kind, that kind is built; an index of a kind
    asked for by name stays of that kind. Raises DatastoreLockedError, DatastoreWriteError.
    """
    store = open_datastore(store)
    setting = index_setting(store.catalog)
    kind, asked = index_kind(store), setting["asked"]
    if kind != _chosen(store, asked):
        build_index(store, asked, device=device, progress=progress)
        return
    with store.writer() as catalog:
        BACKENDS[kind].keep(store, IndexOptions(device=device, progress=progress))
        _save(catalog, {"kind": kind, "asked": asked, "report": BACKENDS[kind].report(store)})


def _chosen(store: Datastore, asked: str) -> IndexKind:
    return choose_kind(store) if asked == IndexKind.auto else IndexKind(asked)


def _save(catalog: Catalog, setting: dict[str, Any]) -> None:
    if setting != index_setting(catalog):
        with catalog.transaction(entries_change=False):
            catalog.set(SETTING, setting)
