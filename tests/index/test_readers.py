"""Readers beside writers: each answers from one state of the datastore, and none is refused."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from index_contract import append, assert_neighbors, clustered, store_of

from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.documents_by_row import DocumentsByRow
from knnlm.datastore.verification import verify
from knnlm.index.exact import ExactIndex
from knnlm.index.policy import build_index, keep_index, open_index

pytest.importorskip("faiss")
QUERIES = clustered(10, seed=1)
SECONDS = 10
WRITER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
torch.set_num_threads(1)
from index_contract import append, clustered
from knnlm.datastore.datastore import Datastore
from knnlm.maintenance import compact
from knnlm.index.policy import build_index, keep_index
store = Datastore(sys.argv[1])
end = time.monotonic() + {SECONDS}
changes = 0
while time.monotonic() < end:
    number = changes // 5
    match changes % 5:
        case 0:
            with store.writer():
                append(store.path, clustered(60, seed=number).half(), 2, f"new{{number}}_")
            store.refresh()
        case 1 | 3:
            keep_index(store)
        case 2:
            store.forget([f"new{{number}}_0", f"new{{number - 1}}_1"] if number else ["new0_0"])
        case 4 if number % 3 == 0:
            kind = ["ivf", "compressed", "faiss", "exact"][number // 3 % 4]
            build_index(store, kind, factory="IVF8,Flat" if kind == "faiss" else None, nprobe=4)
        case 4:
            compact(store)
    changes += 1
print(changes)
"""


def check(store: Datastore) -> None:
    """Check answers and passages against the snapshot itself."""
    index = open_index(store)
    for asked in (QUERIES, QUERIES[:1]):
        found = index.search(asked, 6)
        assert_neighbors(store, asked, 6, found, 0.6)
        owners = DocumentsByRow(store).at(found.rows[:, 0])
        for row, owner in zip(found.rows[:, 0].tolist(), owners, strict=True):
            passage = store.passage(row, 3, 3)
            assert passage.document == owner
            assert passage.value == int(store.values[row])


def test_readers_beside_a_writer_are_right_and_never_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", clustered(700).half())
    build_index(store, "ivf", nprobe=4, k=8)
    held = Datastore(store.path)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path)], stdout=subprocess.PIPE, text=True
    )
    opened, states = 0, set()
    while writer.poll() is None:
        reader = Datastore(store.path)
        if opened % 4 == 0:
            time.sleep(0.03)  # as if a language model were loaded meanwhile
        check(reader)
        states.add((reader.generation, reader.catalog.generation))
        if opened % 8 == 0:
            check(held)
            held.refresh()
        if opened % 5 == 0:
            assert verify(reader).problems == ()
        reader.close()
        opened += 1
    changes, _ = writer.communicate()
    assert writer.returncode == 0
    assert int(changes) > 20
    assert opened > 20
    assert len(states) > 5
    assert any(one != other for one, other in states), "some readers were behind the writer"


@pytest.mark.parametrize("kind", ["exact", "ivf", "compressed", "faiss"])
def test_a_snapshot_answers_after_another_process_compacted(tmp_path: Path, kind: str) -> None:
    store = store_of(tmp_path / "store", clustered(700).half())
    build_index(store, kind, factory="IVF8,Flat" if kind == "faiss" else None, nprobe=8)
    reader = Datastore(store.path)
    index = open_index(reader)
    late = Datastore(store.path)
    before = index.search(QUERIES, 6)
    passages = [reader.passage(row) for row in before.rows[:, 0].tolist()]

    store.forget(["d1", "d4"])
    compact(store)
    keep_index(store)
    after = index.search(QUERIES, 6)
    assert torch.equal(after.rows, before.rows)
    assert torch.equal(after.squared_distances, before.squared_distances)
    for row, expected in zip(after.rows[:, 0].tolist(), passages, strict=True):
        passage = reader.passage(row)
        assert passage.document == expected.document
        assert passage.before.tolist() == expected.before.tolist()
    check(late)

    assert reader.refresh()
    found = index.search(QUERIES, 6)
    assert_neighbors(reader, QUERIES, 6, found, 1.0)
    check(reader)


@pytest.mark.parametrize("kind", ["ivf", "compressed", "faiss"])
def test_rows_that_are_newer_than_a_snapshot_are_not_found(tmp_path: Path, kind: str) -> None:
    store = store_of(tmp_path / "store", clustered(700).half())
    build_index(store, kind, factory="IVF8,Flat" if kind == "faiss" else None, nprobe=8)
    readers = [Datastore(store.path)]
    for rows in (90, 40, 600):  # one run, a longer one, and a new index
        append(store.path, QUERIES.repeat(rows // 10, 1).half(), 1, f"n{rows}")
        store.refresh()
        readers.append(Datastore(store.path))
        keep_index(store)
    build_index(store, kind, factory="IVF8,Flat" if kind == "faiss" else None, nprobe=8)
    for reader in readers:
        found = open_index(reader).search(QUERIES, 6)
        assert int(found.rows.max()) < reader.rows
        assert_neighbors(reader, QUERIES, 6, found, 0.8)


def test_an_index_of_a_compacted_datastore_is_never_taken_for_it(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", clustered(700).half())
    build_index(store, "compressed", nprobe=8, k=8)
    old = Datastore(store.path)
    store.forget(["d0"])
    compact(store)
    assert isinstance(open_index(store), ExactIndex)
    keep_index(store)
    assert isinstance(open_index(old), ExactIndex)
    check(old)
