"""Searches where memory cannot hold what they need: the same answers, read ahead."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from index_contract import clustered, store_of

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf import index as ivf_index
from knnlm.index.policy import build_index, open_index

read_ahead = pytest.importorskip("knnlm.index.ivf.read_ahead")
rescore = pytest.importorskip("knnlm.index.ivf.rescore")

QUERIES = clustered(300, seed=1)


class Advice:
    """Stands in for the C library: notes which memory was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def madvise(self, start: int, size: int, advice: int) -> int:
        assert start % mmap.PAGESIZE == 0
        assert advice == mmap.MADV_WILLNEED
        self.asked.append((start, start + size))
        return 0


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    advice = Advice()
    monkeypatch.setattr(read_ahead, "_C", advice)
    return advice


@pytest.mark.parametrize("gap_bytes", [0, 1 << 14, 1 << 30])
def test_all_rows_are_asked_for_and_little_else(advice: Advice, gap_bytes: int) -> None:
    array = np.zeros((4000, 576), np.float16)
    rows = np.unique(np.random.default_rng(0).integers(0, 4000, 200))
    read_ahead.read_ahead(array, rows, gap_bytes)
    base = array.ctypes.data
    for row in rows.tolist():
        first, last = base + row * 1152, base + row * 1152 + 1151
        assert any(start <= first < stop for start, stop in advice.asked)
        assert any(start <= last < stop for start, stop in advice.asked)
    assert max(stop - start for start, stop in advice.asked) <= 1 << 17
    total = sum(stop - start for start, stop in advice.asked)
    assert total <= (len(rows) * (1152 + mmap.PAGESIZE) if gap_bytes == 0 else array.nbytes + 8192)
    read_ahead.read_ahead(array, rows[:0], gap_bytes)


@pytest.mark.parametrize("kind", ["ivf", "compressed"])
def test_answers_are_the_same_where_memory_is_short(
    kind: str, tmp_path: Path, advice: Advice, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "store", clustered(6000).half())
    build_index(store, kind, nprobe=8)
    expected = open_index(store)
    batch, one = expected.search(QUERIES, 20), expected.search(QUERIES[:1], 20)
    assert advice.asked == []
    monkeypatch.setattr(ivf_index, "memory_bytes", lambda: 1)
    short = open_index(Datastore(store.path))
    for queries, right in ((QUERIES, batch), (QUERIES[:1], one)):
        advice.asked.clear()
        found = short.search(queries, 20)
        assert torch.equal(found.rows, right.rows)
        assert torch.equal(found.squared_distances, right.squared_distances)
        assert len(advice.asked) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_distances_are_those_of_the_keys_in_every_dtype(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescore, "_BLOCK_BITS", 5)
    keys = clustered(3000).to(dtype)
    store = store_of(tmp_path / "store", keys)
    generator = np.random.default_rng(0)
    queries, rows = generator.integers(0, 300, 5000), generator.integers(0, 3000, 5000)
    pairs = rescore.Pairs(QUERIES.numpy(), queries.astype(np.int32), rows.astype(np.int32))
    exact = (QUERIES[queries] - keys[rows].float()).square().sum(dim=1)
    for parallel in (False, True):
        distances = np.full(5000, np.nan, np.float32)
        rescore.DatastoreKeys(store, short=False).measure(pairs, distances, parallel=parallel)
        torch.testing.assert_close(torch.from_numpy(distances), exact, rtol=1e-5, atol=1e-5)
