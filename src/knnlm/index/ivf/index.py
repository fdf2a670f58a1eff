"""The inverted-file index: fast approximate search with exact distances, measured when built.

Keys lie list by list in a memory-mapped file, each with an 8-bit code. A search reads the codes of
the lists nearest to a query, and the keys of its best candidates.
"""

import importlib.util
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreChangedError, DatastoreNotFoundError, InvalidArgumentError
from knnlm.index.ivf import lists as ivf_lists
from knnlm.index.ivf.appended import identity, read_runs, remove_runs, write_run
from knnlm.index.ivf.codes import Coder, Codes, Effort
from knnlm.index.ivf.file import IVFReport, Part, PartWriter, part_of, read_part, report_of
from knnlm.index.ivf.products import LARGEST_EXACT_CODE_DIM
from knnlm.index.ivf.rescore import rescore
from knnlm.index.ivf.search_tensors import search_tensors
from knnlm.index.measure import Measured, choose_nprobe
from knnlm.index.protocol import Neighbors, check_search
from knnlm.progress import SILENT, Progress
from knnlm.threads import workers

FOLDER = "index"
FILE_NAME = "ivf.safetensors"
KINDS = ("float16", "float32", "compressed")
_QUERIES_AT_ONCE = 8192
_CANDIDATES_AT_ONCE = 1 << 23
_FEW_QUERIES = 48
_PREPARED_AT_ONCE = 256
_ENTRIES_PER_NEIGHBOR = 4  # in the probed lists, at least
_COMPRESSED_CODE_DIM = 128
_COMPRESSED_CANDIDATES = 2  # exact distances for each neighbor wanted, and some to spare
_SPARE_CANDIDATES = 32


class IVFIndex:
    """The index of a datastore as `build` wrote it; follows every change that `store` has seen.

    Appended rows are added to the lists, forgotten ones masked. nprobe: how many lists a query
    looks into; where that many could not hold enough neighbors, it looks into more.

    device: where the arithmetic is done, "cpu" or a GPU. Raises DatastoreNotFoundError if there
    is no such index, DatastoreCorruptError, and DatastoreChangedError if the datastore was
    compacted after the index was built.
    """

    exact_distances = True

    def __init__(self, store: Datastore, device: str = "cpu") -> None:
        self._open(store, _file(store), device)

    def _open(self, store: Datastore, path: Path, device: str) -> None:
        metadata, arrays = read_part(path)
        self.store = store
        self.device = torch.device(device)
        self.report = report_of(metadata)
        self.nprobe = self.report.nprobe
        self._lists = ivf_lists.lists_of(arrays)
        self._lists_there = _moved_lists(self._lists, self.device)
        self._base = part_of(arrays)
        self._key_dtype = None if self._base.keys is None else self._base.keys.dtype
        self._tail: tuple[int, int, Part] | None = None  # first row, stop, in memory
        self._generation = -1
        self._compiled = self.device.type == "cpu" and (
            importlib.util.find_spec("numba") is not None
        )
        self._follow()

    @classmethod
    def build(
        cls,
        store: Datastore,
        *,
        kind: str | None = None,
        nlist: int | None = None,
        nprobe: int | None = None,
        code_dim: int | None = None,
        recall: float = 0.95,
        k: int = 1024,
        queries: Float[Tensor, "query dim"] | None = None,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress = SILENT,
    ) -> "IVFIndex":
        """Build the index of a datastore, in place of any it had, and measure it.

        kind: "float16" or "float32" keeps a copy of the keys in that dtype (None: the datastore's);
        "compressed" keeps codes only and reads the keys of candidates from the datastore.
        nlist: how many lists; None: about 1.35 √entries. nprobe: None: the fewest lists that reach
        `recall` of the k true nearest. queries: real ones, to measure on; None: some of the stored
        keys. code_dim: how many dimensions codes have; None: by the variance they keep.

        Raises InvalidArgumentError, MissingDependencyError, DatastoreWriteError.
        """
        kind = kind or ("float16" if store.key_dtype == torch.float16 else "float32")
        nlist = ivf_lists.default_nlist(store.rows) if nlist is None else nlist
        _check_build(store, kind, nlist, nprobe, code_dim, recall, k)
        if kind == "compressed" and code_dim is None:
            code_dim = min(_COMPRESSED_CODE_DIM, store.settings.dimension)
        lists = ivf_lists.train_lists(store, nlist, code_dim, seed, progress)
        numbers = ivf_lists.assign(store, lists, 0, progress)
        placement = ivf_lists.place(numbers, nlist, 0, seed)
        key_dtype = {"float16": torch.float16, "float32": torch.float32}.get(kind)
        path = store.path / FOLDER / FILE_NAME
        report = IVFReport(
            kind=kind,
            nlist=nlist,
            nprobe=nprobe or nlist,
            code_dim=lists.coder.code_dim,
            rows=store.rows,
            numbering=store.numbering,
            bytes_per_entry=0.0,
            measured=Measured(k, recall, 0.0, 0, 0.0),
        )
        arrays = ivf_lists.list_arrays(lists) | ivf_lists.part_arrays(store.rows, lists, key_dtype)
        with PartWriter(path, arrays) as writer:
            ivf_lists.write_lists(writer, lists)
            ivf_lists.fill(writer, store, lists, placement, key_dtype, progress)
            writer.describe({"report": asdict(report)})
            index = cls.__new__(cls)
            index._open(store, writer.aside, device)
            most = nlist if nprobe is None else None
            measured = choose_nprobe(index, store, k, recall, most, queries, seed, progress)
            index.report = replace(
                report,
                nprobe=index.nprobe,
                bytes_per_entry=writer.size_bytes / max(1, store.rows),
                measured=measured,
            )
            writer.describe({"report": asdict(index.report)})
            writer.publish()
        remove_runs(path.parent)
        return index

    @staticmethod
    def stored_report(store: Datastore) -> IVFReport:
        """Read the report of a datastore's index; raises DatastoreNotFoundError."""
        return report_of(read_part(_file(store))[0])

    @staticmethod
    def keep_appended(store: Datastore, progress: Progress = SILENT) -> None:
        """Write the rows that came after the build beside it, so that opening codes none of them.

        For the one writer of the datastore. Raises DatastoreNotFoundError, DatastoreCorruptError,
        DatastoreWriteError.
        """
        path = _file(store)
        arrays = read_part(path)[1]
        base, lists = part_of(arrays), ivf_lists.lists_of(arrays)
        key_dtype = None if base.keys is None else base.keys.dtype
        write_run(store, path.parent, lists, key_dtype, len(base.rows), progress)

    def refresh(self) -> bool:
        """See what other writers committed to the datastore; return whether anything changed."""
        changed = self.store.refresh()
        self._follow()
        return changed

    def _follow(self) -> None:
        store = self.store
        if self._generation == store.generation:
            return
        if store.numbering != self.report.numbering:
            raise DatastoreChangedError(
                f"{store.path} was compacted after its index was built; run: "
                f"knnlm index {store.path} --kind ivf"
            )
        parts = [self._base, *self._appended()]
        alive = store.alive
        self._rows = torch.cat([part.rows for part in parts]) if len(parts) > 1 else parts[0].rows
        self._rows = self._rows.to(self.device)
        self._parts = [_moved_part(_masked(part, alive), self.device) for part in parts]
        self._searchable = len(store)
        if self._compiled:
            from knnlm.index.ivf.search_batch import PartArrays
            from knnlm.index.ivf.search_few import ListArrays

            self._list_arrays = ListArrays(self._lists)
            ends = [0, *torch.tensor([len(part.rows) for part in parts]).cumsum(0).tolist()]
            self._arrays = [
                PartArrays(part, first) for part, first in zip(self._parts, ends[:-1], strict=True)
            ]
        self._generation = store.generation

    def _appended(self) -> list[Part]:
        """Return the rows that came after the build: as written beside it, the rest in memory."""
        first, rows = len(self._base.rows), self.store.rows
        if rows == first:
            return []
        wanted = identity(self._lists, self._key_dtype, self.report.numbering)
        runs = read_runs(self.store.path / FOLDER, wanted, first, rows)
        covered = runs[-1].stop if runs else first
        if covered < rows and (self._tail is None or self._tail[:2] != (covered, rows)):
            placement = ivf_lists.place_rows(self.store, self._lists, covered, SILENT)
            part = ivf_lists.part_in_memory(self.store, self._lists, placement, self._key_dtype)
            self._tail = covered, rows, part
        tail = [self._tail[2]] if covered < rows and self._tail is not None else []
        return [*(run.part for run in runs), *tail]

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest live entries among the probed lists; see `Index.search`."""
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        size = max(1, min(_QUERIES_AT_ONCE, _CANDIDATES_AT_ONCE // k))
        if len(queries) <= size:
            one = self._search(queries.detach(), k)
            return Neighbors(one.squared_distances.to(queries.device), one.rows.to(queries.device))
        found = [self._search(chunk, k) for chunk in torch.split(queries.detach(), size)]
        return Neighbors(
            torch.cat([neighbors.squared_distances for neighbors in found]).to(queries.device),
            torch.cat([neighbors.rows for neighbors in found]).to(queries.device),
        )

    def _search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        if len(queries) == 0 or self._searchable == 0:
            shape = len(queries), k
            return Neighbors(
                torch.full(shape, torch.inf, device=self.device),
                torch.full(shape, -1, device=self.device),
            )
        wanted = k
        effort = Effort()
        if self._base.keys is None:
            wanted = _COMPRESSED_CANDIDATES * k + _SPARE_CANDIDATES
            effort = Effort(oversampling=1.0)
        nprobe = max(self.nprobe, self.least_nprobe(wanted))
        if self._compiled and len(queries) <= _FEW_QUERIES:
            from knnlm.index.ivf.search_few import search_few

            neighbors = search_few(
                queries, self._list_arrays, nprobe, self._arrays, self._rows, wanted, effort
            )
        else:
            neighbors = self._search_many(queries, nprobe, wanted, effort)
        if self._base.keys is None:
            queries = queries.to(self.device)
            neighbors = rescore(self.store, queries, neighbors, k, self._compiled)
        return neighbors

    def _search_many(
        self, queries: Float[Tensor, "query dim"], nprobe: int, k: int, effort: Effort
    ) -> Neighbors:
        queries, finite, probes, codes = self._prepare(queries, nprobe)
        if self._compiled:
            from knnlm.index.ivf.search_batch import search_batch

            neighbors = search_batch(queries, codes, probes, self._arrays, self._rows, k, effort)
        else:
            neighbors = search_tensors(queries, codes, probes, self._parts, self._rows, k, effort)
        if not bool(finite.all()):
            neighbors.squared_distances[~finite] = torch.inf
            neighbors.rows[~finite] = -1
        return neighbors

    def least_nprobe(self, k: int) -> int:
        """Return how many lists a search for k looks into at least, to find that many at all."""
        nlist = self.report.nlist
        enough = math.ceil(_ENTRIES_PER_NEIGHBOR * k * nlist / max(1, self._searchable))
        return min(nlist, max(1, enough))

    def _prepare(self, queries: Float[Tensor, "query dim"], nprobe: int) -> "_Prepared":
        lists = self._lists_there
        if not self._compiled:
            return _prepared(lists, queries.to(self.device), nprobe)
        chunks = workers().chunks(len(queries), _PREPARED_AT_ONCE)
        prepared = _Prepared(
            torch.empty(queries.shape),
            torch.empty(len(queries), dtype=torch.bool),
            torch.empty(len(queries), nprobe, dtype=torch.int64),
            Codes(
                torch.empty(len(queries), lists.coder.code_dim, dtype=torch.int8),
                torch.empty(len(queries)),
                torch.empty(len(queries)),
            ),
        )

        def prepare(chunk: range) -> None:
            part = slice(chunk.start, chunk.stop)
            one = _prepared(lists, queries[part], nprobe)
            prepared.queries[part] = one.queries
            prepared.finite[part] = one.finite
            prepared.probes[part] = one.probes
            prepared.codes.codes[part] = one.codes.codes
            prepared.codes.steps[part] = one.codes.steps
            prepared.codes.half_norms[part] = one.codes.half_norms

        workers().map(prepare, chunks)
        return prepared


class _Prepared(NamedTuple):
    """Queries, zero where not finite, with the lists they probe and their codes."""

    queries: Float[Tensor, "query dim"]
    finite: Bool[Tensor, " query"]
    probes: Int[Tensor, "query probe"]
    codes: Codes


def _prepared(
    lists: ivf_lists.Lists, queries: Float[Tensor, "query dim"], nprobe: int
) -> _Prepared:
    queries = queries.float()
    finite = queries.isfinite().all(dim=1)
    if not bool(finite.all()):
        queries = queries.where(finite[:, None], torch.zeros_like(queries))
    probes, codes = lists.nearest_lists(queries, nprobe), lists.coder.encode(queries)
    return _Prepared(queries, finite, probes, codes)


def _file(store: Datastore) -> Path:
    path = store.path / FOLDER / FILE_NAME
    if not path.is_file():
        raise DatastoreNotFoundError(
            f"{store.path} has no ivf index; make one with: knnlm index {store.path} --kind ivf"
        )
    return path


def _masked(part: Part, alive: Bool[Tensor, " rows"]) -> Part:
    """Make forgotten entries infinitely far."""
    live = alive[part.rows]
    if bool(live.all()):
        return part
    return replace(part, half_norms=part.half_norms.masked_fill(~live, torch.inf))


def _moved_part(part: Part, device: torch.device) -> Part:
    return Part(
        part.starts.to(device),
        part.rows.to(device),
        part.codes.to(device),
        part.steps.to(device),
        part.half_norms.to(device),
        None if part.keys is None else part.keys.to(device),
    )


def _moved_lists(lists: ivf_lists.Lists, device: torch.device) -> ivf_lists.Lists:
    coder = Coder(
        lists.coder.center.to(device),
        lists.coder.projection.to(device),
        lists.coder.rest.to(device),
    )
    return ivf_lists.Lists.around(lists.centroids.to(device), coder)


def _check_build(
    store: Datastore,
    kind: str,
    nlist: int,
    nprobe: int | None,
    code_dim: int | None,
    recall: float,
    k: int,
) -> None:
    largest = min(store.settings.dimension, LARGEST_EXACT_CODE_DIM)
    rules = [
        (kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {kind!r}"),
        (
            kind != "float16" or store.key_dtype == torch.float16,
            f"kind float16 needs float16 keys, the datastore has {store.key_dtype}: use float32",
        ),
        (nlist == 1 or 1 < nlist <= store.rows, f"nlist must be 1 … {store.rows}, got {nlist}"),
        (nprobe is None or 1 <= nprobe <= nlist, f"nprobe must be 1 … {nlist}, got {nprobe}"),
        (
            code_dim is None or 1 <= code_dim <= largest,
            f"code_dim must be 1 … {largest}, got {code_dim}",
        ),
        (0 < recall <= 1, f"recall must be above 0 and at most 1, got {recall}"),
        (k >= 1, f"k must be at least 1, got {k}"),
    ]
    for fulfilled, message in rules:
        if not fulfilled:
            raise InvalidArgumentError(message)
