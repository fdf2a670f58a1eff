"""Codes of 4 bits, and the kind of index that has nothing but codes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from index_contract import append, clustered, store_of, true_distances
from safetensors import safe_open
from safetensors.torch import save_file

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import IndexFile, store_index, stored_index
from knnlm.errors import DatastoreCorruptError
from knnlm.index.backend import IndexOptions
from knnlm.index.ivf.codes import Coder, CodeShape, unpacked
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.parts import planned_part
from knnlm.index.policy import build_index, keep_index, open_index
from knnlm.index.protocol import Neighbors

QUERIES = clustered(120, seed=1)


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return store_of(tmp_path / "store", clustered(6000).half())


def assert_nearest(store: Datastore, found: Neighbors, recall: float) -> None:
    """Check that found entries are the nearest, and estimates about their distances."""
    k = found.rows.shape[1]
    distances = true_distances(store, QUERIES)
    assert bool(found.present.all())
    exact = distances.gather(1, found.rows)
    near_enough = exact <= distances.sort(dim=1).values[:, k - 1 : k]
    assert near_enough.double().mean() >= recall
    error = (found.squared_distances - exact).abs() / exact
    assert error.median() < 0.1
    assert bool((found.squared_distances.diff(dim=1) >= 0).all())


def test_codes_of_4_bits_are_odd_numbers_in_pairs() -> None:
    kernels = pytest.importorskip("knnlm.index.ivf.kernels")
    keys = clustered(300)
    coder = Coder.fit(keys, CodeShape(24, bits=4), seed=0)
    codes = coder.encode_keys(keys)
    numbers = unpacked(codes.codes)
    assert codes.codes.shape == (300, 12)
    assert numbers.shape == (300, 24)
    assert set(numbers.flatten().tolist()) <= set(range(-15, 16, 2))
    in_kernel = np.empty((300, 24), np.int8)
    kernels.unpack(codes.codes.numpy(), in_kernel)
    assert np.array_equal(in_kernel, numbers.numpy())
    turned = (keys - coder.center) @ coder.projection.T
    assert ((numbers * codes.steps[:, None] - turned).norm(dim=1) < 0.2 * turned.norm(dim=1)).all()
    # a key's product with itself is right, so that what is near is not underestimated
    torch.testing.assert_close(
        (numbers * turned).sum(dim=1) * codes.steps, turned.square().sum(dim=1)
    )


def test_an_odd_number_of_dimensions_is_made_even() -> None:
    keys = clustered(300, dimension=7)
    coder = Coder.fit(keys, CodeShape(7, bits=4), seed=0)
    assert coder.encode_keys(keys).codes.shape == (300, 4)
    assert coder.code_dim == 8


def test_one_query_is_scored_as_a_batch_is() -> None:
    kernels_few = pytest.importorskip("knnlm.index.ivf.kernels_few")
    keys, queries = clustered(300), clustered(5, seed=1)
    coder = Coder.fit(keys, CodeShape(24, bits=4), seed=0)
    codes, asked = coder.encode_keys(keys), coder.encode(queries)
    products = asked.codes.float() @ unpacked(codes.codes).float().T
    expected = codes.half_norms - asked.steps[:, None] * codes.steps * products
    arrays = [array.numpy() for array in (codes.codes, codes.steps, codes.half_norms)]
    coded = kernels_few.CodedKeys(np.array([0, 300]), *arrays)
    for code, step, scores in zip(asked.codes, asked.steps, expected, strict=True):
        few = kernels_few.score_packed(code.numpy(), step.item(), np.zeros(1, np.int64), coded)
        torch.testing.assert_close(torch.from_numpy(few), scores, rtol=1e-4, atol=1e-4)


def test_a_compressed_entry_takes_76_bytes() -> None:
    keys = clustered(300, dimension=200)
    coder = Coder.fit(keys, CodeShape(128, bits=4), seed=0)
    part = planned_part(1000, 1000, Lists.around(keys[:4], coder))
    assert sum(array.nbytes for name, array in part.arrays().items() if name != "starts") == 76_000


def test_codes_alone_find_the_nearest_and_estimate_distances(store: Datastore) -> None:
    index = build_index(store, "codes", recall=0.99, k=32)
    assert isinstance(index, IVFIndex)
    assert not index.exact_distances
    found = index.search(QUERIES, 32)
    assert_nearest(store, found, 0.85)
    few = [index.search(part, 32) for part in torch.split(QUERIES, 7)]
    rows = torch.cat([part.rows for part in few])
    assert (rows == found.rows).double().mean() > 0.99
    index._compiled = False
    assert (index.search(QUERIES, 32).rows == found.rows).double().mean() > 0.99


def test_codes_alone_read_no_keys(store: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_index(store, "codes", nprobe=8).search(QUERIES, 10)

    def refuse(*arguments: object) -> None:
        raise AssertionError("keys were read")

    monkeypatch.setattr(Datastore, "key_blocks", refuse)
    monkeypatch.setattr(Datastore, "keys_at", refuse)
    found = open_index(Datastore(store.path)).search(QUERIES, 10)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.squared_distances, expected.squared_distances)


def test_codes_alone_follow_the_datastore(store: Datastore) -> None:
    index = build_index(store, "codes", nprobe=16)
    append(store.path, clustered(900, seed=8).half() + 0.25, 3, "new")
    store.refresh()
    found = index.search(QUERIES, 20)
    assert bool((found.rows >= 6000).any())
    assert_nearest(store, found, 0.8)
    store.forget(["new1", "d3"])
    found = index.search(QUERIES, 20)
    assert bool(store.alive[found.rows].all())


def test_estimates_are_corrected_by_a_line_without_bias(store: Datastore) -> None:
    coarse = IVFIndex.build(store, IndexOptions(nprobe=16, k=64), kind=IndexKind.codes, code_dim=4)
    assert coarse.report.slope != 1.0
    found = coarse.search(QUERIES, 64)
    exact = true_distances(store, QUERIES).gather(1, found.rows)
    bias = (found.squared_distances - exact).mean()
    assert bias.abs() < 0.05 * exact.mean()
    centered, estimates = (
        each - each.mean(dim=1, keepdim=True) for each in (exact, found.squared_distances.double())
    )
    slope = (centered * estimates).sum() / estimates.square().sum()
    assert slope == pytest.approx(1.0, abs=0.3)


def test_recall_asked_for_is_a_share_of_what_codes_can_find(store: Datastore) -> None:
    index = IVFIndex.build(
        store, IndexOptions(recall=0.97, k=32), kind=IndexKind.codes, nlist=64, code_dim=8
    )
    assert index.report.measured.recall < 0.97
    assert index.nprobe < 64


def test_a_file_of_an_older_layout_is_refused_and_built_again(store: Datastore) -> None:
    build_index(store, "compressed", nprobe=8)
    (path,) = (store.path / "index").iterdir()
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), sorted(set(file.keys()) - {"bits"})
        save_file({name: file.get_tensor(name) for name in names}, path, metadata)
    written = IndexFile.written(store.path, f"index/{path.name}", 0, 6000)
    with store.catalog.transaction(entries_change=False):
        store_index(store.catalog, replace(stored_index(store.catalog), files=(written,)))
    with pytest.raises(DatastoreCorruptError, match=r"bits is missing.*run: knnlm index"):
        open_index(Datastore(store.path))
    keep_index(store)
    assert len(open_index(Datastore(store.path)).search(QUERIES, 5).rows) == 120
