"""Any FAISS index, by its factory string: for comparison, and for those who know which they want.

Sets nprobe, k_factor and tombstones where each of FAISS's wrappers really reads them. Distances
are FAISS's own: of the codes, where keys are coded, unless the factory string refines them.
"""

import json
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

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
    missing_dependency,
)
from knnlm.index.exact import ExactIndex
from knnlm.index.measure import Measured, choose_nprobe
from knnlm.index.protocol import Neighbors, check_search, merge_neighbors
from knnlm.progress import SILENT, Progress

FOLDER = "faiss"
_REPORT = "report.json"
_TRAINING_KEYS = 262_144
_ADDED_AT_ONCE = 65_536
_FAISS_ABSENT = 3e38  # FAISS pads with the largest float32


@dataclass(frozen=True, slots=True)
class FaissReport:
    """What a FAISS index is and what it was measured to give when it was built.

    nprobe: 1 where it has no lists.
    """

    file: str
    factory: str
    nprobe: int
    k_factor: float
    rows: int
    generation: int
    numbering: int
    bytes_per_entry: float
    measured: Measured


class FaissIndex:
    """The FAISS index of a datastore as `build` wrote it; follows every change of `store`.

    Rows appended since are searched exactly beside it, forgotten ones are masked, or left out of a
    larger search where FAISS cannot mask. Raises DatastoreNotFoundError if there is none,
    DatastoreCorruptError, DatastoreChangedError after a compaction, MissingDependencyError.
    """

    exact_distances = False  # of codes, in most kinds

    def __init__(self, store: Datastore) -> None:
        faiss = _faiss()
        self.report = self.stored_report(store)
        file = store.path / "index" / FOLDER / self.report.file
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DatastoreCorruptError(
                f"{file} cannot be read ({str(error).splitlines()[-1]}); run: knnlm index "
                f"{store.path} --kind faiss --factory {self.report.factory}"
            ) from error
        self._open(store, index)

    @staticmethod
    def stored_report(store: Datastore) -> FaissReport:
        """Read the report of a datastore's FAISS index; raises DatastoreNotFoundError."""
        path = store.path / "index" / FOLDER / _REPORT
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DatastoreNotFoundError(
                f"{store.path} has no FAISS index; make one with: knnlm index {store.path} "
                "--kind faiss --factory IVF1024,Flat"
            ) from error
        return FaissReport(**report | {"measured": Measured(**report["measured"])})

    def _open(self, store: Datastore, index: Any) -> None:
        self.store = store
        self.nprobe = self.report.nprobe
        self._index = index
        self._generation = -1
        self._follow()

    @classmethod
    def build(
        cls,
        store: Datastore,
        factory: str,
        *,
        nprobe: int | None = None,
        k_factor: float = 4.0,
        recall: float = 0.95,
        k: int = 1024,
        queries: Float[Tensor, "query dim"] | None = None,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> "FaissIndex":
        """Train and fill an index, in place of any there was, and measure it.

        factory: FAISS's, as "IVF1024,Flat" or "OPQ96_384,IVF1024,PQ96x4fs,RFlat". nprobe: lists
        that a query looks into; None: the fewest that reach `recall` of the k nearest. k_factor:
        how many candidates a refining index rescores for each neighbor.

        Raises InvalidArgumentError, MissingDependencyError, DatastoreWriteError.
        """
        faiss = _faiss()
        dimension = store.settings.dimension
        try:
            index = faiss.index_factory(dimension, factory)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"factory {factory!r} is none of FAISS's for {dimension} dimensions "
                f"({str(error).splitlines()[-1]}); try IVF1024,Flat"
            ) from error
        generator = torch.Generator().manual_seed(seed)
        with progress.task("train the index", None, "keys"):
            sample = torch.randperm(store.rows, generator=generator)[:_TRAINING_KEYS]
            try:
                if len(sample):
                    index.train(store.keys_at(sample).float().numpy())
            except RuntimeError as error:
                raise InvalidArgumentError(
                    f"factory {factory!r} cannot be trained on {len(sample)} keys "
                    f"({str(error).splitlines()[-1]}); ask for fewer lists"
                ) from error
        with progress.task("add keys", store.rows, "keys") as advance:
            for _, keys in store.key_blocks(_ADDED_AT_ONCE):
                index.add(keys.float().numpy())
                advance(len(keys))
        folder = store.path / "index" / FOLDER
        file = folder / f"{store.generation:08d}.index"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(file.name + ASIDE)
            try:
                faiss.write_index(index, str(aside))
            except RuntimeError as error:
                aside.unlink(missing_ok=True)
                raise OSError(str(error).splitlines()[-1]) from error
            publish(aside, file)
        built = cls.__new__(cls)
        lists = _lists(faiss, index)
        built.report = FaissReport(
            file=file.name,
            factory=factory,
            nprobe=nprobe or lists or 1,
            k_factor=k_factor,
            rows=store.rows,
            generation=store.generation,
            numbering=store.numbering,
            bytes_per_entry=file.stat().st_size / max(1, store.rows),
            measured=Measured(k, recall, 0.0, 0, 0.0),
        )
        built._open(store, index)
        measured = choose_nprobe(
            built, store, k, recall, lists if nprobe is None else None, queries, seed, progress
        )
        report = built.report = replace(built.report, nprobe=built.nprobe, measured=measured)
        with writing(folder):
            aside = folder / (_REPORT + ASIDE)
            aside.write_text(json.dumps(asdict(report)), encoding="utf-8")
            publish(aside, folder / _REPORT)
        remove_files_except(folder, {file.name, _REPORT})
        return built

    def _follow(self) -> None:
        store = self.store
        if self._generation == store.generation:
            return
        if store.numbering != self.report.numbering:
            raise DatastoreChangedError(
                f"{store.path} was compacted after its index was built; run: knnlm index "
                f"{store.path} --kind faiss --factory {self.report.factory}"
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
        """Return how many lists a search for k looks into at least: FAISS asks for no more."""
        return 1

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest that FAISS finds; see `Index.search`."""
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        there = queries.detach().to("cpu", torch.float32).contiguous()
        found = self._search(there, k)
        if self._appended is not None:
            found = merge_neighbors(found, self._appended.search(there, k), k)
        return Neighbors(found.squared_distances.to(queries.device), found.rows.to(queries.device))

    def _search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        finite = queries.isfinite().all(dim=1, keepdim=True)
        vectors = queries.where(finite, torch.zeros_like(queries)).numpy()
        absent = Neighbors(
            torch.full((len(queries), k), torch.inf), torch.full((len(queries), k), -1)
        )
        if len(queries) == 0 or self.report.rows == 0 or not self._has_live():
            return absent
        try:
            found = self._ask(vectors, k, self._selector)
        except RuntimeError:  # this kind cannot mask
            if self._selector is None:
                raise
            found = self._ask_more(vectors, k)
        present = finite & (found.rows >= 0)
        return Neighbors(
            found.squared_distances.masked_fill(~present, torch.inf).clamp_min(0.0),
            found.rows.masked_fill(~present, -1),
        )

    def _has_live(self) -> bool:
        return self._dead is None or not bool(self._dead.all())

    def _ask(self, vectors: np.ndarray, k: int, selector: Any) -> Neighbors:
        faiss = _faiss()
        parameters = _parameters(faiss, self._index, self.nprobe, self.report.k_factor, selector, k)
        distances, rows = self._index.search(vectors, k, params=parameters)
        absent = (rows < 0) | (distances > _FAISS_ABSENT)
        return Neighbors(
            torch.from_numpy(np.where(absent, np.float32(np.inf), distances)),
            torch.from_numpy(np.where(absent, -1, rows)),
        )

    def _ask_more(self, vectors: np.ndarray, k: int) -> Neighbors:
        """Ask for more neighbors until k of each query are live, and leave the dead out."""
        assert self._dead is not None
        wanted = k
        while True:
            wanted = min(2 * wanted, self.report.rows)
            found = self._ask(vectors, wanted, None)
            live = (found.rows >= 0) & ~self._dead[found.rows.clamp_min(0)]
            if wanted == self.report.rows or bool((live.sum(dim=1) >= k).all()):
                break
        distances = found.squared_distances.masked_fill(~live, torch.inf)
        nearest, columns = distances.sort(dim=1, stable=True)
        rows = found.rows.masked_fill(~live, -1).gather(1, columns)
        padding = max(0, k - wanted)
        return Neighbors(
            torch.nn.functional.pad(nearest[:, :k], (0, padding), value=torch.inf),
            torch.nn.functional.pad(rows[:, :k], (0, padding), value=-1),
        )


def _faiss() -> ModuleType:
    try:
        import faiss  # after torch, so that both share one thread pool
    except ImportError as error:
        raise missing_dependency("faiss-cpu", "a FAISS index", "faiss") from error
    module: ModuleType = faiss
    return module


def _selector(alive: Bool[Tensor, " rows"]) -> Any:
    bitmap = np.packbits(alive.numpy(), bitorder="little")
    selector = _faiss().IDSelectorBitmap(bitmap)
    selector.bitmap_kept = bitmap  # FAISS does not own it
    return selector


def _lists(faiss: ModuleType, index: Any) -> int | None:
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexRefine):
        return _lists(faiss, inner.base_index)
    if isinstance(inner, faiss.IndexPreTransform):
        return _lists(faiss, inner.index)
    return int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else None


def _parameters(
    faiss: ModuleType, index: Any, nprobe: int, k_factor: float, selector: Any, k: int
) -> Any:
    """Return search parameters for an index and everything it wraps."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(faiss, index.index, nprobe, k_factor, selector, k)
        parameters = faiss.SearchParametersPreTransform()
        parameters.index_params = inner
        parameters.inner_kept = inner
        return parameters
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(faiss, index.base_index, nprobe, k_factor, selector, k)
        return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(k, 64))
    return None if selector is None else faiss.SearchParameters(sel=selector)
