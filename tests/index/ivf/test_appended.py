"""Rows appended to an indexed datastore: written once, correct whatever a crash leaves."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_contract import append, assert_neighbors, clustered, store_of
from stores import small_disk

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import FOLDER, stored_index
from knnlm.datastore.verification import verify
from knnlm.errors import DatastoreCorruptError, DatastoreWriteError
from knnlm.index import policy
from knnlm.index.ivf.index import FILE_NAME, IVFIndex
from knnlm.index.ivf.records import Recorder
from knnlm.index.policy import build_index, keep_index

QUERIES = clustered(60, seed=1)


@pytest.fixture(params=["ivf", "compressed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Datastore:
    store = store_of(tmp_path / "store", clustered(6000).half())
    build_index(store, request.param, recall=0.99, k=32)
    return store


def grow(store: Datastore, rows: int, name: str) -> None:
    append(store.path, clustered(rows, seed=rows).half() + 0.25, 2, name)
    store.refresh()


def files(store: Datastore) -> list[str]:
    return sorted(path.name for path in (store.path / FOLDER).iterdir())


def run_name(first: int, stop: int) -> str:
    return f"ivf-{first:012d}-{stop:012d}.safetensors"


@pytest.fixture
def refuse_coding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse() -> None:
        def fail(*arguments: object) -> None:
            raise AssertionError("rows were coded")

        monkeypatch.setattr(Recorder, "records", fail)

    return refuse


def assert_right(store: Datastore, index: IVFIndex) -> None:
    found = index.search(QUERIES, 40)
    assert bool((found.rows >= 6000).any())
    assert_neighbors(store, QUERIES, 40, found, 0.93)
    one = index.search(QUERIES[:1], 40)
    assert torch.equal(one.rows, found.rows[:1])


def test_what_was_written_is_not_coded_at_opening(
    store: Datastore, refuse_coding: Callable[[], None]
) -> None:
    before = (store.path / FOLDER / FILE_NAME).read_bytes()
    grow(store, 500, "new")
    in_memory = IVFIndex(store).search(QUERIES, 40)
    keep_index(store)
    assert files(store) == [run_name(6000, 6500), FILE_NAME]
    assert (store.path / FOLDER / FILE_NAME).read_bytes() == before
    refuse_coding()
    opened = IVFIndex(Datastore(store.path))
    assert_right(store, opened)
    assert torch.equal(opened.search(QUERIES, 40).rows, in_memory.rows)
    keep_index(store)  # nothing is new
    grow(store, 3, "unwritten")
    with pytest.raises(AssertionError, match="rows were coded"):
        IVFIndex(Datastore(store.path))


def test_short_runs_are_gathered_and_long_ones_left(store: Datastore) -> None:
    for rows, expected in [
        (900, [(6000, 6900)]),
        (50, [(6000, 6900), (6900, 6950)]),
        (10, [(6000, 6900), (6900, 6960)]),
        (100, [(6000, 7060)]),
    ]:
        grow(store, rows, f"new{rows}")
        keep_index(store)
        assert files(store) == [*(run_name(*run) for run in expected), FILE_NAME]
        assert_right(store, IVFIndex(Datastore(store.path)))


def test_a_reader_of_an_older_state_answers_from_it(store: Datastore) -> None:
    grow(store, 500, "new")
    older = Datastore(store.path)
    keep_index(store)
    grow(store, 400, "newer")
    keep_index(store)
    assert files(store) == [run_name(6000, 6900), FILE_NAME]
    found = IVFIndex(older).search(QUERIES, 40)
    assert int(found.rows.max()) < 6500
    assert_neighbors(older, QUERIES, 40, found, 0.93)


def test_rows_forgotten_after_they_were_written_are_not_found(store: Datastore) -> None:
    grow(store, 500, "new")
    keep_index(store)
    store.forget(["new0"])
    found = IVFIndex(Datastore(store.path)).search(QUERIES, 40)
    assert bool(store.alive[found.rows].all())
    assert_neighbors(store, QUERIES, 40, found, 0.93)


def die(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_crash_before_the_file_has_its_name(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(store, 500, "new")
    keep_index(store)
    grow(store, 100, "newer")

    with monkeypatch.context() as patched:
        patched.setattr("knnlm.index.ivf.file.publish", die)
        # what a kill leaves: no clean-up runs
        patched.setattr(Path, "unlink", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            keep_index(store)
    assert any(name.endswith(".part") for name in files(store))
    assert_right(store, IVFIndex(Datastore(store.path)))
    grow(store, 5, "newest")
    keep_index(store)
    assert files(store) == [run_name(6000, 6605), FILE_NAME]
    assert_right(store, IVFIndex(Datastore(store.path)))


def test_a_crash_before_the_replaced_files_are_gone(
    store: Datastore, monkeypatch: pytest.MonkeyPatch, refuse_coding: Callable[[], None]
) -> None:
    grow(store, 500, "new")
    keep_index(store)
    grow(store, 100, "newer")

    with monkeypatch.context() as patched:
        patched.setattr(policy, "remove_strays", die)
        with pytest.raises(KeyboardInterrupt):
            keep_index(store)
    assert files(store) == [run_name(6000, 6500), run_name(6000, 6600), FILE_NAME]
    refuse_coding()
    assert_right(store, IVFIndex(Datastore(store.path)))
    keep_index(store)
    assert files(store) == [run_name(6000, 6600), FILE_NAME]
    assert verify(store).problems == ()


def test_a_file_of_another_index_is_not_taken(store: Datastore, tmp_path: Path) -> None:
    other = store_of(tmp_path / "other", clustered(6000).half())
    build_index(other, stored_index(store.catalog).kind, recall=0.99, k=32, seed=5)
    grow(store, 500, "new")
    keep_index(store)
    foreign = (store.path / FOLDER / run_name(6000, 6500)).read_bytes()
    shutil.copy(other.path / FOLDER / FILE_NAME, store.path / FOLDER / FILE_NAME)
    with pytest.raises(DatastoreCorruptError, match="knnlm index"):
        IVFIndex(Datastore(store.path))
    keep_index(store)
    assert_right(store, IVFIndex(Datastore(store.path)))
    grow(store, 500, "newer")
    keep_index(store)
    (run,) = (store.path / FOLDER).glob("ivf-*-*.safetensors")
    run.write_bytes(foreign)
    with pytest.raises(DatastoreCorruptError, match="knnlm index"):
        IVFIndex(Datastore(store.path))


def test_building_anew_leaves_one_file(store: Datastore) -> None:
    grow(store, 500, "new")
    keep_index(store)
    grow(store, 1500, "many")
    keep_index(store)
    assert files(store) == ["ivf-2.safetensors"], "the other name was in use"
    assert IVFIndex(store).report.rows == 8000


def test_a_damaged_file_is_reported(store: Datastore) -> None:
    grow(store, 500, "new")
    keep_index(store)
    path = store.path / FOLDER / run_name(6000, 6500)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatastoreCorruptError, match="knnlm index"):
        IVFIndex(Datastore(store.path))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2400) as disk:
        store = store_of(disk.path / "store", clustered(6000).half())
        build_index(store, "ivf", recall=0.99, k=32)
        grow(store, 700, "new")
        filler = disk.fill()
        with pytest.raises(DatastoreWriteError, match="the disk is full"):
            keep_index(store)
        assert files(store) == [FILE_NAME]
        filler.unlink()
        assert_right(store, IVFIndex(Datastore(store.path)))
