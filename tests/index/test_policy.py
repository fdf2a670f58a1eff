"""The choice of an index, its upkeep, and what is told of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from index_contract import append, assert_neighbors, clustered, store_of

from knnlm.choices import IndexKind
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index import policy
from knnlm.index.available_memory import memory_bytes
from knnlm.index.backend import Backend
from knnlm.index.exact import ExactIndex
from knnlm.index.faiss import FaissIndex
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.protocol import Index
from knnlm.index.report import describe_index

pytest.importorskip("faiss")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Datastore:
    monkeypatch.setattr(policy, "EXACT_UP_TO", 4000)
    return store_of(tmp_path / "store", clustered(6000).half())


def test_auto_is_exact_then_ivf_then_compressed(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert policy.choose_kind(store) == "ivf"
    copy_bytes = 6000 * 24 * 2
    monkeypatch.setattr(policy, "memory_bytes", lambda: 2 * copy_bytes)
    assert policy.choose_kind(store) == "ivf"
    monkeypatch.setattr(policy, "memory_bytes", lambda: 2 * copy_bytes - 1)
    assert policy.choose_kind(store) == "compressed"
    monkeypatch.setattr(policy, "EXACT_UP_TO", 6000)
    assert policy.choose_kind(store) == "exact"


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "5000", "a/b/memory.max": "max"}, 5000),
        ("0::/a/b", {"unified/a/b/memory.max": "300", "unified/a/memory.max": "400"}, 300),
        ("3:cpu:/x\n4:memory:/x", {"memory/x/memory.limit_in_bytes": "700"}, 700),
        ("4:memory:/of/the/host", {"memory/memory.limit_in_bytes": "800"}, 800),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/", {}, None),
        (None, {}, None),
    ],
)
def test_memory_is_what_the_control_groups_leave(
    tmp_path: Path, groups: str | None, limits: dict[str, str], expected: int | None
) -> None:
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(limit + "\n")
    proc = tmp_path / "cgroup"
    if groups is not None:
        proc.write_text(groups + "\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(proc, tmp_path) == (machine if expected is None else expected)


@pytest.mark.parametrize(
    ("kind", "factory", "expected"),
    [
        ("exact", None, ExactIndex),
        ("auto", None, IVFIndex),
        ("ivf", None, IVFIndex),
        ("compressed", None, IVFIndex),
        ("faiss", "IVF16,Flat", FaissIndex),
    ],
)
def test_what_was_built_is_opened(
    store: Datastore, kind: str, factory: str | None, expected: type
) -> None:
    assert isinstance(policy.open_index(store), ExactIndex)
    policy.build_index(store, kind, factory=factory, k=32)
    index = policy.open_index(Datastore(store.path))
    assert isinstance(index, expected)
    queries = clustered(100, seed=1)
    assert_neighbors(store, queries, 32, index.search(queries, 32), 0.9)
    facts = describe_index(store.catalog)
    assert facts["kind"] == {"auto": "ivf"}.get(kind, kind)
    assert 0.95 <= facts["recall"] <= 1.0
    policy.build_index(store, "exact")
    assert isinstance(policy.open_index(store), ExactIndex)


def test_an_index_is_kept_while_it_fits(store: Datastore) -> None:
    policy.keep_index(store)
    assert describe_index(store.catalog)["entries"] == 6000
    append(store.path, clustered(600, seed=2).half(), 1, "few")
    store.refresh()
    policy.keep_index(store)
    assert describe_index(store.catalog)["entries"] == 6000, "appended rows are searched beside it"
    append(store.path, clustered(1000, seed=3).half(), 1, "many")
    store.refresh()
    policy.keep_index(store)
    assert describe_index(store.catalog)["entries"] == 7600


@pytest.mark.parametrize(("kind", "factory"), [("auto", None), ("faiss", "IVF16,Flat")])
def test_a_compaction_leaves_an_index_behind_until_it_is_built_anew(
    store: Datastore, kind: str, factory: str | None
) -> None:
    policy.build_index(store, kind, factory=factory, k=32)
    store.forget(["d0"])
    compact(store)
    queries = clustered(50, seed=4)
    for opened in (store, Datastore(store.path)):
        index = policy.open_index(opened)
        assert isinstance(index, ExactIndex)
        assert_neighbors(store, queries, 16, index.search(queries, 16), 1.0)
    assert describe_index(store.catalog) == {"kind": "exact", "recall": 1.0}
    policy.keep_index(store)
    assert describe_index(store.catalog)["entries"] == 5400
    found = policy.open_index(store).search(queries, 16)
    assert_neighbors(store, queries, 16, found, 0.9)


@pytest.mark.parametrize("kind", policy.BACKENDS)
def test_a_backend_builds_reports_opens_and_keeps(store: Datastore, kind: IndexKind) -> None:
    backend = policy.BACKENDS[kind]
    assert isinstance(backend, Backend)
    factory = "IVF16,Flat" if backend.takes_factory else None
    queries = clustered(100, seed=1)
    built = policy.build_index(store, kind, factory=factory, k=32, recall=0.99)
    assert isinstance(built, Index)
    report = describe_index(store.catalog)
    assert json.loads(json.dumps(report)) == report, "plain values"
    exact = kind is not IndexKind.codes
    assert (0.95 if exact else 0.85) <= report["recall"] <= 1.0
    expected = built.search(queries, 16)
    opened = backend.open(Datastore(store.path), "cpu").search(queries, 16)
    assert torch.equal(opened.rows, expected.rows)
    assert torch.equal(opened.squared_distances, expected.squared_distances)

    def keep() -> dict[str, Any]:
        store.refresh()
        policy.keep_index(store)
        index = backend.open(Datastore(store.path), "cpu")
        found, recall = index.search(queries, 16), 0.9 if exact else 0.8
        assert_neighbors(store, queries, 16, found, recall, exact_distances=exact)
        return describe_index(store.catalog)

    assert keep() == report, "nothing had changed"
    append(store.path, clustered(300, seed=2).half(), 1, "few")
    assert keep() == report, "appended rows need no building"
    append(store.path, clustered(3000, seed=3).half(), 1, "many")
    keep()
    store.forget(["d0"])
    compact(store)
    assert keep().get("entries", store.rows) == store.rows


def test_there_is_a_backend_for_every_kind() -> None:
    assert {*policy.BACKENDS, IndexKind.auto} == {*IndexKind}


def test_a_small_datastore_gets_no_index(store: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "EXACT_UP_TO", 10_000)
    policy.keep_index(store)
    assert describe_index(store.catalog) == {"kind": "exact", "recall": 1.0}
    assert not (store.path / "index").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "hnsw"},
            "kind must be one of auto, exact, ivf, compressed, codes, faiss, got 'hnsw'",
        ),
        ({"kind": "faiss"}, "factory goes with kind faiss and only with it"),
        ({"kind": "ivf", "factory": "Flat"}, "factory goes with kind faiss and only with it"),
        ({"recall": 0.0}, "recall must be above 0 and at most 1, got 0.0"),
        ({"recall": 1.5}, "recall must be above 0 and at most 1, got 1.5"),
    ],
)
def test_refusals(store: Datastore, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        policy.build_index(store, **arguments)  # type: ignore[arg-type]


def test_a_path_is_as_good_as_the_datastore(store: Datastore) -> None:
    policy.build_index(store.path, "ivf", k=32)
    policy.keep_index(str(store.path))
    queries = clustered(20, seed=1)
    opened = policy.open_index(store.path).search(queries, 8)
    assert torch.equal(opened.rows, policy.open_index(store).search(queries, 8).rows)
