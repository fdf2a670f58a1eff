"""A share's searcher, the merging of shares and the copy that actors read: without Ray."""

from pathlib import Path

import numpy as np
import pytest
import torch
from index_contract import append, assert_neighbors, clustered, store_of

from knnlm.choices import IndexKind
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreNotFoundError, InvalidArgumentError
from knnlm.index.cluster.copying import update_copy
from knnlm.index.cluster.merging import merge_shares
from knnlm.index.cluster.messages import Nearest
from knnlm.index.cluster.scoring import search_share
from knnlm.index.cluster.searcher import ShareSearcher
from knnlm.index.cluster.states import state_of
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.policy import build_index, open_index
from knnlm.index.protocol import Neighbors
from knnlm.index.share import Share

SHARES = 3
KINDS = [IndexKind.exact, IndexKind.ivf, IndexKind.compressed]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Datastore:
    path = tmp_path / "store"
    build_index(store_of(path, clustered(3000).half()), request.param, k=20)
    return Datastore(path)


def searchers(store: Datastore, copy_to: Path | None = None) -> list[ShareSearcher]:
    return [ShareSearcher(store.path, Share(n, SHARES), copy_to) for n in range(SHARES)]


def search_shares(
    shares: list[ShareSearcher], store: Datastore, queries: torch.Tensor, k: int
) -> Neighbors:
    """Search as a cluster does; every share must hold the state of `store`."""
    opened = [share.opened(state_of(store)) for share in shares]
    assert sum(held.entries or 0 for held, _ in opened) == len(store)
    found = [search_share(index, queries, k) for _, index in opened if index is not None]
    return merge_shares(found, k, 1.0)


def assert_as_in_process(store: Datastore, shares: list[ShareSearcher], count: int) -> None:
    """Check that the shares answer as one process does that searches the same index."""
    queries = clustered(count, seed=count)
    index = open_index(store)
    expected = index.search(queries, 30)
    found = search_shares(shares, store, queries, 30)
    assert torch.equal(found.rows, expected.rows)
    if isinstance(index, IVFIndex):
        assert torch.equal(found.squared_distances, expected.squared_distances)
    else:  # a product's rounding depends on the other keys
        assert_neighbors(store, queries, 30, found, 1.0)


@pytest.mark.parametrize("count", [1, 100])
def test_shares_answer_as_one_index(store: Datastore, count: int) -> None:
    assert_as_in_process(store, searchers(store), count)


@pytest.mark.parametrize("kind", [IndexKind.ivf, IndexKind.compressed])
def test_a_few_queries_get_the_neighbors_of_one_index_to_the_bit(
    kind: IndexKind, tmp_path: Path
) -> None:
    # coarse keys: many are equally far, and codes rank the others badly
    keys = torch.cat([clustered(700, seed=seed).mul(0.4).round() for seed in (0, 1, 0)])
    store = store_of(tmp_path / "store", keys.half())
    build_index(store, kind, k=20, recall=0.8)
    append(store.path, keys[500:1500].half(), 2, "new")
    store.refresh()
    queries = clustered(8, seed=5).mul(0.4)
    shares = searchers(store)
    for some in (queries, queries[:1]):
        expected = open_index(store).search(some, 100)
        found = search_shares(shares, store, some, 100)
        assert torch.equal(found.squared_distances, expected.squared_distances)
        assert torch.equal(found.rows, expected.rows)
        assert not expected.squared_distances.diff(dim=1).all()


def test_shares_hold_about_as_much_and_nothing_twice(store: Datastore) -> None:
    entries = [share.hold().entries for share in searchers(store)]
    assert sum(count or 0 for count in entries) == 3000
    assert all(800 < (count or 0) < 1200 for count in entries)


def test_more_shares_than_lists_or_entries(tmp_path: Path) -> None:
    for kind in KINDS:
        store = store_of(tmp_path / kind, clustered(9).half())
        build_index(store, kind, k=2)
        store = Datastore(store.path)
        shares = [ShareSearcher(store.path, Share(n, 11)) for n in range(11)]
        queries = clustered(2, seed=3)
        assert_neighbors(store, queries, 12, search_shares(shares, store, queries, 12), 1.0)


def test_changes_are_followed_and_the_last_state_stays(store: Datastore) -> None:
    shares = searchers(store)
    queries = clustered(5, seed=5)
    before = search_shares(shares, store, queries, 10)
    append(store.path, clustered(400, seed=8).half(), 2, "new")
    Datastore(store.path).forget(["d2", "d7"])
    changed = Datastore(store.path)
    assert_as_in_process(changed, shares, 40)
    assert torch.equal(search_shares(shares, store, queries, 10).rows, before.rows)
    changed.forget(["d3"])
    assert_as_in_process(changed, shares, 40)
    (share, *_) = shares
    assert share.opened(state_of(store)) == ((state_of(changed), None), None)


def test_a_compaction_is_followed_before_and_after_the_index_is_built(store: Datastore) -> None:
    shares = searchers(store)
    shares[0].hold()
    store.forget(["d1"])
    compact(store)
    for kind in ("exact", "ivf"):
        opened = Datastore(store.path)
        queries = clustered(30, seed=4)
        assert_neighbors(opened, queries, 20, search_shares(shares, opened, queries, 20), 1.0)
        build_index(opened, kind, k=20, recall=1.0)


def test_an_index_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", clustered(500).half())
    build_index(store, "faiss", factory="IVF4,Flat", k=5)
    with pytest.raises(InvalidArgumentError, match="kind ivf, compressed or exact, got kind faiss"):
        ShareSearcher(store.path, Share(0, 2)).hold()


def test_a_share_is_one_of_those_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match="share must be at most 1, got 2"):
        Share(2, 2)
    with pytest.raises(InvalidArgumentError, match="shares must be at least 1"):
        Share(0, 0)


def test_equal_distances_are_in_the_order_of_rows() -> None:
    inf = np.float32(np.inf)
    one = Nearest(np.array([[5, 9, 1], [4, -1, -1]]),
                  np.array([[1.0, 2.0, 2.0], [1.0, inf, inf]], np.float32))  # fmt: skip
    other = Nearest(np.array([[8, 3, 0], [2, 0, -1]]),
                    np.array([[0.5, 2.0, 2.0], [1.0, 3.0, inf]], np.float32))  # fmt: skip
    for answers in ([one, other], [other, one]):
        merged = merge_shares(answers, 3, 0.5)
        assert merged.rows.tolist() == [[8, 5, 0], [2, 4, 0]]
        assert merged.squared_distances.tolist() == [[0.5, 1.0, 2.0], [1.0, 1.0, 3.0]]
        assert merged.coverage == 0.5
        assert merge_shares(answers, 5, 1.0).rows.tolist() == [[8, 5, 0, 1, 3], [2, 4, 0, -1, -1]]


def test_a_copy_follows_the_original(store: Datastore, tmp_path: Path) -> None:
    copy = tmp_path / "local" / "copy"
    shares = searchers(store, copy)
    assert_as_in_process(store, shares, 3)
    copied = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    append(store.path, clustered(100, seed=8).half(), 1, "new")
    changed = Datastore(store.path)
    assert_as_in_process(changed, shares, 3)
    assert {path: path.stat().st_mtime_ns for path in copied} == copied  # not copied again
    build_index(changed, "ivf", k=20, seed=3)
    assert_as_in_process(Datastore(store.path), shares, 3)
    assert state_of(Datastore(copy)) == state_of(Datastore(store.path))
    assert not Datastore(copy).catalog.problems()


def test_no_copy_replaces_the_original_or_comes_from_nothing(
    store: Datastore, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match="another folder"):
        update_copy(store.path, store.path / ".." / store.path.name)
    with pytest.raises(DatastoreNotFoundError):
        update_copy(tmp_path / "nothing", tmp_path / "copy")
