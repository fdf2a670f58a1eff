"""Opening and reading: what was built is what is read, and whatever is damaged is refused."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, refusal, tiny_llama
from stores import contents, distinct_documents, small_disk, stored_keys

from knnlm.datastore.append import append_documents
from knnlm.datastore.catalog import FILE_NAME, FORMAT, SHARDS, Catalog, ShardFile
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.documents_by_row import DocumentsByRow
from knnlm.datastore.facts import check_size
from knnlm.datastore.verification import verify
from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreMismatchError,
    DatastoreNotFoundError,
    DatastoreWriteError,
    InvalidArgumentError,
    KNNLMError,
)
from knnlm.index.exact import ExactIndex
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.text.corpus import Document

DOCUMENTS = distinct_documents(7)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llama_lm: LanguageModel) -> Path:
    path = tmp_path_factory.mktemp("built") / "store"
    append_documents(path, llama_lm, DOCUMENTS, window=64, context=16, shard_rows=150).close()
    return path


@pytest.fixture
def path(tmp_path: Path, built: Path) -> Path:
    """Return a copy of the datastore that the test may damage."""
    return Path(shutil.copytree(built, tmp_path / "store"))


@pytest.fixture
def store(path: Path) -> Datastore:
    return Datastore(path)


@pytest.fixture(scope="module")
def tokens(llama_lm: LanguageModel) -> list[list[int]]:
    encoded = llama_lm.encode([str(document.text) for document in DOCUMENTS])
    return [of_document.tolist() for of_document in encoded]


# opening


def test_what_is_no_datastore_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    for name in ("missing", "folder", "file"):
        with refusal(DatastoreNotFoundError, str(tmp_path / name), "is not a datastore"):
            Datastore(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_missing_shard_is_named(store: Datastore) -> None:
    (store.path / SHARDS / "00000002.safetensors").unlink()
    with refusal(DatastoreCorruptError, "00000002.safetensors is missing, written with"):
        Datastore(store.path)


@pytest.mark.parametrize("missing_bytes", [1, 1000])
def test_a_truncated_shard_is_named(store: Datastore, missing_bytes: int) -> None:
    shard = store.path / SHARDS / "00000003.safetensors"
    size_bytes = shard.stat().st_size
    os.truncate(shard, size_bytes - missing_bytes)
    with refusal(
        DatastoreCorruptError,
        f"00000003.safetensors is {size_bytes - missing_bytes} bytes long",
        f"written with {size_bytes} bytes",
    ):
        Datastore(store.path)


@pytest.mark.parametrize("offset", [0, 8, 20])
def test_a_damaged_shard_header_is_named_when_it_is_read(store: Datastore, offset: int) -> None:
    shard = store.path / SHARDS / "00000001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[offset : offset + 8] = b"\xff" * 8
    shard.write_bytes(damaged)
    opened = Datastore(store.path)
    with refusal(DatastoreCorruptError, "00000001.safetensors cannot be read", "knnlm verify"):
        _ = opened.values


def test_an_unknown_format_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path / FILE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with refusal(DatastoreCorruptError, FILE_NAME, "format 99", f"reads format {FORMAT}"):
        Datastore(path)


def overwrite(offset: int, size: int) -> Callable[[Path], None]:
    def damage(catalog: Path) -> None:
        contents = bytearray(catalog.read_bytes())
        stop = min(offset + size, len(contents))
        contents[offset:stop] = b"\xa5" * (stop - offset)
        catalog.write_bytes(contents)

    return damage


def another_program(catalog: Path) -> None:
    catalog.unlink()
    connection = sqlite3.connect(catalog)
    connection.execute("CREATE TABLE theirs (a)")
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda catalog: catalog.write_bytes(b"garbage " * 1000),
        lambda catalog: catalog.write_bytes(b""),
        lambda catalog: os.truncate(catalog, 5000),
        overwrite(0, 16),
        overwrite(16, 84),
        overwrite(100, 4000),
        overwrite(4096, 1 << 20),
        another_program,
    ],
    ids=["garbage", "empty", "cut", "magic", "header", "schema", "tables", "another program's"],
)
def test_a_damaged_catalog_is_refused(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path / FILE_NAME)
    with refusal(DatastoreCorruptError, FILE_NAME):
        Datastore(path)


def set_setting(catalog: Path, name: str, value: str) -> None:
    connection = sqlite3.connect(catalog)
    with connection:
        connection.execute("UPDATE settings SET value = ? WHERE name = ?", (value, name))
    connection.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("datastore", "{"), ("datastore", "{}"), ("datastore", "null"), ("generation", '"x"')],
)
def test_damaged_settings_are_refused(path: Path, name: str, value: str) -> None:
    set_setting(path / FILE_NAME, name, value)
    with refusal(DatastoreCorruptError, FILE_NAME):
        Datastore(path)


def test_bytes_flipped_anywhere_in_the_catalog_give_our_errors_alone(path: Path) -> None:
    catalog = path / FILE_NAME
    sound = catalog.read_bytes()
    noticed = multiline = 0
    for offset in range(0, len(sound), 499):
        catalog.write_bytes(sound[:offset] + bytes([sound[offset] ^ 0xFF]) + sound[offset + 1 :])
        try:
            store = Datastore(path)
            noticed += bool(verify(store).problems)
            store.close()
        except KNNLMError as error:
            multiline += "\n" in str(error)
            noticed += 1
    assert noticed > 0
    assert multiline == 0


# reading


def test_everything_reads_as_it_was_built(
    store: Datastore, tokens: list[list[int]], llama_lm: LanguageModel
) -> None:
    assert len(store.shards) >= 5
    assert len(store) == store.rows == sum(map(len, tokens))
    assert store.values.dtype == torch.int32
    assert store.values.tolist() == list(chain.from_iterable(tokens))
    assert [d.name for d in store.documents()] == [d.name for d in DOCUMENTS]
    # the first window of every document, read alone
    for document, expected in zip(store.documents(), tokens, strict=True):
        rows = torch.arange(document.start, document.start + 64)
        read = torch.tensor([[llama_lm.start_token, *expected[:63]]])
        keys = store.keys_at(rows)
        assert keys.dtype == store.key_dtype == torch.float16
        torch.testing.assert_close(keys.float(), llama_lm.keys(read)[0], atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize("max_rows", [1, 7, 150, 1 << 20])
def test_key_blocks_are_all_keys_in_order(store: Datastore, max_rows: int) -> None:
    expected = 0
    for start, keys in store.key_blocks(max_rows):
        assert start == expected
        assert 1 <= len(keys) <= max_rows
        assert torch.equal(keys, store.keys_at(torch.arange(start, start + len(keys))))
        expected += len(keys)
    assert expected == store.rows


@pytest.mark.parametrize("first_row", [1, 149, 157, 400])
def test_key_blocks_can_begin_anywhere(store: Datastore, first_row: int) -> None:
    blocks = list(store.key_blocks(100, first_row=first_row))
    assert blocks[0][0] == first_row
    assert torch.equal(torch.cat([keys for _, keys in blocks]), stored_keys(store)[first_row:])


def test_keys_at_takes_any_rows_in_any_order(store: Datastore) -> None:
    rows = torch.randperm(store.rows, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, rows[:5]])
    assert torch.equal(store.keys_at(rows), stored_keys(store)[rows])
    assert store.keys_at(rows[:0]).shape == (0, 32)


def test_every_row_knows_its_document(store: Datastore, tokens: list[list[int]]) -> None:
    owners = [name for name, of_document in enumerate(tokens) for _ in of_document]
    assert [store.document_at(row).name for row in range(store.rows)] == [f"d{n}" for n in owners]
    for row in (-1, store.rows):
        with pytest.raises(DatastoreCorruptError, match=f"no document holds row {row}"):
            store.document_at(row)


def test_documents_are_found_by_many_rows_at_once(store: Datastore) -> None:
    store.forget(["d2"])
    documents = DocumentsByRow(store)
    rows = torch.randperm(store.rows, generator=torch.Generator().manual_seed(0))
    rows = rows[store.alive[rows]]
    assert documents.at(rows) == [store.document_at(row) for row in rows.tolist()]
    assert documents.holding(rows) == store.documents()
    first, *_, last = store.documents()
    edges = torch.tensor([last.stop - 1, first.start, last.start, first.stop - 1])
    assert documents.holding(edges) == [first, last]
    assert documents.at(rows[:0]) == documents.holding(rows[:0]) == []


def test_passages_cross_shards_but_never_documents(
    store: Datastore, tokens: list[list[int]]
) -> None:
    edges = {shard.start for shard in store.shards[1:]}
    crossed = 0
    for document, expected in zip(store.documents(), tokens, strict=True):
        for row in range(document.start, document.stop):
            passage = store.passage(row, before=24, after=8)
            at = row - document.start
            assert passage.document == document
            assert passage.before.tolist() == expected[max(at - 24, 0) : at]
            assert passage.value == expected[at]
            assert passage.after.tolist() == expected[at + 1 : at + 9]
            crossed += any(row - len(passage.before) < edge <= row for edge in edges)
    assert crossed > 0
    whole = store.passage(store.rows - 1, before=1 << 20, after=0)
    assert whole.before.tolist() == tokens[-1][:-1]
    assert whole.after.tolist() == []


def test_an_empty_datastore_can_be_read(path: Path) -> None:
    store = Datastore(path)
    store.forget(["*"])
    compact(store)
    assert (len(store), store.rows, store.shards, store.documents()) == (0, 0, [], [])
    assert store.values.tolist() == []
    assert list(store.key_blocks(10)) == []
    neighbors = ExactIndex(store).search(torch.zeros(2, 32), 3)
    assert not neighbors.present.any()


# other writers


def test_opening_a_datastore_keeps_the_locks_of_this_process(store: Datastore) -> None:
    """POSIX drops all of a process's locks on a file when any descriptor of it is closed."""
    writes = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "connection.execute('BEGIN IMMEDIATE')"
    )
    command = [sys.executable, "-c", writes, str(store.path / FILE_NAME)]
    with store.catalog.transaction(entries_change=False):
        Datastore(store.path).close()
        Catalog(store.path).close()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "database is locked" in done.stderr
    subprocess.run(command, check=True)


def test_refresh_sees_what_others_did(
    path: Path, store: Datastore, llama_lm: LanguageModel
) -> None:
    assert not store.refresh()
    before = contents(store)
    rows = store.rows
    other = append_documents(path, llama_lm, [Document("new", "A new document.")])
    assert (store.rows, len(store.values)) == (rows, rows), "a snapshot until it is refreshed"
    assert store.refresh()
    assert not store.refresh()
    assert store.rows == other.rows > rows
    assert torch.equal(store.values[:rows], before[1])
    assert store.documents()[-1].name == "new"
    assert store.passage(store.rows - 1).document.name == "new"

    (document,) = other.forget(["d2"])
    assert store.refresh()
    assert len(store) == store.rows - (document.stop - document.start)
    assert store.alive.tolist() == [
        not document.start <= row < document.stop for row in range(store.rows)
    ]
    assert "d2" not in [d.name for d in store.documents()]


@pytest.mark.parametrize("read_before", [True, False], ids=["keys read", "keys not read"])
@pytest.mark.parametrize("forgotten", [["d0"], ["d3"], ["d6"], ["d1", "d5"]])
def test_a_reader_during_compact_answers_from_its_snapshot(
    path: Path, store: Datastore, forgotten: list[str], read_before: bool
) -> None:
    fresh = Datastore(path)
    fresh.forget(forgotten)
    store.refresh()
    keys, values = stored_keys(fresh).clone(), fresh.values
    documents = fresh.documents()
    owners = [fresh.document_at(row) for row in range(fresh.rows)]
    if read_before:
        _ = store.values, stored_keys(store)
    compact(Datastore(path))

    assert torch.equal(store.values, values)
    assert torch.equal(stored_keys(store), keys)
    assert store.documents() == documents
    for row, owner in enumerate(owners):
        assert store.document_at(row) == owner
        passage = store.passage(row, 4, 2)
        assert passage.before.tolist() == values[max(owner.start, row - 4) : row].tolist()
        assert passage.value == int(values[row])
        assert passage.after.tolist() == values[row + 1 : min(owner.stop, row + 3)].tolist()

    assert store.refresh()
    assert verify(store).problems == ()
    gone = sum(owner.name in forgotten for owner in owners)
    assert store.rows == len(store) == len(values) - gone
    for row in range(store.rows):
        document = store.document_at(row)
        assert document.start <= row < document.stop


def test_a_reader_that_opens_while_files_go_sees_the_newer_state(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Datastore(path)
    writer.forget(["d0", "d4"])
    compacted: list[bool] = []

    def compacts_first(folder: Path, file: ShardFile) -> None:
        if not compacted:
            compacted.append(True)
            compact(writer)
        check_size(folder, file)

    monkeypatch.setattr("knnlm.datastore.facts.check_size", compacts_first)
    reader = Datastore(path)
    assert compacted
    assert reader.generation == writer.generation
    assert verify(reader).problems == ()
    assert len(reader) == reader.rows == len(writer)


# the model and the parameters


def test_check_model(store: Datastore, llama_lm: LanguageModel) -> None:
    store.check_model(llama_lm)
    store.check_model(LanguageModel(tiny_llama(), byte_tokenizer(), name="renamed"))
    other = LanguageModel(tiny_llama(seed=1), byte_tokenizer(), name="other")
    with refusal(DatastoreMismatchError, str(store.path), "with tiny (weights", "not with other"):
        store.check_model(other)
    retokenized = LanguageModel(tiny_llama(), byte_tokenizer(vocab_size=300), name="other")
    with refusal(DatastoreMismatchError, "with tiny (tokenizer", "not with other (tokenizer"):
        store.check_model(retokenized)


def test_parameters_are_kept(store: Datastore) -> None:
    assert store.parameters is None
    assert store.tuning is None
    parameters = Parameters(k=17, lmbda=0.3, temperature=2.5)
    reader = Datastore(store.path)
    store.save_parameters(parameters, {"tokens": 12, "name": "ü"})
    for opened in (store, reader, Datastore(store.path)):
        assert opened.parameters == parameters
        assert opened.tuning == {"tokens": 12, "name": "ü"}
    store.save_parameters(Parameters(lmbda=0.0), {})
    assert Datastore(store.path).parameters == Parameters(lmbda=0.0)
    assert verify(store).problems == ()


# permissions


def test_files_are_readable_by_whom_the_umask_lets(tmp_path: Path, llama_lm: LanguageModel) -> None:
    old = os.umask(0o022)
    try:
        store = append_documents(tmp_path / "s", llama_lm, DOCUMENTS[:1], window=64, context=0)
    finally:
        os.umask(old)
    shards = list((store.path / SHARDS).iterdir())
    assert shards
    for file in [store.path / FILE_NAME, *shards]:
        assert file.stat().st_mode & 0o777 == 0o644, file


def as_another_user(work: Callable[[], object]) -> str:
    """Return the error that work raises in a process without rights, "" for none."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (FILE_NAME, "cannot be read (Permission denied); change its permissions"),
        (f"{SHARDS}/00000002.safetensors", "cannot be read (Permission denied"),
        (SHARDS, "cannot be read (Permission denied); change its permissions"),
        (".", "cannot be read (Permission denied); change its permissions"),
    ],
)
def test_what_may_not_be_read_is_said_to_be_so(built: Path, name: str, error: str) -> None:
    """Neither missing, nor impossible to write."""
    parent = Path(tempfile.mkdtemp())
    try:
        parent.chmod(0o755)
        path = Path(shutil.copytree(built, parent / "store"))
        stored_keys(Datastore(path))  # imports what the other user cannot
        (path / name).chmod(0)
        found = as_another_user(lambda: stored_keys(Datastore(path)))
        assert found.startswith("DatastoreCorruptError: ")
        assert error in found
        (path / name).chmod(0o755)
        assert as_another_user(lambda: stored_keys(Datastore(path))) == ""
        found = as_another_user(lambda: Datastore(path).forget(["d0"]))
        assert found.startswith("DatastoreWriteError: ")
        assert "not writable" in found
    finally:
        shutil.rmtree(parent)


def test_a_read_only_disk_can_be_read_and_is_not_written(
    tmp_path: Path, built: Path, llama_lm: LanguageModel
) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk:
        path = Path(shutil.copytree(built, disk.path / "store"))
        disk.make_read_only()
        store = Datastore(path)
        assert verify(store).problems == ()
        rows = torch.arange(3)
        found = ExactIndex(store).search(store.keys_at(rows).float(), 1)
        assert float(found.squared_distances.max()) < 1e-3
        assert store.passage(0).document.name == "d0"
        for write in (
            lambda: append_documents(path, llama_lm, distinct_documents(9)),
            lambda: store.forget(["d0"]),
            lambda: compact(store),
            lambda: store.save_parameters(Parameters(), {}),
        ):
            with refusal(DatastoreWriteError, str(path), "not writable"):
                write()
        with pytest.raises(InvalidArgumentError, match="k must be at least 1"):
            ExactIndex(store).search(torch.zeros(1, 32), 0)
        store.close()
