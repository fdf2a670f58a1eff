"""Datastores of older versions: converted once, whole or not at all, and built again in place."""

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, refusal
from kills import ends_by_kill, kill_after, kill_before, kill_inside_sqlite
from stores import assert_same, contents, distinct_documents, small_disk, snapshot

import knnlm
from knnlm.datastore.append import append_documents
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import writer_lock
from knnlm.datastore.stored_index import stored_index
from knnlm.datastore.tables import DIGEST, FILE_NAME, FORMAT, record_checksum
from knnlm.datastore.upgrade import format_of
from knnlm.datastore.verification import verify
from knnlm.errors import DatastoreCorruptError, DatastoreLockedError, DatastoreWriteError
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.report import describe_datastore
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document, Documents, Source

# newer Pythons warn of forks beside threads; ours use no thread pool
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

# the tables as those versions made them
FORMAT_1 = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shards (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    start INTEGER NOT NULL,
    name TEXT NOT NULL, rows INTEGER NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, fingerprint TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL,
    tokens INTEGER NOT NULL, complete INTEGER NOT NULL, forgotten INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX documents_by_name ON documents (name);
CREATE INDEX documents_by_start ON documents (start);
"""
FORMAT_2 = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE shards (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL,
    name TEXT NOT NULL, rows INTEGER NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL, fingerprint TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL,
    tokens INTEGER NOT NULL, complete INTEGER NOT NULL, forgotten INTEGER NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX documents_by_name ON documents (name);
"""


def make_older(store: Datastore, version: int, names: dict[str, str] | None = None) -> Path:
    """Write the catalog of a datastore as an older version would have; return its folder.

    names: other names for documents, by the present ones.
    """
    store.close()
    path = store.path / FILE_NAME
    with closing(sqlite3.connect(path)) as new:
        settings = new.execute("SELECT * FROM settings").fetchall()
        shards = new.execute("SELECT * FROM shards").fetchall()
        documents = new.execute("SELECT * FROM documents ORDER BY id").fetchall()
    path.unlink()
    with closing(sqlite3.connect(path)) as old:
        old.executescript(FORMAT_1 if version == 1 else FORMAT_2)
        old.execute(f"PRAGMA user_version = {version}")
        if version == 1:
            index = {"kind": "exact", "asked": "auto"}
            for name, _, value in settings:
                if name == "index":
                    index = {key: json.loads(value)[key] for key in index}
                elif name not in (DIGEST, "last_shard", "parameters again"):
                    old.execute("INSERT INTO settings VALUES (?, ?)", (name, value))
            old.execute("INSERT INTO settings VALUES ('index', ?)", (json.dumps(index),))
        else:
            old.executemany("INSERT INTO settings VALUES (?, ?, ?)", settings)
        old.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)", shards)
        for number, name, _, *fields, _ in documents:
            record = [number, (names or {}).get(name, name), *fields]
            record += [record_checksum(record)] if version > 1 else []
            old.execute(f"INSERT INTO documents VALUES ({','.join('?' * len(record))})", record)
        old.commit()
    return store.path


@pytest.fixture
def store(tmp_path: Path, llama_lm: LanguageModel) -> Datastore:
    """Return a datastore with everything: shards, an index, parameters, forgotten documents."""
    store = append_documents(
        tmp_path / "store", llama_lm, distinct_documents(9), window=64, context=16, shard_rows=300
    )
    knnlm.build_index(store, "ivf")
    store.save_parameters(Parameters(k=7), {"tokens": 3})
    store.forget(["d1", "d5"])
    return store


@pytest.mark.parametrize("version", [1, 2])
def test_opening_converts_and_loses_nothing(
    tmp_path: Path, llama_lm: LanguageModel, store: Datastore, version: int
) -> None:
    present = Datastore(shutil.copytree(store.path, tmp_path / "present"))
    path = make_older(store, version)
    upgraded = Datastore(path)
    assert format_of(path) == FORMAT
    assert_same(upgraded, present)
    assert upgraded.settings == present.settings
    assert upgraded.generation == present.generation
    assert upgraded.forgotten_rows == present.forgotten_rows > 0
    assert upgraded.parameters == Parameters(k=7)
    assert upgraded.catalog.get("parameters again") == upgraded.catalog.get("parameters")
    assert [d.identity for d in upgraded.documents()] == [d.name for d in upgraded.documents()]
    assert upgraded.catalog.problems() == []
    before = snapshot(path)
    Datastore(path)
    assert snapshot(path) == before, "only once"

    again = knnlm.build(path, llama_lm, distinct_documents(10))
    assert_same(again, knnlm.build(present.path, llama_lm, distinct_documents(10)))
    assert verify(again).problems == ()


def test_the_index_of_format_1_is_dropped_and_built_again(
    store: Datastore, llama_lm: LanguageModel
) -> None:
    path = make_older(store, 1)
    facts = describe_datastore(path)
    assert facts["index"] == {"kind": "exact", "recall": 1.0}
    assert facts["dropped_index"] == "ivf"
    upgraded = Datastore(path)
    assert not isinstance(knnlm.open_index(upgraded), IVFIndex)
    upgraded.forget(["d2"])
    assert not list((path / "index").iterdir()), "its files go with the next change"
    knnlm.compact(upgraded)
    assert isinstance(knnlm.open_index(Datastore(path)), IVFIndex)
    assert describe_datastore(path)["dropped_index"] is None
    assert verify(Datastore(path)).problems == ()


def test_the_index_of_format_2_is_kept(store: Datastore) -> None:
    before = stored_index(store.catalog)
    upgraded = Datastore(make_older(store, 2))
    assert stored_index(upgraded.catalog) == before
    assert isinstance(knnlm.open_index(upgraded), IVFIndex)
    assert verify(upgraded).problems == ()


@pytest.mark.parametrize("report", [{"factory": "IVF16,Flat"}, None, []])
def test_a_faiss_index_is_built_again_by_its_factory(store: Datastore, report: Any) -> None:
    path = make_older(store, 1)
    with closing(sqlite3.connect(path / FILE_NAME)) as old:
        index = json.dumps({"kind": "faiss", "asked": "faiss"})
        old.execute("UPDATE settings SET value = ? WHERE name = 'index'", (index,))
        old.commit()
    if report is not None:
        (path / "index" / "faiss").mkdir(parents=True)
        (path / "index" / "faiss" / "report.json").write_text(json.dumps(report))
    stored = stored_index(Catalog(path))
    expected = ("faiss", "faiss", "IVF16,Flat") if report else ("exact", "auto", None)
    assert (stored.kind, stored.asked, stored.factory) == expected


# SQLite converts this datastore in more than 2,500 instructions
INSTRUCTIONS = random.Random(0).sample(range(1, 2500), 12)
KILLS: dict[str, Callable[[], None]] = {
    "before fsync": partial(kill_before, os, "fsync", 1, lambda *_: True),
    "before rename": partial(kill_before, os, "rename", 1, lambda *_: True),
    "after rename": partial(kill_after, os, "rename", 1),
    **{f"inside SQLite at {n}": partial(kill_inside_sqlite, n) for n in INSTRUCTIONS},
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_killed_conversion_leaves_the_old_or_the_new(
    tmp_path: Path, store: Datastore, version: int
) -> None:
    present = Datastore(shutil.copytree(store.path, tmp_path / "present"))
    path = make_older(store, version)
    formats = []
    for number, (place, kill) in enumerate(KILLS.items()):
        copy = Path(shutil.copytree(path, tmp_path / str(number)))

        def killed(copy: Path = copy, kill: Callable[[], None] = kill) -> None:
            kill()
            Datastore(copy)

        assert ends_by_kill(killed), place
        formats.append(format_of(copy))
        assert formats[-1] in (version, FORMAT)
        assert_same(Datastore(copy), present)
        assert Datastore(copy).catalog.problems() == []
    assert set(formats) == {version, FORMAT}


def test_a_folder_that_is_not_writable_is_refused_with_the_command(
    tmp_path: Path, store: Datastore
) -> None:
    path = make_older(store, 1)
    with small_disk(tmp_path / "disk", 20_000) as disk:
        there = Path(shutil.copytree(path, disk.path / "store"))
        disk.make_read_only()
        with refusal(
            DatastoreWriteError, "is of an older version (format 1)", f"knnlm info {there}"
        ):
            Datastore(there)
        assert format_of(there) == 1


def test_beside_a_writer_it_is_refused(store: Datastore) -> None:
    path = make_older(store, 1)
    with writer_lock(path), refusal(DatastoreLockedError, "being written by another process"):
        Datastore(path)
    Datastore(path)


def test_damage_is_refused_and_not_given_a_checksum(tmp_path: Path, store: Datastore) -> None:
    chance = random.Random(0)
    present = contents(Datastore(shutil.copytree(store.path, tmp_path / "present")))
    path = make_older(store, 2)
    whole = (path / FILE_NAME).read_bytes()
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(100, len(whole))] ^= 1 << chance.randrange(8)
        (path / FILE_NAME).write_bytes(damaged)
        try:
            upgraded = Datastore(path)
            found = contents(upgraded)
        except DatastoreCorruptError:
            refused += 1
            continue
        assert found[2] == present[2]
        assert torch.equal(found[1], present[1])
    assert refused > 5


# built again in place


def corpus(
    folder: Path, texts: dict[str, str], given: str, rows: tuple[str, ...] = ()
) -> Documents:
    """Return a folder's documents, as they are read when it is given in some spelling."""
    documents = [
        Document(f"{given}/{name}", text, f"{folder}/{name}") for name, text in texts.items()
    ]
    for number, text in enumerate(rows, 1):
        fingerprint = Document("", text).fingerprint()[:16]
        documents.append(
            Document(f"{given}/r.jsonl:{number}", text, f"{folder}/r.jsonl#{fingerprint}")
        )
    sources = (Source(str(folder), False), Source(f"{folder}/r.jsonl", True))
    return Documents([lambda: iter(documents)], None, sources)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("old_spelling", ["docs", "./docs", "{folder}", "../here/docs"])
@pytest.mark.parametrize("new_spelling", ["docs", "{folder}"])
def test_the_same_folder_is_the_same_documents(
    tmp_path: Path,
    llama_lm: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    old_spelling: str,
    new_spelling: str,
) -> None:
    folder = tmp_path / "here" / "docs"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    texts = {f"{n}.txt": f"{n}: {PROSE}" for n in range(4)}
    rows = ("one row", "another row", "a third row")
    old_name, new_name = (name.format(folder=folder) for name in (old_spelling, new_spelling))
    documents = list(corpus(folder, texts, old_name, rows))
    store = append_documents(
        tmp_path / "store", llama_lm, [Document(d.name, d.text) for d in documents]
    )
    rows_before = store.rows
    path = make_older(store, version)
    for _ in range(2):
        built = append_documents(path, llama_lm, corpus(folder, texts, new_name, rows))
        assert (built.rows, built.forgotten_rows) == (rows_before, 0)
        assert built.changes == knnlm.Changes(unchanged=7)
        assert [d.identity for d in built.documents()] == [d.identity for d in documents]
        assert [d.name for d in built.documents()] == [d.name for d in documents]

    del texts["1.txt"]
    texts["2.txt"] = "something else"
    left = corpus(folder, texts, new_name, rows[1:])
    built = append_documents(path, llama_lm, left)
    assert built.changes == knnlm.Changes(replaced=1, unchanged=4, removed=1, gone=1)
    built = append_documents(path, llama_lm, left, sync=True)
    assert built.changes == knnlm.Changes(unchanged=5, removed=1)
    assert sorted(d.identity for d in built.documents()) == sorted(str(d.identity) for d in left)


def test_what_is_gone_from_the_source_goes_at_once(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first build after the conversion already changes and removes documents."""
    folder = tmp_path / "docs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    texts = {f"{n}.txt": f"{n}: {PROSE}" for n in range(4)}
    documents = list(corpus(folder, texts, "docs", ("one row", "a second row")))
    store = append_documents(
        tmp_path / "store", llama_lm, [Document(d.name, d.text) for d in documents]
    )
    path = make_older(store, 1)
    del texts["1.txt"]
    texts["2.txt"] = "something else"
    left = corpus(folder, texts, "docs", ("a second row", "a new row"))
    built = append_documents(path, llama_lm, left, sync=True)
    assert built.changes == knnlm.Changes(added=1, replaced=1, unchanged=3, removed=2)
    assert sorted(d.identity for d in built.documents()) == sorted(str(d.identity) for d in left)


def test_from_another_folder_nothing_is_mistaken(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for project in ("one", "two"):
        (tmp_path / project).mkdir()
    store = append_documents(tmp_path / "s", llama_lm, [Document("README", f"one {PROSE}")])
    path = make_older(store, 1)
    absolute = [Document(str(tmp_path / "two/README"), PROSE, str(tmp_path / "two/README"))]
    monkeypatch.chdir(tmp_path / "one")
    built = append_documents(path, llama_lm, absolute)
    assert [d.name for d in built.documents()] == ["README", str(tmp_path / "two/README")]
    first = [Document("README", f"one {PROSE}", str(tmp_path / "one/README"))]
    built = append_documents(path, llama_lm, first)
    assert [d.identity for d in built.documents()] == [
        str(tmp_path / project / "README") for project in ("one", "two")
    ]
