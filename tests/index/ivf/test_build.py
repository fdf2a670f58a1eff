"""Building an inverted file beyond memory: the same file, wherever the build was interrupted."""

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from index_contract import append, assert_neighbors, clustered, store_of
from kills import killed_at

from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import FOLDER
from knnlm.datastore.unfinished import read_manifest, unfinished_folder
from knnlm.datastore.verification import verify
from knnlm.errors import InvalidArgumentError
from knnlm.index.available_memory import own_memory_bytes
from knnlm.index.backend import IndexOptions
from knnlm.index.ivf import (
    build as ivf_build,
    forecast,
    groups,
    partition,
    parts,
    records,
    training,
)
from knnlm.index.ivf.begun import Begun
from knnlm.index.ivf.groups import Groups, nearest
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.policy import build_index, keep_index, open_index
from knnlm.progress import Advance

OPTIONS: dict[str, Any] = {"nprobe": 4, "k": 8}
QUERIES = clustered(30, seed=1)


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return store_of(tmp_path / "store", clustered(3000).half())


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring records into lists in files, and keep the state often."""
    monkeypatch.setattr(ivf_build, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(ivf_build, "_LEAST_BUCKET_BYTES", 100_000)
    monkeypatch.setattr(partition, "_CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(Begun, "is_saving", False)
    monkeypatch.setattr(records, "_NUMBERS_AT_ONCE", 24 * 1000)


def contents(path: Path) -> bytes:
    (file,) = (path / FOLDER).iterdir()
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]  # the header has measured times


def test_the_file_is_the_same_in_memory_and_through_files(
    store: Datastore, request: pytest.FixtureRequest
) -> None:
    build_index(store, "ivf", **OPTIONS)
    expected = contents(store.path)
    request.getfixturevalue("on_disk")
    build_index(store, "ivf", **OPTIONS)
    assert contents(store.path) == expected


def test_every_list_is_in_random_order(store: Datastore) -> None:
    index = IVFIndex.build(store, IndexOptions(nprobe=1), nlist=2)
    for start, stop in zip(index._base.starts[:-1], index._base.starts[1:], strict=True):
        rows = index._base.rows[start:stop].double()
        places = torch.arange(len(rows)).double()
        correlation = torch.corrcoef(torch.stack([rows, places]))[0, 1]
        assert abs(float(correlation)) < 0.1
        head = rows[: len(rows) // 16]
        assert abs(float(head.mean() - rows.mean())) < 4 * 3000 / 12**0.5 / len(head) ** 0.5


def test_a_build_killed_anywhere_goes_on(
    store: Datastore, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(store, "ivf", **OPTIONS)
    expected = contents(store.path)
    build_index(store, "exact")
    event, placed, coded = 0, set(), set()
    finished = False
    while not finished:
        event += 3  # any number: each of them takes a second
        with killed_at(event, monkeypatch):
            try:
                build_index(store.path, "ivf", **OPTIONS)
                finished = True
            except KeyboardInterrupt:
                pass
        left = Datastore(store.path)
        with monkeypatch.context() as patched:
            if (manifest := read_manifest(store.path)) is not None:
                placed.add(manifest["placed"])
                coded.add(manifest["rows"])
                problems = verify(left).problems
                assert not [line for line in problems if "unfinished" in line], "it is no damage"
                if not list((store.path / FOLDER).glob("ivf*")):  # whole, but perhaps not committed
                    patched.setattr(training, "kmeans", None)  # is not learned again
            build_index(store.path, "ivf", **OPTIONS)
        assert contents(store.path) == expected
        assert verify(Datastore(store.path)).problems == ()
        build_index(store.path, "exact")
    assert len(placed) > 3, "kills came while lists were written"
    assert len(coded) > 3, "and while keys were coded"


@pytest.mark.parametrize("change", ["forget", "compact", "append", "exact", "nlist", "keep"])
def test_what_was_begun_goes_when_it_no_longer_fits(
    store: Datastore, on_disk: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ivf_build, "write_part", None)
        with pytest.raises(TypeError):
            build_index(store, "ivf", **OPTIONS)
    begun = unfinished_folder(store.path)
    assert len(list(begun.iterdir())) > 3
    if change == "forget":
        store.forget(["d3"])
        keep_index(store)
    elif change == "compact":
        keys = store.keys_at(torch.arange(900, 1200))
        store.forget(["d3"])
        compact(store)
        content = b"".join(path.read_bytes() for path in store.path.rglob("*.*"))
        assert not any(key.tobytes() in content for key in keys.numpy())
    elif change == "append":
        append(store.path, clustered(10, seed=3).half(), 1, "new")
        keep_index(store.path)
    elif change == "exact":
        build_index(store, "exact")
    elif change == "nlist":
        build_index(store, "compressed", **OPTIONS)
    else:
        keep_index(store)  # changes nothing
        assert begun.exists()
        return
    assert not begun.exists()
    assert verify(Datastore(store.path)).problems == ()


def test_appended_rows_go_through_files_too(store: Datastore, on_disk: None) -> None:
    build_index(store, "ivf", recall=0.99, k=64)
    append(store.path, clustered(700, seed=8).half() + 0.25, 3, "new")
    store.refresh()
    keep_index(store)
    assert not unfinished_folder(store.path).exists()
    assert verify(Datastore(store.path)).problems == ()
    assert_neighbors(store, QUERIES, 8, open_index(store).search(QUERIES, 8), 0.95)


def test_groups_find_the_nearest_centroid() -> None:
    centroids, vectors = clustered(3000), clustered(4000, seed=2)
    expected = nearest(vectors, centroids)
    grouped = Groups(centroids, 10_000)
    assert grouped.compared < 1000
    found = grouped.nearest(vectors)
    assert (found == expected).double().mean() > 0.9
    farther = torch.linalg.norm(vectors - centroids[found], dim=1)
    least = torch.linalg.norm(vectors - centroids[expected], dim=1)
    assert float(farther.sum() / least.sum()) < 1.01
    assert torch.equal(Groups(centroids, 10).nearest(vectors), expected), (
        "few are compared with all"
    )


def test_no_list_stays_empty_and_copies_do_no_harm() -> None:
    sample = clustered(50).repeat(40, 1)
    centroids = groups.kmeans(sample, 80, 0, rounds=5)
    assert bool(centroids.isfinite().all())
    assert float((sample - centroids[nearest(sample, centroids)]).abs().max()) < 0.5


@pytest.mark.parametrize(("memory", "shown"), [("300MB", "300 MB"), (1 << 20, "1.05 MB")])
def test_too_little_memory_is_refused_at_once(
    store: Datastore, monkeypatch: pytest.MonkeyPatch, memory: str | int, shown: str
) -> None:
    monkeypatch.setattr(forecast, "_SMALL_BYTES", 0)
    message = f"memory must be at least .* to index 3,000 entries of 24 dimensions, got {shown}:"
    with pytest.raises(InvalidArgumentError, match=message):
        build_index(store, "ivf", memory=memory)
    assert not (store.path / FOLDER).exists()


class MemoryByTask:
    """Reads the greatest memory that this process has of its own while a task is at work."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        ended = threading.Event()
        peaks = self.peaks
        peaks[description] = 0

        def read() -> None:
            while not ended.wait(0.002):
                peaks[description] = max(peaks[description], own_memory_bytes())

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield lambda amount, total=None, note=None: None
        finally:
            ended.set()
            thread.join()


def test_memory_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if own_memory_bytes() == 0:
        pytest.skip("the system does not say how much memory a process has")
    store = store_of(tmp_path / "store", clustered(250_000, dimension=64).half())
    build_index(store_of(tmp_path / "small", clustered(500)), "ivf", **OPTIONS)  # compiles
    monkeypatch.setattr(forecast, "_MEASURING_BYTES", 0)
    monkeypatch.setattr(forecast, "_LEAST_BUFFERS", 8 << 20)
    monkeypatch.setattr(forecast, "_SAMPLE_KEYS", 2048)
    monkeypatch.setattr(groups, "_COMPARED_AT_ONCE", 1 << 18)
    monkeypatch.setattr(training, "_LEAST_KEYS", 8192)
    monkeypatch.setattr(training, "_CODER_KEYS", 4096)
    monkeypatch.setattr(parts, "_WRITTEN_BYTES", 1 << 20)
    held = []
    for spare in (1 << 30, 48 << 20):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again
        before = own_memory_bytes()
        memory = MemoryByTask()
        build_index(store, "ivf", memory=before + spare, progress=memory, **OPTIONS)
        peak = max(memory.peaks["code the keys"], memory.peaks["write the index"])
        held.append(peak - before)
    records = 216 * 250_000
    assert held[0] > records, "they are all in memory"
    assert held[1] < 48 << 20
    assert held[1] < records


def test_what_a_build_will_take_is_said_before_it_begins(
    store: Datastore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "knnlm.index"):
        build_index(store, "ivf", memory="3GiB", **OPTIONS)
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"indexing 3,000 entries will take about \d+ s, \d+ kB of disk and up to 3.22 GB of memory",
        said,
    )


def test_training_keys_come_from_all_parts(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SCATTERED_BYTES", 0)
    monkeypatch.setattr(training, "_READ_BYTES", 4 * 48)
    rows = training._sample_rows(store, 600, seed=1)
    assert len(rows) == 600
    assert int(rows.diff().min()) > 0, "ascending, each once"
    assert torch.equal(torch.bincount(rows // 300), torch.full((10,), 60))
    assert int((rows.diff() == 1).sum()) >= 450, "in runs"
