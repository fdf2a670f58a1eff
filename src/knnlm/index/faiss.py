"""Any FAISS index, by its factory string: for comparison, and for those who know which they want.

Sets nprobe, k_factor and the mask of live rows where each of FAISS's wrappers really reads them.
Distances are FAISS's own: where keys are coded, those of the codes, unless the factory string
refines them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, file_problem, publish, writing
from knnlm.datastore.stored_index import FOLDER, IndexFile, StoredIndex, unused_name
from knnlm.datastore.unfit_keys import measurable
from knnlm.errors import DatastoreCorruptError, InvalidArgumentError, KNNLMError
from knnlm.index.backend import Built, IndexOptions, check_keys, live_rows, recorded_index
from knnlm.index.exact import ExactIndex
from knnlm.index.measure import choose_nprobe
from knnlm.index.protocol import Neighbors, check_search, merge_neighbors
from knnlm.index.report import IndexReport, Measured

_K_FACTOR = 4.0
_TRAINING_KEYS = 262_144
_ADDED_AT_ONCE = 65_536
_FAISS_ABSENT = 3e38  # FAISS pads with the largest float32


class FaissIndex:
    """The FAISS index of a datastore as `build` wrote it; follows every change of `store`.

    Rows appended since are searched exactly; forgotten ones are masked, or left out of a larger
    search where FAISS cannot mask. After a compaction that `store` has seen, search is exact until
    the index is opened again. Raises DatastoreNotFoundError if there is no such index,
    DatastoreCorruptError, and DatastoreChangedError if the datastore was compacted after the index
    was built.
    """

    exact_distances = False  # of codes, in most kinds

    def __init__(self, store: Datastore) -> None:
        stored, report = recorded_index(store, IndexKind.faiss)
        self.file = stored.files[0]
        self._open(store, _read_index(store, stored), report, _K_FACTOR)

    def _open(self, store: Datastore, index: Any, report: IndexReport, k_factor: float) -> None:
        self.store = store
        self.report = report
        self.nprobe = report.nprobe
        self._index = index
        self._k_factor = k_factor
        self._generation = -1
        self._behind: ExactIndex | None = None
        self._follow()

    @classmethod
    def build(
        cls, store: Datastore, options: IndexOptions, *, k_factor: float = _K_FACTOR
    ) -> "FaissIndex":
        """Train and fill an index in a new file, which the catalog does not name yet.

        options.factory: as "IVF1024,Flat" or "OPQ96_384,IVF1024,PQ96x4fs,RFlat". k_factor: how
        many candidates a refining index rescores for each neighbor.

        Raises InvalidArgumentError and DatastoreWriteError.
        """
        assert options.factory is not None, "the policy checks it"
        index = _trained(store, options.factory, options)
        refusing = _refusing(options.factory, "cannot be filled and searched")
        with refusing, options.progress.task("add keys", store.rows, "keys") as advance:
            for start, keys in store.key_blocks(_ADDED_AT_ONCE):
                check_keys(store, keys, start + torch.arange(len(keys)))
                index.add(keys.float().numpy())
                advance(len(keys))
            if store.rows:  # before anything is written
                wanted = _Wanted(options.nprobe or 1, k_factor, None, 1)
                index.search(keys[:1].float().numpy(), 1, params=_parameters(index, wanted))
        name = unused_name(store.path, f"{FOLDER}/faiss/{store.generation:08d}.index")
        _write_index(index, store.path / name)
        lists = _lists(index)
        built = cls.__new__(cls)
        built.file = IndexFile.written(store.path, name, 0, store.rows)
        report = IndexReport(
            rows=store.rows,
            generation=store.generation,
            numbering=store.numbering,
            nprobe=options.nprobe or lists or 1,
            bytes_per_entry=built.file.size_bytes / max(1, store.rows),
            measured=Measured(options.k, options.recall, 0.0, 0, 0.0),
        )
        built._open(store, index, report, k_factor)
        most = lists if options.nprobe is None else None
        measured = choose_nprobe(built, store, options, most)
        built.report = replace(report, nprobe=built.nprobe, measured=measured)
        return built

    def _follow(self) -> None:
        store = self.store
        if self._generation == store.generation:
            return
        if store.numbering != self.report.numbering:
            self._behind = self._behind or ExactIndex(store)
            self._generation = store.generation
            return
        alive = live_rows(store, self.report.rows)
        indexed = alive[: self.report.rows]
        self._dead = None if bool(indexed.all()) else ~indexed
        self._selector = None if self._dead is None else _selector(indexed)
        self._appended = (
            ExactIndex(store, first_row=self.report.rows)
            if bool(alive[self.report.rows :].any())
            else None
        )
        self._generation = store.generation

    def least_nprobe(self, k: int) -> int:
        """Return 1: FAISS looks into as few lists as it is told."""
        return 1

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest that FAISS finds; see `Index.search`."""
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        if self._behind is not None:
            return self._behind.search(queries, k)
        vectors = queries.detach().to("cpu", torch.float32).contiguous()
        neighbors = self._search(vectors, k)
        if self._appended is not None:
            neighbors = merge_neighbors(neighbors, self._appended.search(vectors, k), k)
        return Neighbors(
            neighbors.squared_distances.to(queries.device), neighbors.rows.to(queries.device)
        )

    def _search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        usable = measurable(queries)[:, None]
        vectors = queries.where(usable, torch.zeros_like(queries)).numpy()
        absent = Neighbors(
            torch.full((len(queries), k), torch.inf), torch.full((len(queries), k), -1)
        )
        if len(queries) == 0 or self.report.rows == 0 or not self._has_live():
            return absent
        try:
            neighbors = self._ask(vectors, k, self._selector)
        except RuntimeError:  # this kind cannot mask
            if self._selector is None:
                raise
            neighbors = self._ask_more(vectors, k)
        present = usable & neighbors.present
        return Neighbors(
            neighbors.squared_distances.masked_fill(~present, torch.inf).clamp_min(0.0),
            neighbors.rows.masked_fill(~present, -1),
        )

    def _has_live(self) -> bool:
        return self._dead is None or not bool(self._dead.all())

    def _ask(self, vectors: np.ndarray, k: int, selector: Any) -> Neighbors:
        wanted = _Wanted(self.nprobe, self._k_factor, selector, k)
        parameters = _parameters(self._index, wanted)
        distances, rows = self._index.search(vectors, k, params=parameters)
        absent = (rows < 0) | (distances > _FAISS_ABSENT)
        return Neighbors(
            torch.from_numpy(np.where(absent, np.float32(np.inf), distances)),
            torch.from_numpy(np.where(absent, -1, rows)),
        )

    def _ask_more(self, vectors: np.ndarray, k: int) -> Neighbors:
        """Ask for more neighbors until k of each query are live, and drop the forgotten ones."""
        assert self._dead is not None
        wanted = k
        while True:
            wanted = min(2 * wanted, self.report.rows)
            neighbors = self._ask(vectors, wanted, None)
            live = neighbors.present & ~self._dead[neighbors.rows.clamp_min(0)]
            if wanted == self.report.rows or bool((live.sum(dim=1) >= k).all()):
                break
        distances = neighbors.squared_distances.masked_fill(~live, torch.inf)
        nearest, columns = distances.sort(dim=1, stable=True)
        rows = neighbors.rows.masked_fill(~live, -1).gather(1, columns)
        padding = max(0, k - wanted)
        return Neighbors(
            torch.nn.functional.pad(nearest[:, :k], (0, padding), value=torch.inf),
            torch.nn.functional.pad(rows[:, :k], (0, padding), value=-1),
        )


class FaissBackend:
    """FAISS as a backend; an index is built again only after a compaction."""

    takes_factory = True

    def build(self, store: Datastore, options: IndexOptions) -> Built:
        """See `FaissIndex.build`."""
        index = FaissIndex.build(store, options)
        return Built(index, index.report, (index.file,))

    def open(self, store: Datastore, device: str) -> FaissIndex:
        """Open the index; FAISS computes on the CPU, whatever the device."""
        return FaissIndex(store)

    def keep(
        self, store: Datastore, stored: StoredIndex, options: IndexOptions
    ) -> tuple[IndexFile, ...]:
        """Return the same files: appended rows are searched exactly."""
        _read_index(store, stored)
        return stored.files


def _reason(error: Exception) -> str:
    """Return the last line of FAISS's message; the others name its source files."""
    return (str(error).splitlines() or [type(error).__name__])[-1]


@contextmanager
def _refusing(factory: str, step: str) -> Iterator[None]:
    """Turn the errors of FAISS about an unusual factory string into InvalidArgumentError."""
    try:
        yield
    except KNNLMError:
        raise
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"factory {factory!r} {step} ({_reason(error)}); try IVF1024,Flat"
        ) from error


def _read_index(store: Datastore, stored: StoredIndex) -> Any:
    """Map an index. FAISS trusts its files, so the whole file is checked before."""
    (file,) = stored.files
    path = store.path / file.name
    command = f"run: knnlm index {store.path} --kind faiss --factory {stored.factory}"
    if problem := file_problem(path, file.size_bytes, file.sha256):
        raise DatastoreCorruptError(f"{problem}; {command}")
    faiss = _faiss()
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DatastoreCorruptError(
            f"{path} cannot be read ({_reason(error)}); {command}"
        ) from error
    if (index.d, index.ntotal) != (store.settings.dimension, file.stop):
        raise DatastoreCorruptError(f"{path} is an index of other keys; {command}")
    return index


def _trained(store: Datastore, factory: str, options: IndexOptions) -> Any:
    """Return an empty FAISS index, trained on a sample of the keys."""
    dimension = store.settings.dimension
    with _refusing(factory, f"is none of FAISS's for {dimension} dimensions"):
        index = _faiss().index_factory(dimension, factory)
    generator = torch.Generator().manual_seed(options.seed)
    with options.progress.task("train the index", None, "keys"):
        sample = torch.randperm(store.rows, generator=generator)[:_TRAINING_KEYS]
        keys = store.keys_at(sample).float()
    check_keys(store, keys, sample)
    if len(keys):
        with _refusing(factory, f"cannot be trained on {len(keys)} keys"):
            index.train(keys.numpy())
    return index


def _write_index(index: Any, file: Path) -> None:
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ASIDE)
        try:
            _faiss().write_index(index, str(aside))
        except RuntimeError as error:
            aside.unlink(missing_ok=True)
            raise OSError(_reason(error)) from error
        publish(aside, file)


def _faiss() -> ModuleType:
    import faiss  # after torch, so that both share one thread pool

    module: ModuleType = faiss
    return module


def _selector(alive: Bool[Tensor, " rows"]) -> Any:
    bitmap = np.packbits(alive.numpy(), bitorder="little")
    selector = _faiss().IDSelectorBitmap(bitmap)
    selector.bitmap_kept = bitmap  # FAISS does not own it
    return selector


def _lists(index: Any) -> int | None:
    """Return how many lists an index has, or the one that it wraps."""
    faiss = _faiss()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexRefine):
        return _lists(inner.base_index)
    if isinstance(inner, faiss.IndexPreTransform):
        return _lists(inner.index)
    return int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else None


class _Wanted(NamedTuple):
    """What a search asks of every wrapper. selector: the live rows; None for all."""

    nprobe: int
    k_factor: float
    selector: Any
    k: int


def _parameters(index: Any, wanted: _Wanted) -> Any:
    """Return search parameters for an index and everything it wraps."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, wanted)
        parameters = faiss.SearchParametersPreTransform()
        parameters.index_params = inner
        parameters.inner_kept = inner
        return parameters
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, wanted)
        return faiss.IndexRefineSearchParameters(k_factor=wanted.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=wanted.selector, nprobe=wanted.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=wanted.selector, efSearch=max(wanted.k, 64))
    return None if wanted.selector is None else faiss.SearchParameters(sel=wanted.selector)
