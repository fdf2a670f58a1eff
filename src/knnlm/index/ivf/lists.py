"""Building an inverted file: centroids, the lists of all keys, the file; in bounded memory.

Knows the datastore it reads and the file it writes; searches nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import missing_dependency
from knnlm.index.ivf.codes import Coder, Codes
from knnlm.index.ivf.file import Part, PartWriter, Shape
from knnlm.progress import SILENT, Progress
from knnlm.threads import workers

_BLOCK_ROWS = 8192
_TRAINING_KEYS_PER_LIST = 64
_LEAST_TRAINING_KEYS = 65_536
_KMEANS_ROUNDS = 10
_GATHERED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Lists:
    """Where the lists are, and how their members are coded: what all parts of an index share."""

    centroids: Float[Tensor, "list dim"]
    squared_norms: Float[Tensor, " list"]
    coder: Coder

    @classmethod
    def around(cls, centroids: Float[Tensor, "list dim"], coder: Coder) -> "Lists":
        """Return the lists of some centroids."""
        return cls(centroids, centroids.square().sum(dim=1), coder)

    def nearest_lists(
        self, vectors: Float[Tensor, "n dim"], count: int
    ) -> Int[Tensor, "n {count}"]:
        """Return the numbers of the lists with the nearest centroids, in no order."""
        scores = torch.addmm(self.squared_norms, vectors, self.centroids.T, alpha=-2.0)
        if count == 1:
            return scores.argmin(dim=1, keepdim=True)
        return scores.topk(count, dim=1, largest=False, sorted=False).indices


def default_nlist(rows: int) -> int:
    """Return a power of two near 1.35 √rows: 1,024 for half a million, 4,096 for ten million."""
    nearest = round(math.log2(1.35 * math.sqrt(max(1, rows))))
    return max(1, min(1 << nearest, rows // 32))


def train_lists(
    store: Datastore, nlist: int, code_dim: int | None, seed: int, progress: Progress
) -> Lists:
    """Place the centroids by k-means on a sample, and fit the coder to it; reproducible."""
    generator = torch.Generator().manual_seed(seed)
    wanted = max(_LEAST_TRAINING_KEYS, _TRAINING_KEYS_PER_LIST * nlist)
    with progress.task("train the index", None, "keys"):
        rows = torch.randperm(store.rows, generator=generator)[:wanted]
        sample = store.keys_at(rows)
        coder = Coder.fit(sample, code_dim, seed)
        if nlist == 1:
            return Lists.around(coder.center[None].clone(), coder)
        return Lists.around(_kmeans(sample.float(), nlist, seed), coder)


def _kmeans(sample: Float[Tensor, "n dim"], nlist: int, seed: int) -> Float[Tensor, "{nlist} dim"]:
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise missing_dependency("faiss-cpu", "building an ivf index", "faiss") from error
    kmeans = faiss.Kmeans(
        sample.shape[1],
        nlist,
        niter=_KMEANS_ROUNDS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, len(sample) // nlist + 1),
    )
    kmeans.train(sample.numpy())
    return torch.from_numpy(kmeans.centroids).clone()


def assign(store: Datastore, lists: Lists, first: int, progress: Progress) -> Int[Tensor, " n"]:
    """Return the list of every row from `first` on."""
    numbers = torch.empty(store.rows - first, dtype=torch.int64)
    with progress.task("assign keys to lists", store.rows - first, "keys") as advance:
        for start, keys in store.key_blocks(1 << 18):
            skipped = max(0, first - start)
            keys, begin = keys[skipped:], start + skipped - first

            def nearest(chunk: range, keys: Tensor = keys, begin: int = begin) -> None:
                block = keys[chunk.start : chunk.stop].float()
                found = lists.nearest_lists(block, 1)[:, 0]
                numbers[begin + chunk.start : begin + chunk.stop] = found

            workers().map(nearest, workers().chunks(len(keys), _BLOCK_ROWS))
            advance(len(keys))
    return numbers


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rows lie where: `rows[starts[l] : starts[l + 1]]` are list l, in random order."""

    starts: Int[Tensor, " lists_plus_1"]
    rows: Int[Tensor, " n"]


def place(numbers: Int[Tensor, " n"], nlist: int, first: int, seed: int) -> Placement:
    """Group rows by list. The order within a list is random, so that its head is a sample."""
    shuffled = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed + 1))
    order = shuffled[numbers[shuffled].argsort(stable=True)]
    starts = torch.zeros(nlist + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(numbers, minlength=nlist).cumsum(0)
    return Placement(starts, order + first)


def place_rows(store: Datastore, lists: Lists, first: int, progress: Progress) -> Placement:
    """Put the rows from `first` on into lists."""
    numbers = assign(store, lists, first, progress)
    return place(numbers, len(lists.centroids), first, seed=0)


def placed_keys(
    store: Datastore, lists: Lists, placement: Placement, progress: Progress
) -> Iterator[tuple[int, Float[Tensor, "n dim"], Codes]]:
    """Yield (first position, keys, codes) over a placement, a bounded number of keys at a time."""
    rows = placement.rows
    size = max(1, _GATHERED_BYTES // (store.key_dtype.itemsize * store.settings.dimension))
    with progress.task("write the index", len(rows), "keys") as advance:
        for start in range(0, len(rows), size):
            keys = store.keys_at(rows[start : start + size])
            chunks = workers().chunks(len(keys), _BLOCK_ROWS)

            def encode(chunk: range, keys: Tensor = keys) -> Codes:
                return lists.coder.encode(keys[chunk.start : chunk.stop].float())

            for chunk, codes in zip(chunks, workers().map(encode, chunks), strict=True):
                yield start + chunk.start, keys[chunk.start : chunk.stop], codes
                advance(len(chunk))


def part_arrays(rows: int, lists: Lists, key_dtype: torch.dtype | None) -> dict[str, Shape]:
    """Return the arrays of a part's file. key_dtype: None for a part without keys."""
    nlist, dim = lists.centroids.shape
    code_dim = lists.coder.code_dim
    arrays: dict[str, Shape] = {
        "starts": (torch.int64, (nlist + 1,)),
        "rows": (torch.int64, (rows,)),
        "steps": (torch.float32, (rows,)),
        "half_norms": (torch.float32, (rows,)),
        "codes": (torch.int8, (rows, code_dim)),
    }
    if key_dtype is not None:
        arrays["keys"] = (key_dtype, (rows, dim))
    return arrays


def list_arrays(lists: Lists) -> dict[str, Shape]:
    """Return the arrays that say where the lists are."""
    nlist, dim = lists.centroids.shape
    code_dim = lists.coder.code_dim
    return {
        "centroids": (torch.float32, (nlist, dim)),
        "center": (torch.float32, (dim,)),
        "projection": (torch.float32, (code_dim, dim)),
        "rest": (torch.float32, (code_dim,)),
    }


def lists_of(arrays: dict[str, Tensor]) -> Lists:
    """Pick the lists out of a file's arrays."""
    coder = Coder(arrays["center"], arrays["projection"], arrays["rest"])
    return Lists.around(arrays["centroids"], coder)


def write_lists(writer: PartWriter, lists: Lists) -> None:
    """Write where the lists are; raises DatastoreWriteError."""
    writer.write("centroids", 0, lists.centroids)
    writer.write("center", 0, lists.coder.center)
    writer.write("projection", 0, lists.coder.projection)
    writer.write("rest", 0, lists.coder.rest)


def fill(
    writer: PartWriter,
    store: Datastore,
    lists: Lists,
    placement: Placement,
    key_dtype: torch.dtype | None,
    progress: Progress,
) -> None:
    """Write all arrays of a part; raises DatastoreWriteError."""
    writer.write("starts", 0, placement.starts)
    writer.write("rows", 0, placement.rows)
    for first, keys, codes in placed_keys(store, lists, placement, progress):
        writer.write("codes", first, codes.codes)
        writer.write("steps", first, codes.steps)
        writer.write("half_norms", first, codes.half_norms)
        if key_dtype is not None:
            writer.write("keys", first, keys.to(key_dtype))


def part_in_memory(
    store: Datastore, lists: Lists, placement: Placement, key_dtype: torch.dtype | None
) -> Part:
    """Return a part that is written nowhere: for the few rows appended since the build."""
    placed = [
        (codes, keys if key_dtype is None else keys.to(key_dtype))
        for _, keys, codes in placed_keys(store, lists, placement, SILENT)
    ]
    return Part(
        placement.starts,
        placement.rows,
        torch.cat([codes.codes for codes, _ in placed]),
        torch.cat([codes.steps for codes, _ in placed]),
        torch.cat([codes.half_norms for codes, _ in placed]),
        None if key_dtype is None else torch.cat([keys for _, keys in placed]),
    )
