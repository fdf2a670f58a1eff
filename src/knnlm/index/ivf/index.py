"""The inverted-file index: fast approximate search with exact distances, measured when built.

Keys lie list by list in a memory-mapped file, each with an 8-bit code. A search reads the codes of
the lists nearest to a query, and the keys of its best candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import FOLDER, IndexFile, stored_index, unused_name
from knnlm.errors import DatastoreCorruptError
from knnlm.index.available_memory import memory_bytes
from knnlm.index.backend import IndexOptions, live_rows, recorded_index
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf.appended import Run, read_runs, write_run
from knnlm.index.ivf.build import Learned, coded_file
from knnlm.index.ivf.calibration import Calibration, calibrated
from knnlm.index.ivf.codes import CodeShape
from knnlm.index.ivf.forecast import planned_work
from knnlm.index.ivf.lists import ProbingQueries, default_nlist
from knnlm.index.ivf.parts import Part
from knnlm.index.ivf.products import LARGEST_EXACT_CODE_DIM
from knnlm.index.ivf.reading import identity, read_base
from knnlm.index.ivf.search_tensors import rescore, search_tensors
from knnlm.index.ivf.training import learn_lists
from knnlm.index.measure import choose_nprobe
from knnlm.index.protocol import Neighbors, check_search
from knnlm.index.report import IndexReport, Measured
from knnlm.index.share import Share
from knnlm.progress import SILENT, Progress
from knnlm.rules import check_whole
from knnlm.threads import workers

FILE_NAME = "ivf.safetensors"
_QUERIES_AT_ONCE = 8192
_CANDIDATES_AT_ONCE = 1 << 23
_FEW_QUERIES = 48
_PREPARED_AT_ONCE = 256
_ENTRIES_PER_NEIGHBOR = 4  # in the probed lists, at least
_SPARE_CANDIDATES = 32
_SHORT = 0.75  # of the memory: a search that needs more reads the disk
_CODE_SHAPES = {
    IndexKind.ivf: CodeShape(),
    IndexKind.compressed: CodeShape(128, bits=4),
    IndexKind.codes: CodeShape(512, bits=4),
}
# how many candidates, chosen by their codes, for each neighbor wanted
_OVERSAMPLING = {IndexKind.ivf: 1.6, IndexKind.compressed: 2.0, IndexKind.codes: 1.0}


class IVFIndex:
    """The index of a datastore as `build` wrote it; follows every change that `store` has seen.

    Appended rows are added to the lists, forgotten ones masked. nprobe: how many lists a query
    looks into; where that many could not hold enough neighbors, it looks into more.

    After a compaction that `store` has seen, search is exact until the index is opened again.

    device: where searches compute, "cpu" or a GPU. share: look only into the lists of one share;
    then `store` must not be refreshed. Raises DatastoreNotFoundError if there is no such index,
    DatastoreCorruptError, and DatastoreChangedError if the datastore was compacted after the index
    was built.
    """

    def __init__(self, store: Datastore, device: str = "cpu", share: Share | None = None) -> None:
        self._share = share
        stored, report = recorded_index(store, *_CODE_SHAPES)
        self.kind = IndexKind(stored.kind)
        self._open(store, stored.files[0], report, device)

    def _open(self, store: Datastore, file: IndexFile, report: IndexReport, device: str) -> None:
        self.store = store
        self.device = torch.device(device)
        self.file = file
        self.report = report
        self.nprobe = self.report.nprobe
        self._base, self._lists = read_base(store, file)
        self._runs: list[Run] = []
        self._behind: ExactIndex | None = None
        self._lists_on_device = self._lists.to(self.device)
        self._tail: tuple[int, int, Part] | None = None  # first row, stop, in memory
        self._generation = -1
        self._compiled = self.device.type == "cpu"
        self._follow()

    @property
    def exact_distances(self) -> bool:
        """Whether distances are those of the keys themselves, not of codes."""
        return self.kind is not IndexKind.codes

    @property
    def nlist(self) -> int:
        """How many lists the index has."""
        return len(self._lists.centroids)

    @classmethod
    def build(
        cls,
        store: Datastore,
        options: IndexOptions,
        *,
        kind: IndexKind = IndexKind.ivf,
        nlist: int | None = None,
        code_dim: int | None = None,
    ) -> "IVFIndex":
        """Build the index of a datastore in a new file, which the catalog does not name yet.

        kind: ivf copies the keys, compressed reads the candidates' keys from the datastore, codes
        reads none. nlist: how many lists; None: about 1.35 √entries. code_dim: how many dimensions
        codes have; None: what serves the kind.

        Raises InvalidArgumentError and DatastoreWriteError.
        """
        nlist = default_nlist(store.rows) if nlist is None else nlist
        _check_build(store, options.nprobe, nlist, code_dim)
        key_dtype = _copy_dtype(store) if kind is IndexKind.ivf else None
        wanted = _code_shape(store, kind, code_dim)
        shape, work = planned_work(store, options, nlist, wanted, key_dtype)

        def learn() -> Learned:
            return learn_lists(store, nlist, shape, work)

        report = IndexReport(
            rows=store.rows,
            generation=store.generation,
            numbering=store.numbering,
            nprobe=options.nprobe or nlist,
            bytes_per_entry=0.0,
            measured=Measured(options.k, options.recall, 0.0, 0, 0.0),
        )
        name = unused_name(store.path, f"{FOLDER}/{FILE_NAME}")
        with coded_file(store, store.path / name, 0, learn, work) as (writer, lists, starts):
            metadata = {"identity": identity(lists, starts)}
            writer.write_header(metadata)
            index = cls.__new__(cls)
            index.kind = kind
            index._share = None
            aside = str(writer.aside.relative_to(store.path))
            size_bytes = writer.aside.stat().st_size
            file = IndexFile(aside, 0, store.rows, size_bytes, sha256="")
            index._open(store, file, report, options.device)
            most = nlist if options.nprobe is None else None
            measured = choose_nprobe(index, store, options, most)
            fitted = Calibration() if index.exact_distances else calibrated(index, store, options)
            index.report = replace(
                report,
                **fitted._asdict(),
                nprobe=index.nprobe,
                bytes_per_entry=writer.size_bytes / max(1, store.rows),
                measured=measured,
            )
            writer.write_header(metadata | {"report": index.report.to_dict()})
            file = IndexFile.written(store.path, aside, 0, store.rows)
            writer.publish()
        index.file = replace(file, name=name)
        return index

    @staticmethod
    def keep_appended(
        store: Datastore,
        files: Sequence[IndexFile],
        progress: Progress = SILENT,
        memory: int | None = None,
    ) -> tuple[IndexFile, ...]:
        """Write the rows appended since the build to a file, so that opening codes none of them.

        For the one writer of the datastore. Returns the files that hold all rows. Raises
        DatastoreCorruptError and DatastoreWriteError.
        """
        _, lists = read_base(store, files[0])
        read_runs(store, files[1:], lists)
        return write_run(store, files, lists, memory, progress)

    def _follow(self) -> None:
        store = self.store
        if self._generation == store.generation:
            return
        if store.numbering == self.report.numbering:
            self._arrange(self._own([self._base, *self._appended()]))
        elif self._behind is None:
            self._behind = ExactIndex(store, str(self.device))
        self._generation = store.generation

    def _own(self, parts: list[Part]) -> list[Part]:
        """Return of all parts the lists of the index's share, about as long in each share."""
        if self._share is None:
            return parts
        edges = torch.tensor(self._share.edges(len(self._base.rows)))
        first, stop = torch.searchsorted(self._base.starts, edges).tolist()
        if self._share.is_last:
            stop = self.nlist  # with the empty lists at the end, which appended rows may be in
        return [part.of_lists(range(first, stop)) for part in parts]

    @property
    def entries(self) -> int:
        """How many live entries are searched: all of the datastore's, or those of the share."""
        self._follow()
        if self._behind is not None:
            return self._behind.entries
        return sum(int(part.half_norms.isfinite().sum()) for part in self._parts)

    def _arrange(self, parts: list[Part]) -> None:
        """Prepare the search of some parts, whose rows may go beyond those of `store`."""
        self._rows = torch.cat([part.rows for part in parts]) if len(parts) > 1 else parts[0].rows
        alive = live_rows(self.store, int(self._rows.amax()) + 1 if len(self._rows) else 0)
        self._rows = self._rows.to(self.device)
        self._parts = [part.masked(alive).to(self.device) for part in parts]
        self._searchable = len(self.store)
        if self._compiled:
            # numba takes half a second to import
            from knnlm.index.ivf.candidates import IndexArrays, PartArrays
            from knnlm.index.ivf.query_code import ListArrays
            from knnlm.index.ivf.rescore import DatastoreKeys

            ends = [0, *torch.tensor([len(part.rows) for part in parts]).cumsum(0).tolist()]
            # what files hold and a search needs
            needed = sum(array.nbytes for part in parts for array in part.arrays().values())
            short = needed > _SHORT * memory_bytes()
            arrays = [
                PartArrays(part, first, short=short)
                for part, first in zip(self._parts, ends[:-1], strict=True)
            ]
            stored = None
            if self.kind is IndexKind.compressed:
                keys = self.store.settings.dimension * self.store.key_dtype.itemsize
                needed += keys * self.store.rows
                stored = DatastoreKeys(self.store, short=needed > _SHORT * memory_bytes())
            lists = ListArrays(self._lists)
            self._arrays = IndexArrays(lists, arrays, self._rows.numpy(), stored)

    def _appended(self) -> list[Part]:
        """Return the rows appended since the build: those in files, and the rest in memory."""
        first, rows = len(self._base.rows), self.store.rows
        if rows <= first:
            return []
        self._runs = self._read_runs()
        covered = self._runs[-1].stop if self._runs else first
        if covered < rows and (self._tail is None or self._tail[:2] != (covered, rows)):
            self._tail = covered, rows, Part.in_memory(self.store, self._lists, covered)
        tail = [self._tail[2]] if covered < rows and self._tail is not None else []
        return [*(run.part for run in self._runs), *tail]

    def _read_runs(self) -> list[Run]:
        """Map the files of appended rows; those known before, where the index was built again."""
        while True:
            stored = stored_index(self.store.catalog)
            base, *files = stored.files or (None,)
            if base != self.file:
                return self._runs
            try:
                wanted = [file for file in files if file.first < self.store.rows]
                return read_runs(self.store, wanted, self._lists)
            except DatastoreCorruptError:
                if stored_index(self.store.catalog) == stored:
                    raise  # no other process has replaced them meanwhile

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest live entries among the probed lists; see `Index.search`."""
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        if self._behind is not None:
            return self._behind.search(queries, k)
        wanted = round(_OVERSAMPLING[self.kind]) * k
        size = max(1, min(_QUERIES_AT_ONCE, _CANDIDATES_AT_ONCE // wanted))
        if len(queries) <= size:  # without copies: a search for one query is short
            nearest = self._search(queries.detach(), k)
        else:
            parts = [self._search(chunk, k) for chunk in torch.split(queries.detach(), size)]
            nearest = Neighbors(
                torch.cat([part.squared_distances for part in parts]),
                torch.cat([part.rows for part in parts]),
            )
        if not self.exact_distances:
            nearest = Calibration(self.report.slope, self.report.offset).of(nearest)
        return Neighbors(
            nearest.squared_distances.to(queries.device), nearest.rows.to(queries.device)
        )

    def _search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        if len(queries) == 0 or self._searchable == 0:
            shape = len(queries), k
            return Neighbors(
                torch.full(shape, torch.inf, device=self.device),
                torch.full(shape, -1, device=self.device),
            )
        nprobe = max(self.nprobe, self.least_nprobe(k))
        oversampling = _OVERSAMPLING[self.kind]
        if self._compiled and len(queries) <= _FEW_QUERIES:
            from knnlm.index.ivf.search_few import search_few

            return search_few(queries, self._arrays, nprobe, k, oversampling)
        prepared = self._prepare(queries, nprobe)
        if self._compiled:
            from knnlm.index.ivf.search_batch import search_batch

            neighbors = search_batch(prepared, self._arrays, k, oversampling)
        elif self.kind is IndexKind.compressed:
            wanted = int(oversampling * k) + _SPARE_CANDIDATES
            found = search_tensors(prepared, self._parts, self._rows, wanted, 1.0)
            neighbors = rescore(self.store, prepared.vectors, found, k)
        else:
            neighbors = search_tensors(prepared, self._parts, self._rows, k, oversampling)
        if not bool(prepared.measurable.all()):
            neighbors.squared_distances[~prepared.measurable] = torch.inf
            neighbors.rows[~prepared.measurable] = -1
        return neighbors

    def least_nprobe(self, k: int) -> int:
        """Return how many lists a search for k must look into to find that many at all."""
        entries = _ENTRIES_PER_NEIGHBOR * round(_OVERSAMPLING[self.kind]) * k
        enough = math.ceil(entries * self.nlist / max(1, self._searchable))
        return min(self.nlist, max(1, enough))

    def _prepare(self, queries: Float[Tensor, "query dim"], nprobe: int) -> ProbingQueries:
        lists = self._lists_on_device
        if not self._compiled:
            return lists.prepare(queries.to(self.device), nprobe)

        def prepare(chunk: range) -> ProbingQueries:
            return lists.prepare(queries[chunk.start : chunk.stop], nprobe)

        chunks = workers().chunks(len(queries), _PREPARED_AT_ONCE)
        return ProbingQueries.joined(workers().map(prepare, chunks))


def _code_shape(store: Datastore, kind: IndexKind, dimensions: int | None) -> CodeShape:
    shape = _CODE_SHAPES[kind]
    if dimensions is None and shape.dimensions is not None:
        dimensions = min(shape.dimensions, store.settings.dimension)
    return replace(shape, dimensions=dimensions)


def _copy_dtype(store: Datastore) -> torch.dtype:
    """Return the dtype of copied keys; NumPy has no bfloat16, so those are widened."""
    return torch.float16 if store.key_dtype == torch.float16 else torch.float32


def _check_build(store: Datastore, nprobe: int | None, nlist: int, code_dim: int | None) -> None:
    largest = min(store.settings.dimension, LARGEST_EXACT_CODE_DIM)
    check_whole("nlist", nlist, most=max(1, store.rows))
    for name, number, most in [("nprobe", nprobe, nlist), ("code_dim", code_dim, largest)]:
        if number is not None:
            check_whole(name, number, most=most)
