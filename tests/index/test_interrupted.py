"""Interrupted at every change of a file: the old state or the new, and nothing is left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from index_contract import append, assert_neighbors, clustered, store_of
from kills import Killed, killed_at
from stores import distinct_documents, stored_keys

from knnlm import maintenance
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.verification import verify
from knnlm.index.policy import build_index, index_kind, keep_index, open_index
from knnlm.model.language_model import LanguageModel

pytest.importorskip("faiss")
QUERIES = clustered(30, seed=1)
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "ivf": {"nprobe": 4, "k": 8},
    "compressed": {"nprobe": 4, "k": 8},
    "faiss": {"factory": "IVF8,Flat", "nprobe": 8, "k": 8},
}


def index(store: Datastore, kind: str) -> None:
    build_index(store, kind, **OPTIONS[kind])


def indexed(kind: str, then: Callable[[Datastore], object]) -> Callable[[Datastore], None]:
    def prepare(store: Datastore) -> None:
        index(store, kind)
        then(store)

    return prepare


def grow(store: Datastore) -> None:
    append(store.path, clustered(100, seed=5).half() + 0.25, 1, "new")
    store.refresh()


def grow_and_forget(store: Datastore) -> None:
    grow(store)
    keep_index(store)
    store.forget(["d3", "new0"])


WORK: dict[str, tuple[Callable[[Datastore], None], Callable[[Datastore], object]]] = {
    "index": (lambda store: None, lambda store: index(store, "ivf")),
    "index again": (lambda s: index(s, "ivf"), lambda store: index(store, "ivf")),
    "ivf to compressed": (lambda s: index(s, "ivf"), lambda store: index(store, "compressed")),
    "ivf to faiss": (lambda s: index(s, "ivf"), lambda store: index(store, "faiss")),
    "faiss to ivf": (lambda s: index(s, "faiss"), lambda store: index(store, "ivf")),
    "faiss to exact": (lambda s: index(s, "faiss"), lambda store: index(store, "exact")),
    "code appended rows": (indexed("compressed", grow), keep_index),
    "forget": (indexed("ivf", grow), lambda store: store.forget(["d3", "new0"])),
    "compact": (indexed("exact", grow_and_forget), maintenance.compact),
    "compact ivf": (indexed("ivf", grow_and_forget), maintenance.compact),
    "compact faiss": (indexed("faiss", grow_and_forget), maintenance.compact),
}


def state(store: Datastore) -> list[Any]:
    return [len(store), store.rows, [(d.name, d.start, d.stop) for d in store.documents()]]


def bytes_on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("work", WORK)
def test_killed_anywhere_the_datastore_is_as_before_or_as_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    prepare, change = WORK[work]
    old = store_of(tmp_path / "old", clustered(900).half())
    prepare(old)
    new = Datastore(shutil.copytree(old.path, tmp_path / "new"))
    change(new)
    forgotten = stored_keys(old)[~old.alive].numpy()
    kinds = {index_kind(old), index_kind(new)}
    states = [state(old), state(new)]

    event = 0
    finished = False
    while not finished:
        event += 1
        path = Path(shutil.copytree(old.path, tmp_path / f"killed{event}"))
        with killed_at(event, monkeypatch):
            try:
                change(Datastore(path))
                finished = True
            except Killed:
                pass
        left = Datastore(path)
        assert state(left) in states
        assert index_kind(left) in kinds
        assert_neighbors(left, QUERIES, 8, open_index(left).search(QUERIES, 8), 0.8)
        if work != "forget" or state(left) == states[0]:  # what is forgotten has no name any more
            change(left)
        assert state(left) == states[1]
        assert index_kind(left) == index_kind(new)
        assert verify(left).problems == ()
        assert_neighbors(left, QUERIES, 8, open_index(left).search(QUERIES, 8), 0.8)
        if work.startswith("compact"):
            content = bytes_on_disk(path)
            assert len(forgotten) > 0
            assert not any(key.tobytes() in content for key in forgotten)
        shutil.rmtree(path)
    assert event > 2


def test_a_build_killed_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny")
    documents = distinct_documents(8)
    arguments: dict[str, Any] = {"window": 64, "context": 16, "index": "ivf"}
    whole = maintenance.build(tmp_path / "whole", lm, documents, **arguments)
    queries = stored_keys(whole)[::40].float()
    event = 0
    finished = False
    while not finished:
        event += 1
        path = tmp_path / f"killed{event}"
        with killed_at(event, monkeypatch):
            try:
                maintenance.build(path, lm, documents, **arguments)
                finished = True
            except Killed:
                pass
        if (path / "catalog.sqlite").exists():
            left = Datastore(path)
            assert left.rows in (0, whole.rows)
            assert_neighbors(left, queries, 5, open_index(left).search(queries, 5), 0.8)
        again = maintenance.build(path, lm, documents, **arguments)
        assert torch.equal(again.values, whole.values)
        assert index_kind(again) == "ivf"
        assert verify(again).problems == ()
        shutil.rmtree(path)
    assert event > 8
