"""The lists of an inverted file: their centroids, and which rows belong to each.

Reads the datastore in bounded memory; writes and searches nothing.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.unfit_keys import measurable
from knnlm.index.backend import check_keys
from knnlm.index.ivf.codes import Coder, Codes, CodeShape
from knnlm.progress import Progress
from knnlm.threads import workers

_BLOCK_ROWS = 8192
_TRAINING_KEYS_PER_LIST = 64
_LEAST_TRAINING_KEYS = 65_536
_KMEANS_ROUNDS = 10


class ProbingQueries(NamedTuple):
    """Queries, with the lists that they probe and their codes.

    vectors: float32, zero where a query is not `measurable`.
    """

    vectors: Float[Tensor, "query dim"]
    measurable: Bool[Tensor, " query"]
    probes: Int[Tensor, "query probe"]
    codes: Codes

    def take(self, chosen: Int[Tensor, " n"]) -> "ProbingQueries":
        """Return some of the queries."""
        codes = Codes(*(getattr(self.codes, field.name)[chosen] for field in fields(Codes)))
        return ProbingQueries(
            self.vectors[chosen], self.measurable[chosen], self.probes[chosen], codes
        )

    @classmethod
    def joined(cls, parts: list["ProbingQueries"]) -> "ProbingQueries":
        """Return the queries of several parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        vectors, usable, probes, codes = zip(*parts, strict=True)
        arrays = ([getattr(part, field.name) for part in codes] for field in fields(Codes))
        return cls(
            torch.cat(vectors), torch.cat(usable), torch.cat(probes), Codes(*map(torch.cat, arrays))
        )


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists' centroids and how their members are stored: the same for all parts of an index.

    key_dtype: of the copied keys; None for a compressed index, which copies none.
    """

    centroids: Float[Tensor, "list dim"]
    squared_norms: Float[Tensor, " list"]
    coder: Coder
    key_dtype: torch.dtype | None

    @classmethod
    def around(
        cls,
        centroids: Float[Tensor, "list dim"],
        coder: Coder,
        key_dtype: torch.dtype | None = None,
    ) -> "Lists":
        """Return the lists with given centroids."""
        return cls(centroids, centroids.square().sum(dim=1), coder, key_dtype)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], key_dtype: torch.dtype | None) -> "Lists":
        """Pick the lists out of a file's arrays."""
        coder = Coder(**{field.name: arrays[field.name] for field in fields(Coder)})
        return cls.around(arrays["centroids"], coder, key_dtype)

    def arrays(self) -> dict[str, Tensor]:
        """Return the arrays to store, by name."""
        coder = {field.name: getattr(self.coder, field.name) for field in fields(Coder)}
        return {"centroids": self.centroids, **coder}

    def to(self, device: torch.device) -> "Lists":
        """Return the lists on a device."""
        arrays = {name: array.to(device) for name, array in self.arrays().items()}
        return Lists.from_arrays(arrays, self.key_dtype)

    def nearest_lists(
        self, vectors: Float[Tensor, "n dim"], count: int
    ) -> Int[Tensor, "n {count}"]:
        """Return the numbers of the lists with the nearest centroids, in no order."""
        scores = torch.addmm(self.squared_norms, vectors, self.centroids.T, alpha=-2.0)
        if count == 1:
            return scores.argmin(dim=1, keepdim=True)
        return scores.topk(count, dim=1, largest=False, sorted=False).indices

    def prepare(self, queries: Float[Tensor, "query dim"], nprobe: int) -> ProbingQueries:
        """Return queries with the `nprobe` nearest lists and the codes of each."""
        queries = queries.float()
        usable = measurable(queries)
        if not bool(usable.all()):
            queries = queries.where(usable[:, None], torch.zeros_like(queries))
        probes, codes = self.nearest_lists(queries, nprobe), self.coder.encode(queries)
        return ProbingQueries(queries, usable, probes, codes)


def default_nlist(rows: int) -> int:
    """Return a power of two near 1.35 √rows: 1,024 for half a million, 4,096 for ten million."""
    nearest = round(math.log2(1.35 * math.sqrt(max(1, rows))))
    return max(1, min(1 << nearest, rows // 32))


def train_lists(
    store: Datastore, nlist: int, shape: CodeShape, seed: int, progress: Progress
) -> Lists:
    """Place the centroids by k-means on a sample of the keys, and fit the coder to the sample.

    Raises DatastoreCorruptError for a key in it that is not `measurable`.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = max(_LEAST_TRAINING_KEYS, _TRAINING_KEYS_PER_LIST * nlist)
    with progress.task("train the index", None, "keys"):
        rows = torch.randperm(store.rows, generator=generator)[:wanted]
        sample = store.keys_at(rows)
        check_keys(store, sample, rows)
        coder = Coder.fit(sample, shape, seed)
        if nlist == 1:
            return Lists.around(coder.center[None].clone(), coder)
        return Lists.around(_kmeans(sample.float(), nlist, seed), coder)


def _kmeans(sample: Float[Tensor, "n dim"], nlist: int, seed: int) -> Float[Tensor, "{nlist} dim"]:
    import faiss  # after torch, so that both share one thread pool

    kmeans = faiss.Kmeans(
        sample.shape[1],
        nlist,
        niter=_KMEANS_ROUNDS,
        seed=seed & 0x7FFFFFFF,  # FAISS takes 32 bits
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, len(sample) // nlist + 1),
    )
    kmeans.train(sample.numpy())
    return torch.from_numpy(kmeans.centroids).clone()


def _assign(store: Datastore, lists: Lists, first: int, progress: Progress) -> Int[Tensor, " n"]:
    """Return the list of every row from `first` on."""
    numbers = torch.empty(store.rows - first, dtype=torch.int64)
    with progress.task("assign keys to lists", store.rows - first, "keys") as advance:
        for start, keys in store.key_blocks(1 << 18):
            skipped = max(0, first - start)
            keys, begin = keys[skipped:], start + skipped - first

            def assign_chunk(chunk: range, keys: Tensor = keys, begin: int = begin) -> None:
                block = keys[chunk.start : chunk.stop].float()
                check_keys(store, block, begin + first + torch.arange(len(block)) + chunk.start)
                nearest_list = lists.nearest_lists(block, 1)[:, 0]
                numbers[begin + chunk.start : begin + chunk.stop] = nearest_list

            workers().map(assign_chunk, workers().chunks(len(keys), _BLOCK_ROWS))
            advance(len(keys))
    return numbers


@dataclass(frozen=True, slots=True)
class Placement:
    """The rows of each list: `rows[starts[l] : starts[l + 1]]` is list l, in random order."""

    starts: Int[Tensor, " lists_plus_1"]
    rows: Int[Tensor, " n"]


def _place(numbers: Int[Tensor, " n"], nlist: int, first: int, seed: int) -> Placement:
    """Group rows by list. The order within a list is random, so that its head is a sample."""
    shuffled = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed + 1))
    order = shuffled[numbers[shuffled].argsort(stable=True)]
    starts = torch.zeros(nlist + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(numbers, minlength=nlist).cumsum(0)
    return Placement(starts, order + first)


def place_rows(
    store: Datastore, lists: Lists, first: int, progress: Progress, *, seed: int = 0
) -> Placement:
    """Put the rows from `first` on into lists.

    Raises DatastoreCorruptError for a key that is not `measurable`.
    """
    numbers = _assign(store, lists, first, progress)
    return _place(numbers, len(lists.centroids), first, seed)
