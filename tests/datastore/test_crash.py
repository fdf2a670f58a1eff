"""SIGKILL anywhere, a full disk, a second writer: nothing that was committed is ever lost.

Work that is to be killed runs in a fork of the test process, which has everything imported.
"""

import multiprocessing
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from kills import PLACES, ends_by_kill, in_child, kill_after, kill_inside_sqlite
from stores import assert_same, contents, distinct_documents, small_disk, stored_keys

from knnlm.datastore.append import append_documents
from knnlm.datastore.catalog import SHARDS
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import PATIENCE_S, writer_lock
from knnlm.datastore.tables import FILE_NAME
from knnlm.datastore.verification import verify
from knnlm.errors import DatastoreLockedError, DatastoreWriteError
from knnlm.index.exact import ExactIndex
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.progress import Advance
from knnlm.text.documents import Document

# newer Pythons warn of forks beside threads; ours use no thread pool
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

DOCUMENTS = distinct_documents(60)
ARGUMENTS: dict[str, Any] = {"window": 64, "context": 16, "shard_rows": 400}
KILLS = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_lm: LanguageModel) -> Datastore:
    """Return an uninterrupted build."""
    path = tmp_path_factory.mktemp("crash") / "whole"
    return append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS)


def damage(store: Datastore) -> list[str]:
    """Return the problems that are more than files which a killed writer left."""
    stray = "does not belong to the datastore; the next change of the datastore removes it"
    return [problem for problem in verify(store).problems if not problem.endswith(stray)]


def check_sound(path: Path, whole: Datastore) -> int:
    """Check that what a killed build left opens, verifies and is how the whole begins; its rows."""
    if not (path / FILE_NAME).exists():
        return 0
    store = Datastore(path)
    assert damage(store) == []
    assert torch.equal(store.values, whole.values[: store.rows])
    assert torch.equal(store.keys_at(torch.arange(store.rows)), stored_keys(whole)[: store.rows])
    rows = store.rows
    store.close()
    return rows


def test_thirty_kills_at_random_moments(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore
) -> None:
    def build_it() -> None:
        append_documents(tmp_path / "store", llama_lm, DOCUMENTS, **ARGUMENTS)

    started = time.perf_counter()
    assert not ends_by_kill(build_it)
    seconds = time.perf_counter() - started
    assert_same(Datastore(tmp_path / "store"), whole)
    shutil.rmtree(tmp_path / "store")

    chance = random.Random(0)
    kills = partly = finished = 0
    while kills < KILLS:
        child = in_child(build_it)
        child.join(chance.uniform(0, seconds))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it was faster: start over
            assert_same(Datastore(tmp_path / "store"), whole)
            shutil.rmtree(tmp_path / "store")
            finished += 1
        else:
            assert child.exitcode == -signal.SIGKILL
            kills += 1
            partly += 0 < check_sound(tmp_path / "store", whole) < whole.rows
    build_it()
    assert_same(Datastore(tmp_path / "store"), whole)
    assert verify(Datastore(tmp_path / "store")).problems == ()
    assert partly >= KILLS // 3, f"the kills came too early or too late: {finished} ended first"


# killed at the places that matter


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("place", PLACES)
def test_a_build_killed_where_it_matters_goes_on(
    tmp_path: Path, llama_lm: LanguageModel, place: str, count: int
) -> None:
    documents = DOCUMENTS[:30]
    path = tmp_path / "store"

    def killed() -> None:
        PLACES[place](count)
        append_documents(path, llama_lm, documents, **ARGUMENTS)

    whole = append_documents(tmp_path / "whole", llama_lm, documents, **ARGUMENTS)
    assert len(whole.shards) > 9, "as many as the last kill needs"
    assert ends_by_kill(killed)
    rows = check_sound(path, whole)
    if place == "after commit":
        assert rows == whole.shards[count - 1].stop
    elif place == "before commit":
        assert rows == whole.shards[count - 1].start
    assert_same(append_documents(path, llama_lm, documents, **ARGUMENTS), whole)
    assert verify(Datastore(path)).problems == ()
    left = {file.name for file in (path / SHARDS).iterdir()}
    assert left == {shard.file.name for shard in Datastore(path).shards}
    assert not list(path.glob("catalog*-journal"))
    assert not list(path.glob("*.part*"))


def test_a_build_killed_inside_sqlite_goes_on(tmp_path: Path, llama_lm: LanguageModel) -> None:
    documents = DOCUMENTS[:6]
    arguments: dict[str, Any] = {"window": 64, "context": 16, "shard_rows": 100}
    whole = append_documents(tmp_path / "whole", llama_lm, documents, **arguments)
    path = tmp_path / "store"
    chance = random.Random(0)
    journals = uncreated = 0
    # SQLite makes the catalog in its first 403 instructions and is done after 6,313
    for instructions in [*chance.sample(range(1, 400), 8), *chance.sample(range(420, 6000), 12)]:
        shutil.rmtree(path, ignore_errors=True)

        def killed(instructions: int = instructions) -> None:
            kill_inside_sqlite(instructions)
            append_documents(path, llama_lm, documents, **arguments)

        assert ends_by_kill(killed)
        journals += bool(list(path.glob("catalog*-journal")))
        uncreated += not (path / FILE_NAME).exists()
        check_sound(path, whole)
        assert_same(append_documents(path, llama_lm, documents, **arguments), whole)
        assert not list(path.glob("catalog*-journal"))
    assert journals > 0, "some kill must leave a journal to roll back"
    assert uncreated > 0, "some kill must come before the datastore is there"


@pytest.mark.parametrize(
    ("place", "count", "done"),
    [
        ("before fsync", 1, False),
        ("before rename", 1, False),
        ("before rename", 3, False),
        ("after rename", 1, False),
        ("after rename", 3, False),
        ("before commit", 1, False),
        ("after commit", 1, True),
        ("between removals", 1, True),
        ("between removals", 2, True),
    ],
)
def test_a_killed_compact_left_the_old_state_or_the_new(
    tmp_path: Path, whole: Datastore, place: str, count: int, done: bool
) -> None:
    names = ["d1", "d2", "d17", "d4?"]
    for name in ("store", "old", "new"):
        store = Datastore(shutil.copytree(whole.path, tmp_path / name))
        store.forget(names)
    old, new = Datastore(tmp_path / "old"), Datastore(tmp_path / "new")
    compact(new)
    store = Datastore(tmp_path / "store")

    def killed() -> None:
        if place == "between removals":
            kill_after(Path, "unlink", count)
        else:
            PLACES[place](count)
        compact(Datastore(store.path))

    assert ends_by_kill(killed)
    left = Datastore(store.path)
    assert damage(left) == []
    assert_same(left, new if done else old)
    assert left.forgotten_rows == (0 if done else old.forgotten_rows)

    compact(left)
    assert_same(left, new)
    assert verify(left).problems == ()
    files = {file.name for file in (left.path / SHARDS).iterdir()}
    assert files == {shard.file.name for shard in left.shards}


@pytest.mark.parametrize(
    ("place", "count"),
    # SQLite opens the datastore in 1,399 instructions and forgets in 4,049 more
    [
        ("before commit", 1),
        ("after commit", 1),
        *(("inside SQLite", 1400 + n) for n in range(0, 3600, 600)),
    ],
)
def test_a_killed_forget_happened_or_not(
    tmp_path: Path, whole: Datastore, place: str, count: int
) -> None:
    store = Datastore(shutil.copytree(whole.path, tmp_path / "store"))

    def killed() -> None:
        if place == "inside SQLite":
            kill_inside_sqlite(count)
        else:
            PLACES[place](count)
        Datastore(store.path).forget(["d1*"])

    assert ends_by_kill(killed)
    left = Datastore(store.path)
    assert verify(left).problems == ()
    everything = [d.name for d in whole.documents()]
    some = [name for name in everything if not name.startswith("d1")]
    done = [d.name for d in left.documents()] != everything
    assert [d.name for d in left.documents()] == (some if done else everything)
    assert (left.forgotten_rows > 0) == done
    if place != "inside SQLite":
        assert done == (place == "after commit")


@pytest.mark.parametrize("place", ["before rename", "before commit"])
def test_what_a_killed_build_left_goes_with_the_next_change(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, place: str
) -> None:
    store = Datastore(shutil.copytree(whole.path, tmp_path / "store"))
    known = {shard.file.name for shard in store.shards}

    def killed() -> None:
        PLACES[place](1)
        append_documents(store.path, llama_lm, [Document("new", "A new document.")])

    assert ends_by_kill(killed)
    strays = {file.name for file in (store.path / SHARDS).iterdir()} - known
    problems = verify(store).problems
    assert len(strays) == len(problems) == 1
    assert f"{strays.pop()}: does not belong to the datastore" in problems[0]
    store.save_parameters(Parameters(), {})
    assert {file.name for file in (store.path / SHARDS).iterdir()} == known


# a full disk


@pytest.mark.parametrize(
    ("shard_rows", "full_for"), [(400, FILE_NAME), (2000, SHARDS)], ids=["catalog", "shard"]
)
def test_a_full_disk_ends_a_build_in_one_line_and_loses_nothing(
    tmp_path: Path, llama_lm: LanguageModel, shard_rows: int, full_for: str
) -> None:
    arguments: dict[str, Any] = {**ARGUMENTS, "shard_rows": shard_rows}
    whole = append_documents(tmp_path / "whole", llama_lm, DOCUMENTS, **arguments)
    bytes_needed = sum(file.stat().st_size for file in whole.path.rglob("*") if file.is_file())
    with small_disk(tmp_path / "disk", bytes_needed // 2048) as disk:
        path = disk.path / "store"
        with refusal(DatastoreWriteError, f"cannot write {path / full_for}: the disk is full"):
            append_documents(path, llama_lm, DOCUMENTS, **arguments)
        rows = check_sound(path, whole)
        assert 0 < rows < whole.rows
        assert not list((path / SHARDS).glob("*.part")), "nothing half written fills the disk"
        with refusal(DatastoreWriteError, "the disk is full"):
            append_documents(path, llama_lm, DOCUMENTS, **arguments)
        assert check_sound(path, whole) == rows

        disk.resize(4 * bytes_needed // 1024)
        store = append_documents(path, llama_lm, DOCUMENTS, **arguments)
        assert_same(store, whole)
        assert verify(store).problems == ()
        store.close()


@pytest.mark.parametrize("kibibytes", [4, 16, 48])
def test_a_disk_full_from_the_start_leaves_nothing_behind(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, kibibytes: int
) -> None:
    with small_disk(tmp_path / "disk", kibibytes) as disk:
        path = disk.path / "store"
        with refusal(DatastoreWriteError, "cannot write", "the disk is full"):
            append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS)
        assert list(disk.path.iterdir()) == []
        path.mkdir()
        with refusal(DatastoreWriteError, "cannot write", "the disk is full"):
            append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS)
        disk.resize(8192)
        store = append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS)
        assert_same(store, whole)
        store.close()


def test_a_full_disk_refuses_every_change_and_loses_nothing(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore
) -> None:
    new = [Document("new", "A new document.")]
    with small_disk(tmp_path / "disk", 8192) as disk:
        store = Datastore(shutil.copytree(whole.path, disk.path / "store"))
        store.forget(["d3"])
        store.save_parameters(Parameters(k=3), {"before": True})
        before, generation = contents(store), store.generation
        filler = disk.fill()
        for write in (
            lambda: store.forget(["d1*"]),
            lambda: compact(store),
            lambda: store.save_parameters(Parameters(k=5), {"after": True}),
            lambda: append_documents(store.path, llama_lm, new),
        ):
            with refusal(DatastoreWriteError, "cannot write", "the disk is full"):
                write()
            for opened in (store, Datastore(store.path)):
                assert verify(opened).problems == ()
                assert opened.generation == generation
                assert opened.parameters == Parameters(k=3)
                assert opened.tuning == {"before": True}
                assert contents(opened)[2] == before[2]
                assert torch.equal(opened.values, before[1])
        filler.unlink()
        store.forget(["d1*"])
        compact(store)
        store.save_parameters(Parameters(k=5), {"after": True})
        append_documents(store.path, llama_lm, new).close()
        assert store.refresh()
        assert verify(store).problems == ()
        assert store.documents()[-1].name == "new"
        assert store.parameters == Parameters(k=5)
        store.close()


# two writers


class _Stalls:
    """Progress that reports when rows are committed, and then stands still."""

    def __init__(self, signal_to: Any, after: int) -> None:
        self.signal_to = signal_to
        self.left = after

    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        def advance(amount: float, total: float | None = None, note: str | None = None) -> None:
            self.left -= 1
            if self.left == 0:
                self.signal_to.send(None)
                time.sleep(600)

        yield advance


@contextmanager
def writer_in_another_process(path: Path, work: str, lm: LanguageModel) -> Iterator[BaseProcess]:
    """Have another process write to a datastore until it is killed."""
    here, there = multiprocessing.get_context("fork").Pipe()

    def write() -> None:
        if work == "build":
            append_documents(path, lm, DOCUMENTS, progress=_Stalls(there, 30), **ARGUMENTS)
        elif work == "compact":
            compact(Datastore(path), progress=_Stalls(there, 1))
        else:
            with writer_lock(path):
                there.send(None)
                time.sleep(600)

    child = in_child(write)
    try:
        assert here.poll(30), "the other writer did not begin"
        yield child
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("work", ["lock", "build", "compact"])
def test_a_second_writer_is_refused_at_once_and_readers_are_not(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, work: str
) -> None:
    path = tmp_path / "store"
    if work != "build":
        shutil.copytree(whole.path, path)
        Datastore(path).forget(["d0"])
    with writer_in_another_process(path, work, llama_lm) as child:
        reader = Datastore(path)
        assert 0 < reader.rows <= whole.rows
        assert (reader.rows < whole.rows) == (work == "build")
        before = contents(reader)
        for write in (
            lambda: append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS),
            lambda: reader.forget(["d1"]),
            lambda: compact(reader),
            lambda: reader.save_parameters(Parameters(), {}),
        ):
            started = time.perf_counter()
            with refusal(DatastoreLockedError, str(path), "being written by another process"):
                write()
            assert time.perf_counter() - started < 10

        started = time.perf_counter()
        again = Datastore(path)
        rows = torch.tensor([again.rows - 1])
        found = ExactIndex(again).search(again.keys_at(rows).float(), 1)
        assert float(found.squared_distances) < 1e-3, "a stored key is found"
        assert contents(again)[2] == before[2]
        assert torch.equal(again.values, before[1])
        assert verify(again).problems == ()
        assert time.perf_counter() - started < 2

        child.kill()
        child.join()
        assert [d.name for d in reader.forget(["d1"])] == ["d1"]
    append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS)
    compact(Datastore(path))
    store = Datastore(path)
    assert verify(store).problems == ()
    assert sorted(d.name for d in store.documents()) == sorted(d.name for d in DOCUMENTS)


def test_a_second_writer_in_the_same_process_is_refused(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore
) -> None:
    store = Datastore(shutil.copytree(whole.path, tmp_path / "store"))
    with store.writer():
        with refusal(DatastoreLockedError, "being written"):
            Datastore(store.path).forget(["d1"])
        with refusal(DatastoreLockedError, "being written"):
            append_documents(store.path, llama_lm, DOCUMENTS)
    store.forget(["d1"])


def test_a_writer_waits_for_the_moment_in_which_verify_lists_the_files(
    tmp_path: Path, whole: Datastore
) -> None:
    store = Datastore(shutil.copytree(whole.path, tmp_path / "store"))
    listing, release = threading.Event(), threading.Event()

    def verify_slowly() -> None:
        with writer_lock(store.path):
            listing.set()
            release.wait()

    with ThreadPoolExecutor() as pool:
        other = pool.submit(verify_slowly)
        listing.wait()
        threading.Timer(PATIENCE_S / 4, release.set).start()
        assert [document.name for document in store.forget(["d1"])] == ["d1"]
        other.result()


def test_a_build_that_begins_beside_another_is_refused(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    (tmp_path / "store").mkdir()
    with writer_in_another_process(tmp_path / "store", "lock", llama_lm):
        with refusal(DatastoreLockedError, "being written"):
            append_documents(tmp_path / "store", llama_lm, DOCUMENTS)
        assert not (tmp_path / "store" / FILE_NAME).exists()
    append_documents(tmp_path / "store", llama_lm, DOCUMENTS[:1])
