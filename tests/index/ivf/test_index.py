"""The inverted file: the contract, every way it can search, and what happens to its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from index_contract import IndexContract, append, assert_neighbors, clustered, store_of
from stores import small_disk

from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import (
    DatastoreChangedError,
    DatastoreCorruptError,
    DatastoreNotFoundError,
    DatastoreWriteError,
    InvalidArgumentError,
)
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf import lists as ivf_lists
from knnlm.index.ivf.codes import Coder
from knnlm.index.ivf.index import FILE_NAME, FOLDER, IVFIndex
from knnlm.index.ivf.products import Products
from knnlm.index.protocol import Index, Neighbors

RECALL = 0.97


class TestIVF(IndexContract):
    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(store, recall=0.99, k=128)


class TestCompressedIVF(IndexContract):
    recall = 0.9

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(store, kind="compressed", recall=0.99, k=128, code_dim=16)


class TestFloat32IVF(IndexContract):
    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(store, kind="float32", recall=0.99, k=128)


class TestIVFInTensors(IndexContract):
    """Without numba."""

    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        index = IVFIndex.build(store, recall=0.99, k=128)
        index._compiled = False
        return index


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestIVFOnGPU(IndexContract):
    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(store, recall=0.99, k=128, device="cuda")


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return store_of(tmp_path / "store", clustered(6000).half())


def assert_same(one: Neighbors, other: Neighbors) -> None:
    torch.testing.assert_close(one.squared_distances, other.squared_distances, rtol=1e-5, atol=1e-5)
    assert (one.rows == other.rows).double().mean() > 0.999  # ties may swap


@pytest.mark.parametrize("k", [3, 300])
def test_every_way_to_search_finds_the_same(store: Datastore, k: int) -> None:
    index = IVFIndex.build(store, nprobe=8)
    queries = clustered(120, seed=1)
    batch = index.search(queries, k)
    few = [index.search(part, k) for part in torch.split(queries, 7)]
    assert_same(
        batch,
        Neighbors(
            torch.cat([part.squared_distances for part in few]),
            torch.cat([part.rows for part in few]),
        ),
    )
    index._compiled = False
    assert_same(batch, index.search(queries, k))


def test_all_lists_give_exact_search(store: Datastore) -> None:
    index = IVFIndex.build(store, nlist=16, nprobe=16)
    queries = clustered(200, seed=1)
    assert_same(ExactIndex(store).search(queries, 50), index.search(queries, 50))


def test_report_says_what_was_measured(store: Datastore) -> None:
    queries = clustered(500, seed=1)
    index = IVFIndex.build(store, recall=0.9, k=64, queries=queries)
    report = index.report
    assert report.rows == 6000
    assert report.nprobe < report.nlist
    assert report.measured.recall >= 0.9
    assert IVFIndex(store).report == report
    truth = ExactIndex(store).search(queries, 64).rows
    found = index.search(queries, 64).rows
    recall = (found[:, :, None] == truth[:, None, :]).any(dim=1).double().mean().item()
    assert recall == pytest.approx(report.measured.recall, abs=0.02)
    assert report.bytes_per_entry == pytest.approx(24 * 3 + 16, rel=0.3)


def test_a_higher_recall_takes_more_lists(store: Datastore) -> None:
    low, high = (
        IVFIndex.build(store, nlist=64, recall=recall, k=16).nprobe for recall in (0.6, 0.99)
    )
    assert low < high


def test_the_same_keys_give_the_same_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "other")]
    for path in paths:
        IVFIndex.build(store_of(path, clustered(6000).half()), nprobe=4)
    one, other = ((path / FOLDER / FILE_NAME).read_bytes() for path in paths)
    header = 8 + int.from_bytes(one[:8], "little")
    assert one[header:] == other[header:]


def test_appended_rows_are_found_and_compaction_is_refused(store: Datastore) -> None:
    index = IVFIndex.build(store, recall=0.99, k=128)
    queries = clustered(100, seed=1)
    for prefix in ("new", "newer"):
        append(store.path, clustered(900, seed=8).half() + 0.25, 3, prefix)
        assert index.refresh()
        found = index.search(queries, 40)
        assert bool((found.rows >= 6000).any())
        assert_neighbors(store, queries, 40, found, 0.97)
    opened = IVFIndex(Datastore(store.path))
    assert_same(found, opened.search(queries, 40))
    assert not index.refresh()
    store.forget(["new1", "d3"])
    assert_neighbors(store, queries, 40, index.search(queries, 40), 0.97)
    compact(store)
    with pytest.raises(DatastoreChangedError, match="knnlm index"):
        index.search(queries, 40)
    with pytest.raises(DatastoreChangedError, match="knnlm index"):
        IVFIndex(store)
    assert_neighbors(
        store, queries, 40, IVFIndex.build(store, recall=0.99).search(queries, 40), 0.97
    )


def test_a_build_that_fails_leaves_the_old_index(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    IVFIndex.build(store, nprobe=4)
    before = (store.path / FOLDER / FILE_NAME).read_bytes()

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ivf_lists, "fill", die)
    with pytest.raises(KeyboardInterrupt):
        IVFIndex.build(store, nprobe=2)
    assert [path.name for path in (store.path / FOLDER).iterdir()] == [FILE_NAME]
    assert (store.path / FOLDER / FILE_NAME).read_bytes() == before


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 800) as disk:
        store = store_of(disk.path / "store", clustered(6000).half())
        with pytest.raises(DatastoreWriteError, match="the disk is full"):
            IVFIndex.build(store, nprobe=4)
        assert list((store.path / FOLDER).iterdir()) == []


def test_a_damaged_or_missing_file_is_reported(store: Datastore) -> None:
    with pytest.raises(DatastoreNotFoundError, match="knnlm index"):
        IVFIndex(store)
    IVFIndex.build(store, nprobe=4)
    path = store.path / FOLDER / FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatastoreCorruptError, match="knnlm index"):
        IVFIndex(store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "int3"}, "kind must be one of"),
        ({"nlist": 0}, "nlist must be"),
        ({"nlist": 7000}, "nlist must be"),
        ({"nlist": 8, "nprobe": 9}, "nprobe must be"),
        ({"code_dim": 25}, "code_dim must be"),
        ({"recall": 0.0}, "recall must be"),
        ({"k": 0}, "k must be"),
    ],
)
def test_bad_arguments_are_refused(
    store: Datastore, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        IVFIndex.build(store, **arguments)  # type: ignore[arg-type]


def test_the_file_is_safetensors_with_a_readable_report(store: Datastore) -> None:
    from safetensors import safe_open

    IVFIndex.build(store, nprobe=4)
    with safe_open(store.path / FOLDER / FILE_NAME, "pt") as file:
        assert json.loads(file.metadata()["report"])["nprobe"] == 4
        keys, rows = file.get_tensor("keys"), file.get_tensor("rows")
    assert torch.equal(rows.sort().values, torch.arange(6000))
    assert torch.equal(keys, store.keys_at(rows))


def test_products_are_the_same_in_integers_and_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randint(-127, 128, (rows, 1024), generator=generator).to(torch.int8)
        for rows in (9, 130)
    )
    expected = queries.long() @ keys.long().T
    assert torch.equal(Products(integers=False)(queries, keys).long(), expected)
    assert torch.equal(Products(integers=True)(queries, keys).long(), expected)


def test_codes_estimate_distances() -> None:
    keys, queries = clustered(500), clustered(20, seed=1)
    coder = Coder.fit(keys, keys.shape[1], seed=0)
    key_codes, query_codes = coder.encode(keys), coder.encode(queries)
    products = query_codes.codes.float() @ key_codes.codes.float().T
    scores = key_codes.half_norms - query_codes.steps[:, None] * key_codes.steps * products
    estimates = 2 * (scores + query_codes.half_norms[:, None])
    exact = torch.cdist(queries, keys).square()
    error = (estimates - exact).abs() / 2
    assert (error < query_codes.margins()[:, None]).double().mean() > 0.98


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1000, 5000])
@pytest.mark.parametrize("kinds", [1, 3, 10**9])
def test_kernels_select_and_sort(size: int, kinds: int) -> None:
    kernels = pytest.importorskip("knnlm.index.ivf.kernels")
    generator = np.random.default_rng(size)
    values = generator.integers(0, kinds, size).astype(np.float32)
    ascending = np.sort(values)
    for rank in {0, size // 3, size - 1}:
        assert kernels.select(values.copy(), rank) == ascending[rank]
    positions = np.arange(size)
    kept = values.copy()
    kernels.sort(kept, positions, np.empty(size, np.float32), np.empty(size, np.int64))
    assert np.array_equal(kept, ascending)
    assert np.array_equal(values[positions], ascending)


def test_copies_of_a_key_do_not_lower_the_recall(tmp_path: Path) -> None:
    keys = clustered(300).half().repeat(20, 1)
    index = IVFIndex.build(store_of(tmp_path / "copies", keys), nlist=32, recall=0.95, k=8)
    assert index.report.measured.recall >= 0.95
    assert index.nprobe <= 4, "eight of twenty copies are found in the first list"


@pytest.mark.parametrize("code_dim", [16, 24])
def test_one_query_gets_the_lists_and_the_code_of_a_batch(code_dim: int) -> None:
    few = pytest.importorskip("knnlm.index.ivf.search_few")
    keys, queries = clustered(500), torch.cat([clustered(50, seed=1), torch.zeros(1, 24)])
    coder = Coder.fit(keys, code_dim, seed=0)
    lists = ivf_lists.Lists.around(keys[:40], coder)
    expected, nearest = coder.encode(queries), lists.nearest_lists(queries, 7)
    arrays = few.ListArrays(lists)
    for number, query in enumerate(queries.numpy()):
        code = arrays.encode(query)
        # a quotient that ends in a half may be rounded either way
        assert np.abs(code.code.astype(int) - expected.codes[number].numpy()).max() <= 1
        assert (code.code == expected.codes[number].numpy()).mean() >= 0.9
        assert code.step == pytest.approx(expected.steps[number].item(), rel=1e-5)
        assert code.half_norm == pytest.approx(expected.half_norms[number].item(), rel=1e-5)
        assert sorted(nearest[number].tolist()) == arrays.nearest_lists(query, code, 7).tolist()
    copies = few.ListArrays(ivf_lists.Lists.around(keys[:1].expand(9, -1).contiguous(), coder))
    assert len(set(copies.nearest_lists(queries[0].numpy(), code, 4).tolist())) == 4


def test_a_vector_at_the_center_has_a_code(store: Datastore) -> None:
    coder = Coder.fit(clustered(500), 16, seed=0)
    codes = coder.encode(coder.center[None])
    assert not codes.codes.any()
    assert codes.steps.item() > 0
