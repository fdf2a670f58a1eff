"""forget, compact, verify: what is forgotten never speaks again, what stays does not change."""

import shutil
import sqlite3
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from stores import assert_same, contents, distinct_documents, stored_keys
from torch import Tensor

from knnlm.datastore.append import append_documents
from knnlm.datastore.catalog import SHARDS, ShardFile
from knnlm.datastore.compaction import Compaction, compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import save_shard, shard_problem
from knnlm.datastore.tables import FILE_NAME
from knnlm.datastore.verification import verify
from knnlm.errors import InvalidArgumentError
from knnlm.index.exact import ExactIndex
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

DOCUMENTS = [
    *(Document(f"tales/{d.name}", d.text) for d in distinct_documents(4)),
    *(Document(f"essays/{d.name}", d.text) for d in distinct_documents(8)[4:]),
]
NAMES = [document.name for document in DOCUMENTS]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llama_lm: LanguageModel) -> Path:
    path = tmp_path_factory.mktemp("built") / "store"
    append_documents(path, llama_lm, DOCUMENTS, window=64, context=16, shard_rows=150).close()
    return path


@pytest.fixture
def path(tmp_path: Path, built: Path) -> Path:
    """Return a copy of the datastore that the test may change."""
    return Path(shutil.copytree(built, tmp_path / "store"))


@pytest.fixture
def store(path: Path) -> Datastore:
    return Datastore(path)


def shard_files(store: Datastore) -> set[str]:
    return {path.name for path in (store.path / SHARDS).iterdir()}


# forget


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tales/d2"], ["tales/d2"]),
        (["essays/*"], ["essays/d4", "essays/d5", "essays/d6", "essays/d7"]),
        (["*/d[0-1]", "tales/d1", "essays/d?"], ["tales/d0", "tales/d1", *NAMES[4:]]),
        (["*"], NAMES),
    ],
)
def test_forget_by_name_and_pattern(
    store: Datastore, names: list[str], expected: list[str]
) -> None:
    before = store.documents()
    forgotten = store.forget(names)
    assert sorted(d.name for d in forgotten) == sorted(expected)
    assert store.documents() == [d for d in before if d.name not in expected]
    rows = sum(d.stop - d.start for d in before if d.name in expected)
    assert store.forgotten_rows == rows
    assert len(store) == store.rows - rows
    assert verify(store).problems == ()
    with refusal(InvalidArgumentError, str(store.path), "has no document", repr(expected[0])):
        store.forget([expected[0]])


def test_an_exact_name_is_no_pattern(path: Path, llama_lm: LanguageModel) -> None:
    store = append_documents(path, llama_lm, [Document("d[0]", "brackets"), Document("d0", "none")])
    assert [d.name for d in store.forget(["d[0]"])] == ["d[0]"]
    assert [d.name for d in store.forget(["d[0]"])] == ["d0"]


@pytest.mark.parametrize("names", [["unknown"], ["tales/d0", "unknown*"], ["TALES/*"]])
def test_an_unknown_name_changes_nothing(store: Datastore, names: list[str]) -> None:
    before, generation = contents(store), store.generation
    with refusal(InvalidArgumentError, str(store.path), "has no document", repr(names[-1])):
        store.forget(names)
    assert not store.refresh()
    assert store.generation == generation
    assert contents(store)[2] == before[2]
    assert store.forgotten_rows == 0


@pytest.mark.parametrize("resident_bytes", [0, 1 << 30], ids=["streamed", "resident"])
def test_forgotten_rows_never_come_back_as_neighbors(store: Datastore, resident_bytes: int) -> None:
    index = ExactIndex(store, resident_bytes=resident_bytes)
    # the forgotten keys themselves: each would be its own nearest neighbor
    queries = stored_keys(store).float()
    everything = index.search(queries, store.rows)
    assert everything.rows.sort(dim=1).values.eq(torch.arange(store.rows)).all()

    forgotten = store.forget(["tales/d1", "essays/*"])
    dead = {row for d in forgotten for row in range(d.start, d.stop)}
    alive = sorted(set(range(store.rows)) - dead)
    for opened in (index, ExactIndex(Datastore(store.path), resident_bytes=resident_bytes)):
        found = opened.search(queries, store.rows)
        assert found.rows[:, : len(alive)].sort(dim=1).values.eq(torch.tensor(alive)).all()
        assert found.rows[:, len(alive) :].eq(-1).all()
        assert found.squared_distances[:, len(alive) :].isinf().all()

    texts = [store.values[d.start : d.stop].tolist() for d in store.documents()]
    compact(store)
    for opened in (index, ExactIndex(Datastore(store.path), resident_bytes=resident_bytes)):
        found = opened.search(queries, len(queries))
        assert found.rows[:, : len(alive)].sort(dim=1).values.eq(torch.arange(len(alive))).all()
        assert found.rows[:, len(alive) :].eq(-1).all()
    assert store.values.tolist() == list(chain.from_iterable(texts))


# compact


def expected_after(
    store: Datastore, names: Sequence[str]
) -> tuple[Tensor, Tensor, list[tuple[str, list[int]]]]:
    """Return keys, values and each document's text without the named documents, in order."""
    rows: list[int] = []
    texts = []
    for d in store.documents():
        if d.name not in names:
            rows += range(d.start, d.stop)
            texts.append((d.name, store.values[d.start : d.stop].tolist()))
    return stored_keys(store)[rows], store.values[rows], texts


@pytest.mark.parametrize(
    "names",
    [
        NAMES[:1],
        NAMES[-1:],
        ["tales/d2", "essays/d5"],
        NAMES[::2],
        NAMES[1:],
        # every document of the middle shards
        NAMES[2:6],
    ],
    ids=["first", "last", "two", "every other", "all but one", "whole shards"],
)
def test_compact_keeps_all_else(store: Datastore, names: list[str]) -> None:
    keys, values, texts = expected_after(store, names)
    rows, files = store.rows, shard_files(store)
    size_bytes = sum(f.stat().st_size for f in (store.path / SHARDS).iterdir())
    forgotten = store.forget(names)
    untouched = {
        shard.file.name
        for shard in store.shards
        if all(d.stop <= shard.start or d.start >= shard.stop for d in forgotten)
    }
    removed = compact(store)

    for opened in (store, Datastore(store.path)):
        assert torch.equal(stored_keys(opened), keys)
        assert torch.equal(opened.values, values)
        documents = opened.documents()
        assert [(d.name, values[d.start : d.stop].tolist()) for d in documents] == texts
        assert [d.start for d in documents] == [0, *(d.stop for d in documents[:-1])]
        assert len(opened) == opened.rows == documents[-1].stop == len(values)
        assert verify(opened).problems == ()
        assert [opened.document_at(d.start) for d in documents] == documents

    assert untouched <= shard_files(store), "shards without forgotten rows are kept as they are"
    assert shard_files(store) == {shard.file.name for shard in store.shards}
    assert (shard_files(store) - untouched).isdisjoint(files), "names are never used again"
    left_bytes = sum(f.stat().st_size for f in (store.path / SHARDS).iterdir())
    assert removed == Compaction(len(names), rows - store.rows, size_bytes - left_bytes)


def test_compact_of_nothing_changes_nothing(store: Datastore) -> None:
    before, files, numbering = contents(store), shard_files(store), store.catalog.numbering
    assert compact(store) == Compaction(0, 0, 0)
    assert shard_files(store) == files
    assert torch.equal(store.values, before[1])
    assert contents(store)[2] == before[2]

    store.forget(["tales/d1"])
    compact(store)
    after, files, documents = contents(store), shard_files(store), store.documents()
    assert store.catalog.numbering == numbering + 1
    reader = Datastore(store.path)
    assert compact(store) == Compaction(0, 0, 0)
    assert shard_files(store) == files
    assert torch.equal(stored_keys(store), after[0])
    assert reader.documents() == documents, "a reader has nothing to be told of"


def test_compact_of_everything_and_building_again(
    store: Datastore, path: Path, built: Path, llama_lm: LanguageModel
) -> None:
    rows = store.rows
    store.forget(["*"])
    removed = compact(store)
    assert (removed.documents, removed.rows) == (len(NAMES), rows)
    assert shard_files(store) == set()
    assert verify(store).problems == ()
    assert len(store) == store.rows == 0
    assert_same(append_documents(path, llama_lm, DOCUMENTS, shard_rows=150), Datastore(built))


def test_appending_after_compact(path: Path, built: Path, llama_lm: LanguageModel) -> None:
    store = Datastore(path)
    store.forget(["tales/d1", "essays/d6"])
    compact(store)
    kept = contents(store)
    again = append_documents(path, llama_lm, DOCUMENTS, shard_rows=150)
    assert verify(again).problems == ()
    assert torch.equal(stored_keys(again)[: len(kept[1])], kept[0])
    names = [d.name for d in again.documents()]
    assert names == [n for n in NAMES if n not in ("tales/d1", "essays/d6")] + [
        "tales/d1",
        "essays/d6",
    ]
    # the same entries as ever, in another order
    original = Datastore(built)
    by_name = {d.name: d for d in original.documents()}
    for d in again.documents():
        o = by_name[d.name]
        assert torch.equal(again.values[d.start : d.stop], original.values[o.start : o.stop])
        torch.testing.assert_close(
            again.keys_at(torch.arange(d.start, d.stop)),
            original.keys_at(torch.arange(o.start, o.stop)),
            atol=2e-3,
            rtol=2e-3,
        )


@pytest.mark.parametrize("boundary", ["document", "stream"])
@pytest.mark.parametrize(
    "steps",
    [["forget"], ["forget", "compact"], ["forget others", "compact"], ["compact"]],
    ids=" and ".join,
)
def test_a_build_goes_on_after_maintenance_of_its_unfinished_document(
    tmp_path: Path, llama_lm: LanguageModel, boundary: str, steps: list[str]
) -> None:
    path = tmp_path / "part"
    documents = distinct_documents(6)
    arguments: dict[str, Any] = {"window": 64, "context": 16, "boundary": boundary}
    part = append_documents(path, llama_lm, documents, max_entries=450, shard_rows=150, **arguments)
    unfinished = part.documents()[-1]
    assert not unfinished.complete
    for step in steps:
        if step == "forget":
            part.forget([unfinished.name])
        elif step == "forget others":
            part.forget(["d0", "d1"])
        else:
            compact(part)
    store = append_documents(path, llama_lm, documents, shard_rows=150)
    assert verify(store).problems == ()
    whole = append_documents(tmp_path / "whole", llama_lm, documents, shard_rows=150, **arguments)
    compact(store)
    texts = {
        built.path: {d.name: built.values[d.start : d.stop].tolist() for d in built.documents()}
        for built in (store, whole)
    }
    for document in store.documents():
        assert document.complete
        # a stream's very first token is context; its document may have come back at another place
        ours, theirs = texts[path][document.name], texts[whole.path][document.name]
        assert ours[-len(theirs) :] == theirs or theirs[-len(ours) :] == ours
        if boundary == "document":
            assert ours == theirs
    assert sorted(texts[path]) == sorted(texts[whole.path])


# verify


def test_a_sound_store_verifies(store: Datastore) -> None:
    found = verify(store)
    assert (found.shards, found.rows, found.problems) == (len(store.shards), store.rows, ())


def flipped_at(kind: str, size_bytes: int, header_bytes: int, rows: int) -> int:
    """Return the byte of a shard's file to damage."""
    keys_bytes = rows * 32 * 2
    return {
        "header length": 0,
        "header": header_bytes // 2,
        "header end": header_bytes - 1,
        "first key": header_bytes,
        "middle of the keys": header_bytes + keys_bytes // 2,
        "first value": header_bytes + keys_bytes,
        "last byte": size_bytes - 1,
    }[kind]


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize(
    "kind",
    [
        "header length",
        "header",
        "header end",
        "first key",
        "middle of the keys",
        "first value",
        "last byte",
    ],
)
def test_one_flipped_bit_is_found(store: Datastore, kind: str, bit: int) -> None:
    for shard in (store.shards[0], store.shards[-2]):
        file = store.path / SHARDS / shard.file.name
        sound = file.read_bytes()
        header_bytes = 8 + int.from_bytes(sound[:8], "little")
        damaged = bytearray(sound)
        damaged[flipped_at(kind, len(sound), header_bytes, shard.file.rows)] ^= 1 << bit
        file.write_bytes(damaged)
        for opened in (store, Datastore(store.path)):
            (problem,) = verify(opened).problems
            assert problem.startswith(f"{file}: ")
            assert "\n" not in problem
        file.write_bytes(sound)
    assert verify(store).problems == ()


def test_bits_flipped_anywhere_are_found(store: Datastore) -> None:
    generator = torch.Generator().manual_seed(0)
    for shard in store.shards:
        file = store.path / SHARDS / shard.file.name
        sound = file.read_bytes()
        for offset in torch.randint(len(sound), (10,), generator=generator).tolist():
            damaged = bytearray(sound)
            damaged[offset] ^= 1 << offset % 8
            file.write_bytes(damaged)
            assert [file.name in problem for problem in verify(store).problems] == [True], offset
        file.write_bytes(sound)


def test_missing_and_truncated_files_are_named(store: Datastore) -> None:
    (store.path / SHARDS / "00000002.safetensors").unlink()
    third = store.path / SHARDS / "00000003.safetensors"
    third.write_bytes(third.read_bytes()[:-1])
    missing, truncated = verify(store).problems
    assert missing.endswith("00000002.safetensors: missing")
    assert "00000003.safetensors" in truncated
    assert "bytes, written with" in truncated


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE shards SET rows = rows + 1 WHERE id = 2", "00000002.safetensors: keys are"),
        ("UPDATE shards SET start = start + 1 WHERE id = 3", "00000003.safetensors: starts at"),
        ("DELETE FROM shards WHERE id = 2", "00000003.safetensors: starts at row"),
        ("UPDATE shards SET sha256 = 'x' WHERE id = 4", "00000004.safetensors: the contents"),
        ("UPDATE documents SET start = start - 1 WHERE id = 3", "document tales/d2 starts at"),
        ("UPDATE documents SET stop = stop + 1 WHERE id = 3", "document tales/d3 starts at"),
        ("DELETE FROM documents WHERE id = 1", "document tales/d1 starts at row"),
        ("DELETE FROM documents WHERE id = 8", "documents end at row"),
    ],
)
def test_rows_that_do_not_fit_together_are_found(store: Datastore, damage: str, found: str) -> None:
    connection = sqlite3.connect(store.path / FILE_NAME)
    with connection:
        assert connection.execute(damage).rowcount == 1
    connection.close()
    problems = verify(Datastore(store.path)).problems
    assert any(found in problem for problem in problems), problems


def test_keys_and_values_that_nobody_could_have_written_are_found(
    path: Path, monkeypatch: pytest.MonkeyPatch, llama_lm: LanguageModel
) -> None:
    def spoiled(path: Path, keys: Tensor, values: Tensor) -> object:
        keys[0, 0] = torch.nan
        return save_shard(path, keys, values)

    monkeypatch.setattr("knnlm.datastore.shard_making.save_shard", spoiled)
    store = append_documents(path, llama_lm, [Document("new", "A new document.")])
    (problem,) = verify(store).problems
    assert "is not finite; restore" in problem


def test_verify_is_not_misled_by_a_writer(
    path: Path, store: Datastore, monkeypatch: pytest.MonkeyPatch, llama_lm: LanguageModel
) -> None:
    steps: list[Callable[[], object]] = [
        lambda: append_documents(path, llama_lm, [Document("new", "A new document.")]),
        lambda: (Datastore(path).forget(["tales/d1"]), compact(Datastore(path))),
    ]

    def writes_first(folder: Path, expected: ShardFile) -> str | None:
        if steps:
            steps.pop(0)()
        return shard_problem(folder, expected)

    append_documents(path, llama_lm, [Document("old", "An old document.")])
    monkeypatch.setattr("knnlm.datastore.verification.shard_problem", writes_first)
    found = verify(store)
    assert steps == []
    assert found.problems == ()
    assert found.rows == Datastore(path).rows
