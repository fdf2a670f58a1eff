"""FAISS behind our protocol: every wrapper gets its nprobe, its k_factor and its tombstones."""

from pathlib import Path

import pytest
import torch
from index_contract import IndexContract, append, assert_neighbors, clustered, store_of

from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreNotFoundError,
    InvalidArgumentError,
)
from knnlm.index.backend import IndexOptions
from knnlm.index.faiss import FaissIndex
from knnlm.index.policy import build_index

pytest.importorskip("faiss")


class TestFlat(IndexContract):
    def make_index(self, store: Datastore) -> FaissIndex:
        return FaissIndex.build(store, IndexOptions(factory="Flat"))


class TestIVFFlatProbingAll(IndexContract):
    def make_index(self, store: Datastore) -> FaissIndex:
        lists = max(1, min(16, store.rows // 39))
        return FaissIndex.build(store, IndexOptions(factory=f"IVF{lists},Flat", nprobe=lists))


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return store_of(tmp_path / "store", clustered(6000).half())


# those that rescore with the keys themselves find all true neighbors when they probe everything
@pytest.mark.parametrize(
    "factory",
    [
        "IVF16,Flat",
        "IVF16_HNSW32,Flat",
        "PCA24,IVF16,Flat",
        "OPQ8_24,IVF16,PQ8x4fs,RFlat",
        "IVF16,SQ8,RFlat",
        "SQ8,RFlat",
        "HNSW32",
        "LSH,RFlat",
        "PQ8x4fs,RFlat",
    ],
)
def test_tombstones_and_nprobe_reach_every_wrapper(store: Datastore, factory: str) -> None:
    index = FaissIndex.build(store, IndexOptions(factory=factory, k=64), k_factor=60.0)
    if "IVF" in factory:
        index.nprobe = 16
    queries = clustered(40, seed=1)
    recall = {"HNSW32": 0.9, "LSH,RFlat": 0.5, "PQ8x4fs,RFlat": 0.9}.get(factory, 0.999)
    assert_neighbors(store, queries, 20, index.search(queries, 20), recall)

    store.forget(["d1", "d2", "d3", "d4", "d5", "d6", "d7"])
    alive = store.alive
    found = index.search(queries, 20)
    assert bool(alive[found.rows].all())
    assert_neighbors(store, queries, 20, found, min(recall, 0.9))


@pytest.mark.parametrize(
    "factory", ["IVF64,SQ8", "OPQ8_24,IVF64,PQ8x4fs,RFlat", "PCA16,IVF64,Flat"]
)
def test_a_larger_nprobe_finds_more(store: Datastore, factory: str) -> None:
    index = FaissIndex.build(store, IndexOptions(factory=factory, nprobe=1))
    queries = clustered(100, seed=2)
    few = index.search(queries, 500).present.sum()
    index.nprobe = 64
    assert index.search(queries, 500).present.sum() > 1.5 * few, "nprobe did not arrive"


def test_nprobe_is_the_smallest_that_reaches_the_recall(store: Datastore) -> None:
    index = FaissIndex.build(store, IndexOptions(factory="IVF64,Flat", recall=0.9, k=50))
    assert 0.9 <= index.report.measured.recall <= 1.0
    assert index.report.nprobe is not None
    assert index.report.nprobe < 64


def test_it_is_read_back_and_follows_the_datastore(store: Datastore) -> None:
    built = build_index(store, "faiss", factory="IVF16,Flat", nprobe=16)
    assert isinstance(built, FaissIndex)
    index = FaissIndex(Datastore(store.path))
    assert index.report == built.report
    queries = clustered(20, seed=3)
    assert_neighbors(index.store, queries, 30, index.search(queries, 30), 1.0)

    append(store.path, clustered(500, seed=4).half(), 2, "new")
    index.store.refresh()
    assert_neighbors(index.store, queries, 30, index.search(queries, 30), 1.0)
    index.store.forget(["new1", "d0"])
    assert_neighbors(index.store, queries, 30, index.search(queries, 30), 1.0)

    compact(index.store)
    assert_neighbors(index.store, queries, 30, index.search(queries, 30), 1.0)


def test_refusals(store: Datastore) -> None:
    with pytest.raises(DatastoreNotFoundError, match="has no faiss index; make one with"):
        FaissIndex(store)
    with pytest.raises(InvalidArgumentError, match="factory 'Nonsense' is none of FAISS's"):
        FaissIndex.build(store, IndexOptions(factory="Nonsense"))
    build_index(store, "faiss", factory="Flat")
    (file,) = (store.path / "index" / "faiss").glob("*.index")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DatastoreCorruptError, match=r"1000 bytes, .*; run: knnlm index"):
        FaissIndex(store)


def test_the_same_seed_gives_the_same_index(store: Datastore) -> None:
    queries = clustered(50, seed=5)
    one = FaissIndex.build(store, IndexOptions(factory="IVF32,Flat", nprobe=2)).search(queries, 10)
    other = FaissIndex.build(store, IndexOptions(factory="IVF32,Flat", nprobe=2)).search(
        queries, 10
    )
    assert torch.equal(one.rows, other.rows)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "SQ8,RFlat"])
def test_any_copy_of_a_key_counts_as_right(tmp_path: Path, factory: str) -> None:
    """Distances of exact kinds are exact, but FAISS says so of none."""
    keys = clustered(60).half().repeat(40, 1)
    store = store_of(tmp_path / "copies", keys[torch.randperm(len(keys))])
    options = IndexOptions(factory=factory, nprobe=8 if "IVF" in factory else None, k=100)
    index = FaissIndex.build(store, options, k_factor=30.0)
    assert index.report.measured.recall > 0.99
