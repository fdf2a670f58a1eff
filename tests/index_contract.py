"""What every index must do, whatever it is built of: subclass IndexContract and say how to make it.

The truth is a comparison with every live key, in float64.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from knnlm.datastore.catalog import SHARDS, Catalog, Settings, StoredShard
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import write_shard
from knnlm.errors import DatastoreCorruptError, InvalidArgumentError
from knnlm.index.protocol import Index, Neighbors

DIMENSION = 24
ENTRIES = 3000
DOCUMENTS = 10


def clustered(count: int, seed: int = 0, dimension: int = DIMENSION) -> Tensor:
    """Return keys as language models make them: in clusters, some directions far longer."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, dimension, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(40, (count,), generator=generator)
    keys = centers[chosen] + 0.4 * torch.randn(count, dimension, generator=generator)
    return keys * torch.linspace(0.2, 3.0, dimension) + 1.0


def store_of(path: Path, keys: Tensor, documents: int = DOCUMENTS) -> Datastore:
    """Make a datastore that holds given keys, in documents d0, d1, … of about the same length."""
    dtype = str(keys.dtype).removeprefix("torch.")
    settings = Settings(
        "m", None, "float32", "w", "t", 100, 0, "ffn_input", keys.shape[1], dtype, 8, 0, "document"
    )
    (path / SHARDS).mkdir(parents=True)
    Catalog.create(path, settings).close()
    append(path, keys, documents, "d")
    return Datastore(path)


def append(path: Path, keys: Tensor, documents: int, prefix: str) -> None:
    """Add keys in new documents to a datastore, in two shards."""
    catalog = Catalog(path)
    first = max((shard.stop for shard in catalog.shards()), default=0)
    with catalog.transaction():
        for part in keys.tensor_split(2) if len(keys) else ():
            values = torch.arange(len(part), dtype=torch.int32) % 100
            file = write_shard(path / SHARDS, catalog.next_shard_name(), part, values)
            start = max((shard.stop for shard in catalog.shards()), default=0)
            catalog.add_shard(StoredShard(start, file))
        for number in range(documents if len(keys) else 0):
            start = first + len(keys) * number // documents
            stop = first + len(keys) * (number + 1) // documents
            name = f"{prefix}{number}"
            added = catalog.add_document(name, name, str(number), start)
            catalog.extend_document(added, stop, stop - start, True)
    catalog.close()


def all_keys(store: Datastore) -> Tensor:
    parts = [block.double() for _, block in store.key_blocks(1 << 20)]
    return torch.cat(parts) if parts else torch.empty(0, store.settings.dimension).double()


def true_distances(store: Datastore, queries: Tensor) -> Tensor:
    """Return the squared distance of every query to every entry, +inf for forgotten ones."""
    distances = torch.cdist(
        queries.double(), all_keys(store), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    return distances.masked_fill(~store.alive, torch.inf)


def assert_neighbors(
    store: Datastore,
    queries: Tensor,
    k: int,
    found: Neighbors,
    recall: float,
    *,
    exact_distances: bool = True,
) -> None:
    """Check everything that can be said of an answer."""
    assert found.squared_distances.shape == found.rows.shape == (len(queries), k)
    assert found.squared_distances.dtype == torch.float32
    assert found.rows.dtype == torch.int64
    distances = true_distances(store, queries)
    live = min(k, len(store))
    present = found.rows >= 0
    assert torch.equal(present, found.squared_distances.isfinite())
    assert (present.sum(dim=1) == live).all()
    assert bool((found.squared_distances[:, 1:] >= found.squared_distances[:, :-1]).all())
    for rows in found.rows.tolist()[:100]:
        known = [row for row in rows if row >= 0]
        assert len(set(known)) == len(known)
    if live == 0:
        return
    exact = distances.gather(1, found.rows[:, :live])
    if exact_distances:
        torch.testing.assert_close(
            found.squared_distances[:, :live].double(), exact, rtol=1e-5, atol=2e-5
        )
    # by distance, because among equally near entries each is right
    farthest = distances.sort(dim=1).values[:, live - 1 : live]
    near_enough = exact <= farthest * (1 + 1e-6) + 1e-6
    assert near_enough.double().mean() >= recall


class IndexContract:
    """Subclass it, with the recall that the index promises."""

    recall: float = 1.0

    def make_index(self, store: Datastore) -> Index:
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Datastore:
        return store_of(tmp_path / "store", clustered(ENTRIES).half())

    def test_neighbors_are_the_nearest(self, store: Datastore) -> None:
        index = self.make_index(store)
        assert isinstance(index, Index)
        queries = clustered(300, seed=1)
        for k in (1, 7, 128):
            assert_neighbors(store, queries, k, index.search(queries, k), self.recall)

    def test_one_query_and_ten_thousand(self, store: Datastore) -> None:
        index = self.make_index(store)
        queries = clustered(10_000, seed=2)
        many = index.search(queries, 10)
        assert_neighbors(store, queries, 10, many, self.recall)
        for number in (0, 5_000, 9_999):
            one = index.search(queries[number : number + 1], 10)
            torch.testing.assert_close(
                one.squared_distances,
                many.squared_distances[number : number + 1],
                rtol=1e-5,
                atol=1e-4,
            )
            assert torch.equal(one.rows, many.rows[number : number + 1])

    def test_no_query(self, store: Datastore) -> None:
        found = self.make_index(store).search(torch.empty(0, DIMENSION), 3)
        assert found.rows.shape == found.squared_distances.shape == (0, 3)

    def test_half_precision_queries(self, store: Datastore) -> None:
        queries = clustered(20, seed=3).half()
        found = self.make_index(store).search(queries, 5)
        assert_neighbors(store, queries, 5, found, self.recall)

    @pytest.mark.parametrize("queries", [2, 200])
    def test_k_above_the_number_of_entries(self, tmp_path: Path, queries: int) -> None:
        store = store_of(tmp_path / "small", clustered(50).half())
        asked = clustered(queries, seed=4)
        assert_neighbors(store, asked, 70, self.make_index(store).search(asked, 70), 1.0)

    @pytest.mark.parametrize("queries", [2, 200])
    def test_duplicates_are_at_distance_zero(self, tmp_path: Path, queries: int) -> None:
        keys = clustered(400).half()
        keys[100:180] = keys[7]
        store = store_of(tmp_path / "duplicates", keys)
        found = self.make_index(store).search(keys[7:8].float().expand(queries, -1), 81)
        assert bool((found.squared_distances >= 0).all())
        assert found.squared_distances.abs().max() <= 1e-4
        expected = torch.tensor([7, *range(100, 180)])
        for rows in found.rows:
            assert torch.equal(rows.sort().values, expected)

    @pytest.mark.parametrize("queries", [1, 100])
    def test_an_empty_index_finds_nothing(self, tmp_path: Path, queries: int) -> None:
        store = store_of(tmp_path / "empty", clustered(0).half())
        found = self.make_index(store).search(clustered(queries), 4)
        assert (found.rows == -1).all()
        assert (found.squared_distances == torch.inf).all()

    @pytest.mark.parametrize("count", [4, 100])
    def test_queries_that_are_not_finite_find_nothing(self, store: Datastore, count: int) -> None:
        index = self.make_index(store)
        queries = clustered(count, seed=5)
        queries[1, 3] = torch.nan
        queries[2, 0] = torch.inf
        queries[3] = 1e18  # longer than that: squared distances overflow float32
        found = index.search(queries, 6)
        assert (found.rows[1:4] == -1).all()
        assert (found.squared_distances[1:4] == torch.inf).all()
        others = torch.arange(count)[(torch.arange(count) < 1) | (torch.arange(count) > 3)]
        rest = Neighbors(found.squared_distances[others], found.rows[others])
        assert_neighbors(store, queries[others], 6, rest, self.recall)

    @pytest.mark.parametrize("queries", [3, 300])
    def test_forgotten_entries_are_never_found(self, store: Datastore, queries: int) -> None:
        index = self.make_index(store)
        asked = clustered(queries, seed=6)
        before = index.search(asked, 20)
        store.forget(["d2", "d5"])
        after = index.search(asked, 20)
        alive = store.alive
        assert not bool(alive[before.rows].all())
        assert bool(alive[after.rows].all())
        assert_neighbors(store, asked, 20, after, self.recall)
        store.forget(["*"])
        assert (index.search(asked, 20).rows == -1).all()

    def test_an_argument_out_of_range_is_refused(self, store: Datastore) -> None:
        index = self.make_index(store)
        with pytest.raises(InvalidArgumentError, match="k must be at least 1, got 0"):
            index.search(clustered(2), 0)
        with pytest.raises(InvalidArgumentError, match="dimension 24, got 7"):
            index.search(torch.zeros(2, 7), 3)

    @pytest.mark.parametrize("bad", [1e19, torch.nan])
    def test_keys_that_cannot_be_measured_are_refused(self, tmp_path: Path, bad: float) -> None:
        keys = clustered(500)
        keys[123] = bad
        store = store_of(tmp_path / "bad", keys)
        with pytest.raises(DatastoreCorruptError, match="key of row 123, in document 'd2', is "):
            self.make_index(store).search(keys[:2], 3)

    def test_entries_beyond_float16_are_no_nan(self, tmp_path: Path) -> None:
        """Squares of large float16 keys overflow float16, and must not."""
        keys = (clustered(500) * 1000).half()
        store = store_of(tmp_path / "large", keys)
        queries = clustered(60, seed=7) * 1000
        found = self.make_index(store).search(queries, 5)
        exact = true_distances(store, queries).gather(1, found.rows)
        torch.testing.assert_close(found.squared_distances.double(), exact, rtol=1e-4, atol=1.0)
