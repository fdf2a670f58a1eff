"""Which index a datastore is searched with, how it is chosen, and what is known of it."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from knnlm.choices import IndexKind, parse_choice
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.available_memory import memory_bytes
from knnlm.index.exact import ExactIndex
from knnlm.index.faiss import FaissIndex, FaissReport
from knnlm.index.ivf.file import IVFReport
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.protocol import Index
from knnlm.progress import SILENT, Progress

EXACT_UP_TO = 50_000  # entries: below, exact search costs less than the model
_GROWN = 1.25  # times the entries it was built from: then an index is built anew
_SETTING = "index"


def choose_kind(store: Datastore) -> str:
    """Return what "auto" means for a datastore.

    "exact" up to 50,000 entries; above, "ivf", which copies the keys list by list; "compressed",
    which keeps codes only and reads the datastore's own keys, where that copy would fill more than
    half of the memory: the machine's, or what a control group leaves this process.
    """
    if len(store) <= EXACT_UP_TO:
        return "exact"
    copy_bytes = store.rows * store.settings.dimension * store.key_dtype.itemsize
    return "ivf" if copy_bytes <= memory_bytes() / 2 else "compressed"


def build_index(
    store: Datastore,
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

    kind: see `IndexKind`; see `choose_kind` for "auto". factory: FAISS's, for kind "faiss". nprobe:
    lists that a query looks into; None: the fewest that reach `recall` of the k true nearest.
    queries: real ones to measure it with; None: stored keys.

    Raises InvalidArgumentError, DatastoreLockedError, DatastoreWriteError, MissingDependencyError.
    """
    parse_choice(IndexKind, "kind", kind)
    if (factory is not None) != (kind == "faiss"):
        raise InvalidArgumentError(
            f"factory goes with kind faiss and only with it, got kind {kind!r} and factory "
            f"{factory!r}: for instance kind faiss, factory IVF1024,Flat"
        )
    if not 0.0 < recall <= 1.0:
        raise InvalidArgumentError(f"recall must be above 0 and at most 1, got {recall}: try 0.95")
    with store.writer() as catalog:
        chosen = choose_kind(store) if kind == "auto" else kind
        index: Index
        if chosen == "exact":
            index = ExactIndex(store, device)
        elif factory is not None:
            index = FaissIndex.build(
                store,
                factory,
                nprobe=nprobe,
                recall=recall,
                k=k,
                queries=queries,
                seed=seed,
                progress=progress,
            )
        else:
            index = IVFIndex.build(
                store,
                kind="compressed" if chosen == "compressed" else None,
                nprobe=nprobe,
                recall=recall,
                k=k,
                queries=queries,
                seed=seed,
                device=device,
                progress=progress,
            )
        with catalog.transaction(entries_change=False):
            catalog.set(_SETTING, {"kind": chosen, "asked": kind})
    return index


def open_index(store: Datastore, device: str = "cpu") -> Index:
    """Open the index that a datastore is searched with; exact where none was built.

    Raises DatastoreChangedError, with the command to run, for one that a compaction left behind.
    """
    kind = index_kind(store)
    if kind == "exact":
        return ExactIndex(store, device)
    return FaissIndex(store) if kind == "faiss" else IVFIndex(store, device)


def index_kind(store: Datastore) -> str:
    """Return the kind of index that a datastore is searched with."""
    setting = store.catalog.get(_SETTING)
    return "exact" if setting is None else str(setting["kind"])


def keep_index(store: Datastore, device: str = "cpu", progress: Progress = SILENT) -> None:
    """Build the index anew where the datastore has outgrown it or a compaction left it behind.

    Appended and forgotten entries alone need no rebuilding until they are a quarter of the whole;
    appended ones are written beside it.
    An index of a kind that somebody asked for by name stays of that kind.
    """
    setting = store.catalog.get(_SETTING) or {"kind": "exact", "asked": "auto"}
    asked, kind = setting["asked"], setting["kind"]
    factory = None
    if kind == (choose_kind(store) if asked == "auto" else asked):
        if kind == "exact":
            return
        report = _stored_report(store, kind)
        outgrown = kind != "faiss" and store.rows > _GROWN * report.rows
        if report.numbering == store.numbering and not outgrown:
            if kind != "faiss" and store.rows > report.rows:
                with store.writer():
                    IVFIndex.keep_appended(store, progress)
            return
        factory = report.factory if isinstance(report, FaissReport) else None
    build_index(store, asked, factory=factory, device=device, progress=progress)


def _stored_report(store: Datastore, kind: str) -> FaissReport | IVFReport:
    return FaissIndex.stored_report(store) if kind == "faiss" else IVFIndex.stored_report(store)


def describe_index(store: Datastore) -> dict[str, Any]:
    """Return what is known of a datastore's index, as plain values.

    recall is of the k true nearest, measured when it was built.
    """
    kind = index_kind(store)
    if kind == "exact":
        return {"kind": "exact", "recall": 1.0}
    report = _stored_report(store, kind)
    measured = report.measured
    return {
        "kind": kind,
        "recall": measured.recall,
        "target_recall": measured.target_recall,
        "k": measured.k,
        "nprobe": report.nprobe,
        "bytes_per_entry": report.bytes_per_entry,
        "milliseconds_per_query": measured.milliseconds_per_query,
        "entries": report.rows,
    }
