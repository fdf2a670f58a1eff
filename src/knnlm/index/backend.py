"""What a search backend implements, and the options of a build.

A backend is one file: a class with these methods, a line in the registry of `policy.py`, and a
member of `IndexKind`.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from knnlm.choices import check_number, check_seed
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.protocol import Index
from knnlm.mixture.parameters import check_k
from knnlm.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """How to build an index; each backend reads the options that apply to it.

    factory: FAISS's factory string. nprobe: how many lists a query looks into; None: the fewest
    that reach `recall` of the k true nearest. queries: real ones to measure recall with; None:
    stored keys. device: where searches compute, "cpu" or a GPU.

    Raises InvalidArgumentError for a recall outside (0, 1] and for k or nprobe below 1.
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
        if not 0.0 < self.recall <= 1.0:
            raise InvalidArgumentError(
                f"recall must be above 0 and at most 1, got {self.recall}: try 0.95"
            )
        check_k(self.k)
        check_seed(self.seed)
        if self.nprobe is not None:
            check_number("nprobe", self.nprobe, 1)


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
