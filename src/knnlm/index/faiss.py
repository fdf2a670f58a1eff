"""Any FAISS index, by its factory string: for comparison, and for those who know which they want.

Sets nprobe, k_factor and the mask of live rows where each of FAISS's wrappers really reads them.
Distances are FAISS's own: where keys are coded, those of the codes, unless the factory string
refines them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, publish, remove_files_except, writing
from knnlm.errors import (
    DatastoreChangedError,
    DatastoreCorruptError,
    DatastoreNotFoundError,
    InvalidArgumentError,
    KNNLMError,
)
from knnlm.index.backend import IndexOptions, check_keys
from knnlm.index.exact import ExactIndex
from knnlm.index.measure import choose_nprobe
from knnlm.index.protocol import Neighbors, check_search, measurable, merge_neighbors
from knnlm.index.report import IndexReport, Measured

FOLDER = "faiss"
_REPORT = "report.json"
_TRAINING_KEYS = 262_144
_ADDED_AT_ONCE = 65_536
_FAISS_ABSENT = 3e38  # FAISS pads with the largest float32


@dataclass(frozen=True, slots=True)
class _Stored:
    """The contents of report.json: the file of an index, how it is searched, and its report."""

    file: str
    factory: str
    k_factor: float
    report: IndexReport

    def to_dict(self) -> dict[str, Any]:
        own = {"file": self.file, "factory": self.factory, "k_factor": self.k_factor}
        return own | self.report.to_dict()

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "_Stored":
        report = IndexReport.from_dict(plain)
        return cls(plain["file"], plain["factory"], plain["k_factor"], report)


class FaissIndex:
    """The FAISS index of a datastore as `build` wrote it; follows every change of `store`.

    Rows appended since are searched exactly; forgotten ones are masked, or left out of a larger
    search where FAISS cannot mask. Raises DatastoreNotFoundError if there is no such index,
    DatastoreCorruptError, and DatastoreChangedError after a compaction.
    """

    exact_distances = False  # of codes, in most kinds

    def __init__(self, store: Datastore) -> None:
        stored = _read_stored(store)
        file = _folder(store) / stored.file
        faiss = _faiss()
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DatastoreCorruptError(
                f"{file} cannot be read ({_reason(error)}); run: {_command(store, stored.factory)}"
            ) from error
        self._open(store, stored, index)

    def _open(self, store: Datastore, stored: _Stored, index: Any) -> None:
        self.store = store
        self.nprobe = stored.report.nprobe
        self._stored = stored
        self._index = index
        self._generation = -1
        self._follow()

    @classmethod
    def build(
        cls, store: Datastore, options: IndexOptions, *, k_factor: float = 4.0
    ) -> "FaissIndex":
        """Train and fill an index, in place of an older one, and measure it.

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
        folder = _folder(store)
        file = folder / f"{store.generation:08d}.index"
        _write_index(index, file)
        lists = _lists(index)
        report = IndexReport(
            rows=store.rows,
            generation=store.generation,
            numbering=store.numbering,
            nprobe=options.nprobe or lists or 1,
            bytes_per_entry=file.stat().st_size / max(1, store.rows),
            measured=Measured(options.k, options.recall, 0.0, 0, 0.0),
        )
        built = cls.__new__(cls)
        built._open(store, _Stored(file.name, options.factory, k_factor, report), index)
        most = lists if options.nprobe is None else None
        measured = choose_nprobe(built, store, options, most)
        report = replace(report, nprobe=built.nprobe, measured=measured)
        built._stored = replace(built._stored, report=report)
        with writing(folder):
            aside = folder / (_REPORT + ASIDE)
            aside.write_text(json.dumps(built._stored.to_dict()), encoding="utf-8")
            publish(aside, folder / _REPORT)
        remove_files_except(folder, {file.name, _REPORT})
        return built

    @property
    def report(self) -> IndexReport:
        """What the index was built from, and what was measured then."""
        return self._stored.report

    def _follow(self) -> None:
        store = self.store
        if self._generation == store.generation:
            return
        if store.numbering != self.report.numbering:
            raise DatastoreChangedError(
                f"{store.path} was compacted after its index was built; run: "
                f"{_command(store, self._stored.factory)}"
            )
        alive = store.alive
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
        wanted = _Wanted(self.nprobe, self._stored.k_factor, selector, k)
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

    def build(self, store: Datastore, options: IndexOptions) -> FaissIndex:
        """See `FaissIndex.build`."""
        return FaissIndex.build(store, options)

    def open(self, store: Datastore, device: str) -> FaissIndex:
        """Open the index; FAISS computes on the CPU, whatever the device."""
        return FaissIndex(store)

    def report(self, store: Datastore) -> dict[str, Any]:
        """Return the facts in the index's own report."""
        return _read_stored(store).report.facts()

    def keep(self, store: Datastore, options: IndexOptions) -> None:
        """Build the index again, from the same factory string, if rows were renumbered."""
        stored = _read_stored(store)
        if stored.report.numbering != store.numbering:
            self.build(store, replace(options, factory=stored.factory))


def _folder(store: Datastore) -> Path:
    return store.path / "index" / FOLDER


def _command(store: Datastore, factory: str) -> str:
    return f"knnlm index {store.path} --kind faiss --factory {factory}"


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


def _read_stored(store: Datastore) -> _Stored:
    path = _folder(store) / _REPORT
    try:
        return _Stored.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DatastoreNotFoundError(
            f"{store.path} has no FAISS index; make one with: {_command(store, 'IVF1024,Flat')}"
        ) from error


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
