"""Exact search against brute force in float64, keys in memory and read from the disk."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import refusal
from torch import Tensor

from knnlm.datastore.catalog import SHARDS, Catalog, Settings, StoredShard
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import write_shard
from knnlm.errors import InvalidArgumentError
from knnlm.index import exact
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Index, Neighbors

RESIDENT, STREAMED = exact.RESIDENT_BYTES, 0
MODES = pytest.mark.parametrize("resident_bytes", [RESIDENT, STREAMED], ids=["resident", "disk"])


def settings_for(keys: Tensor) -> Settings:
    return Settings(
        model="none",
        revision=None,
        model_dtype="float32",
        weights_fingerprint="",
        tokenizer_fingerprint="",
        vocab_size=100,
        start_token=0,
        key="ffn_input",
        dimension=keys.shape[1],
        key_dtype=str(keys.dtype).removeprefix("torch."),
        window=8,
        context=0,
        boundary="document",
    )


def append(store: Datastore, keys: Tensor, name: str) -> None:
    """Commit keys as one more shard and one more document."""
    values = torch.arange(len(keys), dtype=torch.int32) % 100
    catalog, start = store.catalog, store.catalog.shards()[-1].stop if store.rows else 0
    file = write_shard(store.path / SHARDS, catalog.next_shard_name(), keys, values)
    with catalog.transaction():
        catalog.add_shard(StoredShard(start, file))
        document = catalog.add_document(name, name, name, start)
        catalog.extend_document(document, start + len(keys), len(keys), complete=True)


def store_of(path: Path, *shards: Tensor) -> Datastore:
    """Make a datastore of these keys without a language model; shard n is the document `d<n>`."""
    (path / SHARDS).mkdir(parents=True)
    Catalog.create(path, settings_for(shards[0])).close()
    store = Datastore(path)
    for number, keys in enumerate(shards):
        if len(keys):
            append(store, keys, f"d{number}")
            store.refresh()
    return store


def random_keys(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Keys that float16 holds exactly, also with the offset: multiples of 1/4 below 2,048."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 65, shape, generator=generator) / 4 + offset).half()


def brute_force(keys: Tensor, queries: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """All squared distances in float64; +inf for rows that are not among `rows`."""
    squared = (queries.double()[:, None] - keys.double()[None]).square().sum(dim=-1)
    if rows is not None:
        hidden = torch.ones(len(keys), dtype=torch.bool)
        hidden[list(rows)] = False
        squared[:, hidden] = torch.inf
    return squared


def assert_nearest(found: Neighbors, squared: Tensor, k: int) -> None:
    """The distances are the k least, ascending, and each row is at the distance it is said to."""
    count = min(k, squared.shape[1])
    expected = squared.topk(count, dim=1, largest=False).values
    expected = torch.nn.functional.pad(expected, (0, k - count), value=torch.inf)
    assert found.squared_distances.shape == found.rows.shape == (len(squared), k)
    assert found.squared_distances.dtype == torch.float32
    assert found.rows.dtype == torch.int64
    torch.testing.assert_close(found.squared_distances.double(), expected, atol=2e-3, rtol=1e-5)
    present = expected.isfinite()
    assert torch.equal(found.present, present)
    assert torch.equal(found.rows == -1, ~present)
    at_rows = squared.gather(1, found.rows.clamp_min(0))[present]
    torch.testing.assert_close(
        found.squared_distances.double()[present], at_rows, atol=2e-3, rtol=1e-5
    )
    for rows in found.rows:
        named = rows[rows >= 0].tolist()
        assert len(set(named)) == len(named), "no entry twice"


@MODES
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_equals_brute_force(tmp_path: Path, resident_bytes: int, offset: float, k: int) -> None:
    keys = random_keys(300, 24, offset=offset)
    store = store_of(tmp_path / "s", keys[:100], keys[100:110], keys[110:])
    index = ExactIndex(store, resident_bytes=resident_bytes)
    queries = random_keys(40, 24, seed=1).float() * 0.9 + offset
    found = index.search(queries, k)
    assert_nearest(found, brute_force(keys, queries), k)
    assert bool((found.squared_distances.diff(dim=1) >= 0).all())
    assert isinstance(index, Index)


@MODES
def test_far_from_the_origin_no_digit_is_lost(tmp_path: Path, resident_bytes: int) -> None:
    # |q|² is 5.8 million here: without centering, float32 would be wrong by about 1
    keys = random_keys(200, 64, offset=300.0)
    queries = keys[::7].float() + 0.125
    found = ExactIndex(store_of(tmp_path / "s", keys), resident_bytes=resident_bytes).search(
        queries, 5
    )
    expected = brute_force(keys, queries).topk(5, dim=1, largest=False).values
    torch.testing.assert_close(found.squared_distances.double(), expected, atol=1e-2, rtol=1e-5)
    assert torch.equal(found.rows[:, 0], torch.arange(0, 200, 7))


@MODES
def test_many_blocks_of_keys_and_queries(
    tmp_path: Path, resident_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "_SCORES", 1200)  # 24 keys for 50 queries
    monkeypatch.setattr(exact, "_RESIDENT_QUERIES", 50)
    monkeypatch.setattr(exact, "_STREAMED_QUERIES", 50)
    keys = random_keys(130, 6)
    store = store_of(tmp_path / "s", keys[:50], keys[50:])
    queries = random_keys(120, 6, seed=3).float()
    found = ExactIndex(store, resident_bytes=resident_bytes).search(queries, 20)
    assert_nearest(found, brute_force(keys, queries), 20)


@MODES
@pytest.mark.parametrize("queries", [1, 10_000])
def test_one_query_and_ten_thousand(tmp_path: Path, resident_bytes: int, queries: int) -> None:
    keys = random_keys(90, 4)
    index = ExactIndex(store_of(tmp_path / "s", keys), resident_bytes=resident_bytes)
    asked = random_keys(queries, 4, seed=2).float()
    assert_nearest(index.search(asked, 3), brute_force(keys, asked), 3)


def test_no_query_at_all(tmp_path: Path) -> None:
    found = ExactIndex(store_of(tmp_path / "s", random_keys(9, 4))).search(torch.empty(0, 4), 3)
    assert found.rows.shape == (0, 3)


@MODES
def test_a_stored_key_is_at_distance_zero(tmp_path: Path, resident_bytes: int) -> None:
    keys = random_keys(50, 16)
    keys[[3, 20, 41]] = keys[7].clone()
    index = ExactIndex(store_of(tmp_path / "s", keys), resident_bytes=resident_bytes)
    found = index.search(keys[7:8].float(), 5)
    assert found.squared_distances[0, :4].tolist() == pytest.approx([0.0] * 4, abs=1e-3)
    assert sorted(found.rows[0, :4].tolist()) == [3, 7, 20, 41]
    assert float(found.squared_distances[0, 4]) > 1.0
    # what rounding leaves of |q|² + |k|² − 2 q·k may lie on either side of 0
    rounded = store_of(tmp_path / "rounded", torch.randn(300, 16).mul(10).half())
    (_, keys), *_ = rounded.key_blocks(300)
    nearest = ExactIndex(rounded, resident_bytes=resident_bytes).search(keys, 1)
    assert torch.equal(nearest.rows[:, 0], torch.arange(300))
    assert bool((nearest.squared_distances >= 0).all()), "never a negative distance"
    assert float(nearest.squared_distances.max()) < 2e-3


@MODES
def test_more_asked_for_than_there_is(tmp_path: Path, resident_bytes: int) -> None:
    keys = random_keys(6, 5)
    store = store_of(tmp_path / "s", keys[:4], keys[4:])
    store.forget(["d1"])
    queries = random_keys(3, 5, seed=1).float()
    found = ExactIndex(store, resident_bytes=resident_bytes).search(queries, 9)
    assert_nearest(found, brute_force(keys, queries, rows=range(4)), 9)
    assert found.present.sum(dim=1).tolist() == [4, 4, 4]


@MODES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_has_no_neighbor(
    tmp_path: Path, resident_bytes: int, bad: float
) -> None:
    keys = random_keys(20, 5)
    queries = random_keys(3, 5, seed=1).float()
    queries[1, 2] = bad
    index = ExactIndex(store_of(tmp_path / "s", keys), resident_bytes=resident_bytes)
    found = index.search(queries, 4)
    assert found.rows[1].tolist() == [-1] * 4
    assert found.squared_distances[1].tolist() == [torch.inf] * 4
    others = Neighbors(found.squared_distances[[0, 2]], found.rows[[0, 2]])
    assert_nearest(others, brute_force(keys, queries[[0, 2]]), 4)


@MODES
def test_an_empty_datastore_has_no_neighbor(tmp_path: Path, resident_bytes: int) -> None:
    index = ExactIndex(store_of(tmp_path / "s", random_keys(0, 5)), resident_bytes=resident_bytes)
    found = index.search(torch.zeros(2, 5), 3)
    assert found.rows.tolist() == [[-1] * 3] * 2
    assert bool(found.squared_distances.isposinf().all())


@MODES
def test_forgotten_entries_are_never_found(tmp_path: Path, resident_bytes: int) -> None:
    keys = random_keys(60, 5)
    store = store_of(tmp_path / "s", keys[:20], keys[20:40], keys[40:])
    index = ExactIndex(store, resident_bytes=resident_bytes)
    queries = keys[20:40].float()
    before = index.search(queries, 1)
    assert sorted(set(before.rows[:, 0].tolist())) == list(range(20, 40))
    store.forget(["d1"])
    live = [*range(20), *range(40, 60)]
    assert_nearest(index.search(queries, 5), brute_force(keys, queries, rows=live), 5)
    assert_nearest(index.search(queries, 60), brute_force(keys, queries, rows=live), 60)
    store.forget(["*"])
    assert not bool(index.search(queries, 5).present.any())


@MODES
def test_follows_what_the_datastore_has_seen(tmp_path: Path, resident_bytes: int) -> None:
    keys = random_keys(60, 5)
    store = store_of(tmp_path / "s", keys[:30])
    index = ExactIndex(store, resident_bytes=resident_bytes)
    queries = keys[40:50].float()
    assert_nearest(index.search(queries, 4), brute_force(keys[:30], queries), 4)
    append(Datastore(store.path), keys[30:], "more")
    store.refresh()
    assert_nearest(index.search(queries, 4), brute_force(keys, queries), 4)
    store.forget(["d0"])
    compact(store)
    assert_nearest(index.search(queries, 4), brute_force(keys[30:], queries), 4)


@MODES
@pytest.mark.parametrize("first_row", [0, 7, 20, 33, 60])
def test_rows_before_the_first_are_left_out(
    tmp_path: Path, resident_bytes: int, first_row: int
) -> None:
    keys = random_keys(60, 5, offset=300.0)
    store = store_of(tmp_path / "s", keys[:20], keys[20:40], keys[40:])
    index = ExactIndex(store, resident_bytes=resident_bytes, first_row=first_row)
    queries = random_keys(8, 5, seed=1).float() + 300.0
    for k in (3, 60):
        squared = brute_force(keys, queries, rows=range(first_row, 60))
        assert_nearest(index.search(queries, k), squared, k)
    store.forget(["d1"])
    live = [row for row in range(first_row, 60) if not 20 <= row < 40]
    assert_nearest(index.search(queries, 60), brute_force(keys, queries, rows=live), 60)


def test_other_key_dtypes_and_queries(tmp_path: Path) -> None:
    keys = random_keys(40, 5)
    queries = random_keys(8, 5, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        index = ExactIndex(store_of(tmp_path / str(dtype), keys.to(dtype)))
        stored = keys.to(dtype)
        assert_nearest(index.search(queries.float(), 4), brute_force(stored, queries), 4)
        assert_nearest(index.search(queries, 4), brute_force(stored, queries), 4)


def test_refusals(tmp_path: Path) -> None:
    index = ExactIndex(store_of(tmp_path / "s", random_keys(9, 5)))
    with refusal(InvalidArgumentError, "k must be at least 1, got 0: ask for a neighbor"):
        index.search(torch.zeros(1, 5), 0)
    with refusal(InvalidArgumentError, "queries must have the keys' dimension 5, got 4"):
        index.search(torch.zeros(1, 4), 1)
