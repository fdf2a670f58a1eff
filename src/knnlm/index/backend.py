"""What a search backend implements, and the options of a build.

A backend is one file: a class with these methods, a line in the registry of `policy.py`, and a
member of `IndexKind`.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import NonFiniteKeysError
from knnlm.index.protocol import Index, measurable, why_unmeasurable
from knnlm.progress import SILENT, Progress
from knnlm.rules import check_k, check_recall, check_seed, check_whole


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How to build an index; each backend reads the options that apply to it.

    factory: FAISS's factory string. nprobe: how many lists a query looks into; None: the fewest
    that reach `recall` of the k true nearest. queries: real ones to measure recall with; None:
    stored keys. device: where searches compute, "cpu" or a GPU.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "recall", check_recall(self.recall))
        object.__setattr__(self, "k", check_k(self.k))
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.nprobe is not None:
            object.__setattr__(self, "nprobe", check_whole("nprobe", self.nprobe))


@runtime_checkable
class Backend(Protocol):
    """One kind of index: how it is built, opened, reported and kept up to date.

    takes_factory: whether a build needs a FAISS factory string; the others refuse one.
    """

    takes_factory: bool

    def build(self, store: Datastore, options: IndexOptions) -> Index:
        """Build the index of a datastore in place of an older one of this kind, and measure it.

        For the one writer of the datastore. Raises InvalidArgumentError and DatastoreWriteError.
        """
        ...

    def open(self, store: Datastore, device: str) -> Index:
        """Open the index that `build` wrote.

        Raises DatastoreNotFoundError, DatastoreCorruptError, and DatastoreChangedError, with the
        command to run, if the datastore was compacted since.
        """
        ...

    def report(self, store: Datastore) -> dict[str, Any]:
        """Return the facts about the index as plain values, among them its `recall`."""
        ...

    def keep(self, store: Datastore, options: IndexOptions) -> None:
        """Bring the index up to date after rows were appended, forgotten or renumbered.

        For the one writer of the datastore. Builds the index again where that is necessary.
        """
        ...


def check_keys(store: Datastore, keys: Float[Tensor, "n dim"], rows: Int[Tensor, " n"]) -> None:
    """Refuse stored keys that are not `measurable`; raises NonFiniteKeysError.

    rows: of the keys.
    """
    fit = measurable(keys)
    if not bool(fit.all()):
        raise unmeasurable_key(store, int(rows[~fit][0]))


def unmeasurable_key(store: Datastore, row: int) -> NonFiniteKeysError:
    """Return the error for a stored key that is not `measurable`."""
    return NonFiniteKeysError(
        f"{store.path}: the key of row {row}, in document {store.document_at(row).name!r}, is "
        f"{why_unmeasurable(store.keys_at(torch.tensor([row])))}, so that it cannot be searched; "
        "forget that document and run knnlm compact"
    )
