"""The inverted file: the contract, every way it can search, and what happens to its file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_contract import IndexContract, append, assert_neighbors, clustered, store_of
from stores import small_disk

from knnlm.choices import IndexKind
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import FOLDER
from knnlm.errors import (
    DatastoreChangedError,
    DatastoreCorruptError,
    DatastoreNotFoundError,
    DatastoreWriteError,
    InvalidArgumentError,
)
from knnlm.index.backend import IndexOptions
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf import build as ivf_build, forecast, lists as ivf_lists
from knnlm.index.ivf.candidates import Candidates, nearest_of
from knnlm.index.ivf.codes import Coder, CodeShape
from knnlm.index.ivf.index import FILE_NAME, IVFIndex
from knnlm.index.ivf.products import float_products, integer_products
from knnlm.index.policy import build_index
from knnlm.index.protocol import Index, Neighbors

RECALL = 0.97


class TestIVF(IndexContract):
    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(store, IndexOptions(recall=0.99, k=128))


class TestCompressedIVF(IndexContract):
    recall = 0.9

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(
            store, IndexOptions(recall=0.99, k=128), kind=IndexKind.compressed, code_dim=16
        )


class TestIVFInTensors(IndexContract):
    """In the way of a GPU, on the CPU."""

    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        index = IVFIndex.build(store, IndexOptions(recall=0.99, k=128))
        index._compiled = False
        return index


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestIVFOnGPU(IndexContract):
    recall = RECALL

    def make_index(self, store: Datastore) -> Index:
        return IVFIndex.build(store, IndexOptions(recall=0.99, k=128, device="cuda"))


def test_keys_of_every_dtype_are_copied_exactly(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        keys = clustered(3000).to(dtype)
        index = IVFIndex.build(store_of(tmp_path / str(dtype), keys), IndexOptions(nprobe=8, k=16))
        nearest = index.search(keys[:50].float(), 1)
        assert index._base.keys is not None
        assert index._base.keys.dtype == torch.float32
        assert torch.equal(nearest.rows[:, 0], torch.arange(50))
        assert not nearest.squared_distances.any()


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return store_of(tmp_path / "store", clustered(6000).half())


def assert_same(one: Neighbors, other: Neighbors) -> None:
    torch.testing.assert_close(one.squared_distances, other.squared_distances, rtol=1e-5, atol=1e-5)
    assert (one.rows == other.rows).double().mean() > 0.999  # ties may swap


@pytest.mark.parametrize("k", [3, 300])
def test_every_way_to_search_finds_the_same(store: Datastore, k: int) -> None:
    index = IVFIndex.build(store, IndexOptions(nprobe=8))
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
    index = IVFIndex.build(store, IndexOptions(nprobe=16), nlist=16)
    queries = clustered(200, seed=1)
    assert_same(ExactIndex(store).search(queries, 50), index.search(queries, 50))


def test_report_says_what_was_measured(store: Datastore) -> None:
    queries = clustered(500, seed=1)
    index = build_index(store, "ivf", recall=0.9, k=64, queries=queries)
    assert isinstance(index, IVFIndex)
    report = index.report
    assert report.rows == 6000
    assert report.nprobe < index.nlist
    assert report.measured.recall >= 0.9
    assert IVFIndex(store).report == report
    truth = ExactIndex(store).search(queries, 64).rows
    found = index.search(queries, 64).rows
    recall = (found[:, :, None] == truth[:, None, :]).any(dim=1).double().mean().item()
    assert recall == pytest.approx(report.measured.recall, abs=0.02)
    assert report.bytes_per_entry == pytest.approx(24 * 3 + 16, rel=0.3)


def test_a_higher_recall_takes_more_lists(store: Datastore) -> None:
    low, high = (
        IVFIndex.build(store, IndexOptions(recall=recall, k=16), nlist=64).nprobe
        for recall in (0.6, 0.99)
    )
    assert low < high


def test_the_same_keys_give_the_same_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "other")]
    for path in paths:
        IVFIndex.build(store_of(path, clustered(6000).half()), IndexOptions(nprobe=4))
    one, other = ((path / FOLDER / FILE_NAME).read_bytes() for path in paths)
    header = 8 + int.from_bytes(one[:8], "little")
    assert one[header:] == other[header:]


def test_appended_rows_are_found_and_a_compacted_store_is_searched_exactly(
    store: Datastore,
) -> None:
    index = build_index(store, "ivf", recall=0.99, k=128)
    queries = clustered(100, seed=1)
    for prefix in ("new", "newer"):
        append(store.path, clustered(900, seed=8).half() + 0.25, 3, prefix)
        assert store.refresh()
        found = index.search(queries, 40)
        assert bool((found.rows >= 6000).any())
        assert_neighbors(store, queries, 40, found, 0.97)
    opened = IVFIndex(Datastore(store.path))
    assert_same(found, opened.search(queries, 40))
    store.forget(["new1", "d3"])
    assert_neighbors(store, queries, 40, index.search(queries, 40), 0.97)
    compact(store)
    assert_neighbors(store, queries, 40, index.search(queries, 40), 1.0)
    with pytest.raises(DatastoreNotFoundError, match="knnlm index"):
        IVFIndex(store)
    build_index(store, "ivf")
    with pytest.raises(DatastoreChangedError, match="open it again"):
        IVFIndex(opened.store)
    assert_neighbors(
        store,
        queries,
        40,
        IVFIndex.build(store, IndexOptions(recall=0.99)).search(queries, 40),
        0.97,
    )


def test_a_build_that_fails_leaves_the_old_index(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(store, "ivf", nprobe=4)
    before = (store.path / FOLDER / FILE_NAME).read_bytes()

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ivf_build, "write_part", die)
    with pytest.raises(KeyboardInterrupt):
        IVFIndex.build(store, IndexOptions(nprobe=2))
    assert [path.name for path in (store.path / FOLDER).iterdir()] == [FILE_NAME]
    assert (store.path / FOLDER / FILE_NAME).read_bytes() == before


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 800) as disk:
        store = store_of(disk.path / "store", clustered(6000).half())
        with pytest.raises(DatastoreWriteError, match="the disk is too full for an index of about"):
            IVFIndex.build(store, IndexOptions(nprobe=4))
        assert not (store.path / FOLDER).exists()
        # another process may fill it meanwhile
        monkeypatch.setattr(forecast, "_check_disk", lambda store, work: None)
        with pytest.raises(DatastoreWriteError, match="the disk is full"):
            IVFIndex.build(store, IndexOptions(nprobe=4))
        assert list((store.path / FOLDER).iterdir()) == []


def test_a_damaged_or_missing_file_is_reported(store: Datastore) -> None:
    with pytest.raises(DatastoreNotFoundError, match="knnlm index"):
        IVFIndex(store)
    build_index(store, "ivf", nprobe=4)
    path = store.path / FOLDER / FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatastoreCorruptError, match="knnlm index"):
        IVFIndex(store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nlist": 0}, "nlist must be"),
        ({"nlist": 7000}, "nlist must be"),
        ({"nlist": 8}, "nprobe must be"),
        ({"code_dim": 25}, "code_dim must be"),
    ],
)
def test_bad_arguments_are_refused(
    store: Datastore, arguments: dict[str, int], message: str
) -> None:
    options = IndexOptions(nprobe=9 if message == "nprobe must be" else None)
    with pytest.raises(InvalidArgumentError, match=message):
        IVFIndex.build(store, options, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"recall": 0.0}, {"recall": 1.5}, {"k": 0}])
def test_bad_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(given))} must be"):
        IndexOptions(**given)


def test_the_file_is_safetensors_with_a_readable_report(store: Datastore) -> None:
    from safetensors import safe_open

    IVFIndex.build(store, IndexOptions(nprobe=4))
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
    assert torch.equal(float_products(queries, keys).long(), expected)
    assert torch.equal(integer_products(queries, keys).long(), expected)


def test_codes_estimate_distances() -> None:
    keys, queries = clustered(500), clustered(20, seed=1)
    coder = Coder.fit(keys, CodeShape(keys.shape[1]), seed=0)
    key_codes, query_codes = coder.encode(keys), coder.encode(queries)
    products = query_codes.codes.float() @ key_codes.codes.float().T
    scores = key_codes.half_norms - query_codes.steps[:, None] * key_codes.steps * products
    estimates = 2 * (scores + query_codes.half_norms[:, None])
    exact = torch.cdist(queries, keys).square()
    error = (estimates - exact).abs() / 2
    assert (error < query_codes.margins()[:, None]).double().mean() > 0.98


@pytest.mark.parametrize("counts", [[1], [2, 0], [40, 7], [300, 0], [5, 1200]])
@pytest.mark.parametrize("different", [1, 3, 10**9])
@pytest.mark.parametrize("k", [1, 16, 500])
def test_the_nearest_candidates_are_in_order(counts: list[int], different: int, k: int) -> None:
    """Those at equal distances stay in the order in which they were found."""
    generator = np.random.default_rng(sum(counts))
    total = sum(counts)
    distances = generator.integers(0, different, total).astype(np.float32)
    positions, rows = generator.permutation(total), generator.permutation(total)
    lengths = np.array(counts)
    starts = (lengths.cumsum() - lengths)[:, None]
    candidates = Candidates(distances, positions, starts, lengths[:, None])
    nearest = nearest_of(candidates, rows, k)
    for query, (start, count) in enumerate(zip(starts[:, 0], counts, strict=True)):
        own = distances[start : start + count]
        order = np.argsort(own, kind="stable")[:k]
        padding = k - len(order)
        assert nearest.squared_distances[query].tolist() == [*own[order], *[np.inf] * padding]
        expected = rows[positions[start + order]]
        assert nearest.rows[query].tolist() == [*expected, *[-1] * padding]


def test_copies_of_a_key_do_not_lower_the_recall(tmp_path: Path) -> None:
    keys = clustered(300).half().repeat(20, 1)
    index = IVFIndex.build(
        store_of(tmp_path / "copies", keys), IndexOptions(recall=0.95, k=8), nlist=32
    )
    assert index.report.measured.recall >= 0.95
    assert index.nprobe <= 4, "eight of twenty copies are found in the first list"


@pytest.mark.parametrize("code_dim", [16, 24])
def test_one_query_gets_the_lists_and_the_code_of_a_batch(code_dim: int) -> None:
    few = pytest.importorskip("knnlm.index.ivf.query_code")
    keys, queries = clustered(500), torch.cat([clustered(50, seed=1), torch.zeros(1, 24)])
    coder = Coder.fit(keys, CodeShape(code_dim), seed=0)
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
    coder = Coder.fit(clustered(500), CodeShape(16), seed=0)
    codes = coder.encode(coder.center[None])
    assert not codes.codes.any()
    assert codes.steps.item() > 0
