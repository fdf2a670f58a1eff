"""Exact search where float32 loses digits: far clusters, huge coordinates, copies, mixed scales.

The truth is Σ (q − k)² in float64.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import refusal
from index_contract import store_of
from torch import Tensor

from knnlm.datastore.unfit_keys import MAX_NORM, measurable
from knnlm.errors import DatastoreCorruptError
from knnlm.index import exact, measure
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Neighbors

TOLERANCE = 1e-4
ROWS, DIMENSION = 300, 24


def clusters(distance: float) -> Callable[[torch.Generator], Tensor]:
    """Keys around a few centers, that many units from each other in every coordinate."""

    def make(generator: torch.Generator) -> Tensor:
        centers = torch.randint(0, 4, (ROWS, 1), generator=generator) * distance
        return centers + torch.randn(ROWS, DIMENSION, generator=generator)

    return make


def huge_coordinate(size: float, share: float) -> Callable[[torch.Generator], Tensor]:
    """A share of the keys has one coordinate that is far larger than all others."""

    def make(generator: torch.Generator) -> Tensor:
        keys = torch.randn(ROWS, DIMENSION, generator=generator)
        keys[torch.rand(ROWS, generator=generator) < share, 5] += size
        return keys

    return make


def offset(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, DIMENSION, generator=generator) + 1e5


def copies(generator: torch.Generator) -> Tensor:
    keys = 30 * torch.randn(ROWS, DIMENSION, generator=generator)
    keys[50:200] = keys[:3].repeat(50, 1)
    keys[250:] = keys[:50] + 1e-3 * torch.randn(50, DIMENSION, generator=generator)
    return keys


def all_copies(generator: torch.Generator) -> Tensor:
    return (1e3 * torch.randn(1, DIMENSION, generator=generator)).repeat(ROWS, 1)


def mixed_scales(generator: torch.Generator) -> Tensor:
    scales = 10.0 ** torch.randint(-6, 7, (ROWS, 1), generator=generator)
    return scales * torch.randn(ROWS, DIMENSION, generator=generator)


def scales_by_coordinate(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, DIMENSION, generator=generator) * torch.logspace(-6, 6, DIMENSION)


def tiny_around_far(generator: torch.Generator) -> Tensor:
    """Distances that float64 cannot tell from 0 by the product either."""
    keys = 1e-6 * torch.randn(ROWS, DIMENSION, generator=generator)
    keys[::2, 0] += 2.0**20
    return keys


def tiny(generator: torch.Generator) -> Tensor:
    return 1e-15 * torch.randn(ROWS, DIMENSION, generator=generator)


def drawn(seed: int) -> Callable[[torch.Generator], Tensor]:
    """Clusters, scales, huge coordinates and near copies, as the seed has it."""
    chance = random.Random(seed)

    def make(generator: torch.Generator) -> Tensor:
        keys = torch.randn(ROWS, DIMENSION, generator=generator)
        keys *= 10.0 ** chance.uniform(-8, 3)
        if chance.random() < 0.4:
            keys *= 10.0 ** (chance.uniform(0, 6) * torch.rand(DIMENSION, generator=generator))
        for _ in range(chance.randrange(4)):  # clusters, or one coordinate of some
            some = torch.rand(ROWS, generator=generator) < chance.random()
            place = chance.choice([slice(None), slice(0, 1), slice(5, 7)])
            keys[some, place] += chance.choice([-1, 1]) * 10.0 ** chance.uniform(-3, 12)
        for _ in range(chance.randrange(3)):  # copies, or near ones
            begin, count = chance.randrange(ROWS - 100), chance.randrange(100)
            noise = chance.choice([0.0, 10.0 ** chance.uniform(-9, -1)])
            factors = 1 + noise * torch.randn(count, DIMENSION, generator=generator)
            keys[begin : begin + count] = keys[chance.randrange(ROWS)] * factors
        return keys

    return make


FAMILIES = {
    **{f"drawn {seed}": drawn(seed) for seed in range(12)},
    "tiny": tiny,
    **{f"clusters {distance:g}": clusters(distance) for distance in (1e2, 1e3, 1e4, 1e5, 1e6)},
    **{
        f"coordinate {size:g} {share}": huge_coordinate(size, share)
        for size in (1e3, 1e6, 1e12)
        for share in (0.02, 0.5, 1.0)
    },
    "largest": lambda generator: clusters(1e17)(generator).clamp(max=1.5e17),
    "offset": offset,
    "copies": copies,
    "all copies": all_copies,
    "mixed scales": mixed_scales,
    "scales by coordinate": scales_by_coordinate,
    "tiny around far": tiny_around_far,
}


def assert_exact(found: Neighbors, true: Tensor, k: int) -> None:
    """Distances and the set of neighbors are right, up to ties within the tolerance."""
    live = int(true[0].isfinite().sum()) if len(true) else 0
    count = min(k, live)
    assert bool((found.rows[:, count:] == -1).all())
    assert bool(found.squared_distances[:, count:].isposinf().all())
    rows, distances = found.rows[:, :count], found.squared_distances[:, :count].double()
    assert bool((rows >= 0).all())
    assert bool((rows.sort(dim=1).values.diff(dim=1) != 0).all()), "no entry twice"
    assert bool((distances.diff(dim=1) >= 0).all())
    torch.testing.assert_close(distances, true.gather(1, rows), rtol=TOLERANCE, atol=0.0)
    nearest = true.topk(count, dim=1, largest=False).values
    torch.testing.assert_close(distances, nearest, rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_distance_is_within_the_bound(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "_WIDENED_ROWS", 64)
    monkeypatch.setattr(exact, "_RESIDENT_QUERIES", 50)
    monkeypatch.setattr(exact, "_PAIRED_NUMBERS", 1000)
    generator = torch.Generator().manual_seed(len(family))
    keys = FAMILIES[family](generator).to(dtype)
    if not bool(keys.isfinite().all()):
        pytest.skip("the dtype cannot hold such keys")
    store = store_of(tmp_path / "s", keys)
    stored = keys[torch.randint(ROWS, (60,), generator=generator)].float()
    nearby = stored + stored.abs() * 1e-3 * torch.randn(60, DIMENSION, generator=generator)
    others = FAMILIES[family](generator)[:60]
    queries = torch.cat([stored, nearby, others])
    for forgotten in ([], ["d1", "d7"]):
        store.forget(forgotten)
        true = (queries.double()[:, None] - keys.double()).square().sum(dim=-1)
        true = true.masked_fill(~store.alive, torch.inf)
        for resident_bytes in (exact.RESIDENT_BYTES, 0):
            index = ExactIndex(store, resident_bytes=resident_bytes)
            for k in (1, 2, 60, ROWS):
                assert_exact(index.search(queries, k), true, k)


def test_ordinary_keys_need_no_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for other queries, nor for stored keys with many copies."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(ROWS, DIMENSION, generator=generator)
    keys[100:120] = keys[0]
    index = ExactIndex(store_of(tmp_path / "s", keys))
    monkeypatch.setattr(exact, "_WIDENED_ROWS", "not needed")
    index.search(torch.randn(100, DIMENSION, generator=generator), 30)
    for k in (1, 20, 21, 22, ROWS):
        assert float(index.search(keys, k).squared_distances[0].min()) == 0.0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_torch_rounds(tmp_path: Path, precision: str) -> None:
    """Some processors have products of bfloat16 or TF32, which are in error by 1e-3."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(ROWS * 10, 256, generator=generator)
    queries = torch.randn(100, 256, generator=generator)
    index = ExactIndex(store_of(tmp_path / "s", keys))
    torch.set_float32_matmul_precision(precision)
    try:
        found = index.search(queries, 20)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.squared_distances.dtype == torch.float32
    assert_exact(found, (queries.double()[:, None] - keys.double()).square().sum(dim=-1), 20)


@pytest.mark.parametrize("bad", [3e18, 1e19, 3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("resident_bytes", [exact.RESIDENT_BYTES, 0])
def test_keys_that_cannot_be_measured(tmp_path: Path, bad: float, resident_bytes: int) -> None:
    keys = torch.randn(ROWS, DIMENSION, generator=torch.Generator().manual_seed(0))
    keys[41, 3] = bad
    store = store_of(tmp_path / "s", keys)
    index = ExactIndex(store, resident_bytes=resident_bytes)
    why = "longer than 1e+18" if abs(bad) < torch.inf else "not finite"
    with refusal(DatastoreCorruptError, "the key of row 41, in document 'd1', is " + why, "forget"):
        index.search(keys[:2], 3)
    store.forget(["d1"])
    queries = keys[:20]
    true = (queries.double()[:, None] - keys.double()).square().sum(dim=-1)
    assert_exact(index.search(queries, 5), true.masked_fill(~store.alive, torch.inf), 5)


def test_what_can_be_measured() -> None:
    longest = torch.zeros(5, 4)
    longest[:, 0] = torch.tensor([0.0, MAX_NORM, 1.01 * MAX_NORM, torch.inf, torch.nan])
    assert measurable(longest).tolist() == [True, True, False, False, False]
    assert measurable(torch.full((1, 3), 6e4).half()).tolist() == [True]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_recall_of_exact_search_is_1_and_that_of_other_entries_is_not(
    tmp_path: Path, scale: float
) -> None:
    """Among copies and near copies too, and whatever the scale of the keys."""
    generator = torch.Generator().manual_seed(3)
    keys = scale * copies(generator)
    index = ExactIndex(store_of(tmp_path / "s", keys))
    queries = keys[::5] + scale * 1e-2 * torch.randn(60, DIMENSION, generator=generator)
    true = (queries.double()[:, None] - keys.double()).square().sum(dim=-1)
    for k in (1, 10, 40):
        truth = index.search(queries, k)
        # the highest rows of equals, where exact search may return others
        distances, columns = true.flip(1).sort(dim=1, stable=True)
        best = Neighbors(distances[:, :k].float(), ROWS - 1 - columns[:, :k])
        assert measure._recall(best, truth) == 1.0
        worst = Neighbors(distances[:, -k:].float(), ROWS - 1 - columns[:, -k:])
        assert measure._recall(worst, truth) == 0.0
