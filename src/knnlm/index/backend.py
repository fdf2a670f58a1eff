"""What a search backend implements, and the options of a build.

A backend is one file: a class with these methods, a line in the registry of `policy.py`, and a
member of `IndexKind`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import IndexFile, StoredIndex, stored_index
from knnlm.datastore.unfit_keys import measurable
from knnlm.errors import DatastoreChangedError, DatastoreNotFoundError
from knnlm.index.protocol import Index
from knnlm.index.report import IndexReport
from knnlm.progress import SILENT, Progress
from knnlm.rules import check_k, check_memory, check_recall, check_seed, check_whole


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How to build an index; each backend reads the options that apply to it.

    factory: FAISS's factory string. nprobe: how many lists a query looks into; None: the fewest
    that reach `recall` of the k true nearest. queries: real ones to measure recall with; None:
    stored keys. device: where searches compute, "cpu" or a GPU. memory: how many bytes this process
    may use of its own, without mapped files; None: half of the memory.

    Raises InvalidArgumentError for a recall outside (0, 1], for k or nprobe below 1 and for a seed
    beyond int64.
    """

    factory: str | None = None
    nprobe: int | None = None
    recall: float = 0.95
    k: int = 1024
    queries: Float[Tensor, "query dim"] | None = None
    seed: int = 0
    device: str = "cpu"
    progress: Progress = SILENT
    memory: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "recall", check_recall(self.recall))
        object.__setattr__(self, "k", check_k(self.k))
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.memory is not None:
            object.__setattr__(self, "memory", check_memory(self.memory))
        if self.nprobe is not None:
            object.__setattr__(self, "nprobe", check_whole("nprobe", self.nprobe))


def live_rows(store: Datastore, count: int) -> Bool[Tensor, " rows"]:
    """Return which of the first `count` rows are searched: those after the snapshot's are not.

    At least the snapshot's own rows are returned.
    """
    alive = store.alive
    return torch.nn.functional.pad(alive, (0, max(0, count - len(alive))))


def recorded_index(store: Datastore, *kinds: IndexKind) -> tuple[StoredIndex, IndexReport]:
    """Return what the catalog records of an index of one of some kinds, which `store` can use.

    Raises DatastoreNotFoundError and DatastoreChangedError.
    """
    stored = stored_index(store.catalog)
    if stored.report is None or stored.kind not in kinds:
        raise DatastoreNotFoundError(
            f"{store.path} has no {kinds[0]} index; make one with: "
            f"knnlm index {store.path} --kind {kinds[0]}"
        )
    if stored.numbering != store.numbering:
        raise DatastoreChangedError(
            f"{store.path} was compacted and indexed again since it was opened; open it again"
        )
    return stored, IndexReport.from_dict(stored.report)


@dataclass(frozen=True, slots=True)
class Built:
    """An index as it was built: until its files are in the catalog, no reader sees them.

    report, files: as in `StoredIndex`; None and () for exact search, which has no files.
    """

    index: Index
    report: IndexReport | None = None
    files: tuple[IndexFile, ...] = ()


@runtime_checkable
class Backend(Protocol):
    """One kind of index: how it is built, opened and kept up to date.

    takes_factory: whether a build needs a FAISS factory string; the others refuse one.
    """

    takes_factory: bool

    def build(self, store: Datastore, options: IndexOptions) -> Built:
        """Write the index of a datastore to files with new names, and measure it.

        For the one writer of the datastore. Raises InvalidArgumentError and DatastoreWriteError.
        """
        ...

    def open(self, store: Datastore, device: str) -> Index:
        """Open the index that the catalog names; it answers for the rows of `store`.

        Rows that it lacks are searched beside it; those appended after `store` was opened are
        masked. Raises DatastoreNotFoundError, DatastoreCorruptError, and DatastoreChangedError if
        rows were renumbered since.
        """
        ...

    def keep(
        self, store: Datastore, stored: StoredIndex, options: IndexOptions
    ) -> tuple[IndexFile, ...] | None:
        """Return the index's files, with new ones for rows appended since.

        None if it has to be built again. For the one writer of the datastore. Raises
        DatastoreCorruptError and DatastoreWriteError.
        """
        ...


def check_keys(store: Datastore, keys: Float[Tensor, "n dim"], rows: Int[Tensor, " n"]) -> None:
    """Refuse stored keys, of these rows, that are not `measurable`: DatastoreCorruptError."""
    fit = measurable(keys)
    if not bool(fit.all()):
        raise store.unfit_key(int(rows[~fit][0]))
