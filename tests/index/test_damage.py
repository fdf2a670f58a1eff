"""A bit flipped anywhere: verify finds it, and no answer is wrong where opening could tell."""

import json
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from index_contract import append, clustered, store_of

from knnlm.datastore.catalog import FILE_NAME
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.verification import verify
from knnlm.errors import DatastoreCorruptError
from knnlm.index.policy import build_index, keep_index, open_index
from knnlm.mixture.parameters import Parameters

pytest.importorskip("faiss")
QUERIES = clustered(12, seed=1)
FLIPS = 60  # of each file
PAYLOAD = ("codes", "keys", "steps", "half_norms")  # too large to be checked at opening


def made(path: Path, kind: str) -> Path:
    """Make a datastore with an index, appended rows, forgotten documents and parameters."""
    store = store_of(path, clustered(700).half())
    options: dict[str, Any] = {"factory": "IVF8,Flat"} if kind == "faiss" else {}
    build_index(store, kind, nprobe=8, k=8, **options)
    append(path, clustered(90, seed=2).half(), 2, "new")
    store.refresh()
    keep_index(store)
    store.forget(["d3", "new1"])
    store.save_parameters(Parameters(k=8, lmbda=0.25), {"tokens": 5})
    store.close()
    return path


@pytest.fixture(scope="module", params=["ivf", "compressed", "faiss"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("damage") / "store", request.param)


def answers(path: Path) -> tuple[Any, ...]:
    """Return all that a caller is told, or the error alone."""
    try:
        return answers_of(Datastore(path))
    except DatastoreCorruptError as error:
        return (str(error),)


def refused(told: tuple[Any, ...], file: Path) -> bool:
    """Whether answers are an error that names a file, or a file in a folder."""
    return len(told) == 1 and str(file) in told[0]


def answers_of(store: Datastore) -> tuple[Any, ...]:
    try:
        found = open_index(store).search(QUERIES, 8)
        passages = [store.passage(int(row)) for row in found.rows[:, 0]]
        return (
            found.squared_distances.tolist(),
            found.rows.tolist(),
            store.parameters,
            store.tuning,
            store.documents(),
            [(p.document, p.before.tolist(), p.value, p.after.tolist()) for p in passages],
        )
    finally:
        store.close()


def problems(path: Path) -> list[str]:
    try:
        store = Datastore(path)
    except DatastoreCorruptError as error:
        return [str(error)]
    try:
        return list(verify(store).problems)
    finally:
        store.close()


def says(catalog: Path) -> list[Any] | None:
    """Return all that a catalog says, None if it cannot be read: the rest is unused space."""
    connection = sqlite3.connect(catalog)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()
        return [version, *connection.iterdump()]
    except (sqlite3.Error, UnicodeDecodeError):
        return None
    finally:
        connection.close()


def in_payload(file: Path, place: int) -> bool:
    """Whether a byte belongs to keys, codes or values, which only `verify` reads whole."""
    data = file.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    if place < header_bytes:
        return False
    header = json.loads(data[8:header_bytes])
    if "values" in header:
        return True
    names = [
        name
        for name, entry in header.items()
        if name != "__metadata__"
        and entry["data_offsets"][0] <= place - header_bytes < entry["data_offsets"][1]
    ]
    return names[0] in PAYLOAD


def test_a_flipped_bit_is_found_by_verify_and_never_a_wrong_answer(path: Path) -> None:
    assert problems(path) == []
    right = answers(path)
    chance = random.Random(0)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    assert len(files) >= 4
    for file in files:
        sound = file.read_bytes()
        said = says(file) if file.name == FILE_NAME else None
        starts = list(range(0, len(sound), max(1, len(sound) // FLIPS)))
        for place in {
            *range(min(20, len(sound))),
            *(start + chance.randrange(3) for start in starts),
        }:
            if place >= len(sound):
                continue
            damaged = bytearray(sound)
            damaged[place] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            unused = file.name == FILE_NAME and says(file) == said
            found = problems(path)
            assert found or unused, (file, place)
            assert not any("\n" in problem for problem in found)
            told = answers(path)
            payload = file.suffix == ".safetensors" and in_payload(file, place)
            assert told == right or refused(told, path) or payload, (file, place)
        file.write_bytes(sound)
    assert problems(path) == []


SETTINGS = ["parameters", "parameters again", "tuning", "index", "generation", "datastore"]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_flipped_byte_of_a_setting_is_found(tmp_path: Path, path: Path, name: str) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "store"))
    catalog = copy / FILE_NAME
    connection = sqlite3.connect(catalog)
    (value,) = connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    connection.close()
    right, sound = answers(copy), catalog.read_bytes()
    chance = random.Random(0)
    places = [chance.randrange(len(value)) for _ in range(30)]
    for place in places:
        damaged = value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]
        connection = sqlite3.connect(catalog)
        with connection:
            connection.execute("UPDATE settings SET value = ? WHERE name = ?", (damaged, name))
        connection.close()
        assert problems(copy)
        told = answers(copy)
        assert told == right or refused(told, catalog)
        catalog.write_bytes(sound)


def test_a_damaged_index_is_built_again(tmp_path: Path, path: Path) -> None:
    for damage in ("cut", "gone", "bounds"):
        copy = Path(shutil.copytree(path, tmp_path / damage))
        for file in (copy / "index").rglob("*"):
            if file.is_dir():
                continue
            if damage == "gone":
                file.unlink()
            else:
                data = file.read_bytes()
                middle = 8 + int.from_bytes(data[:4], "little") if "ivf" in file.name else 50
                changed = data[: middle - 40] + bytes([255]) * 40 + data[middle:]
                file.write_bytes(data[:-100] if damage == "cut" else changed)
            with pytest.raises(DatastoreCorruptError, match=f"{file.name}.*run: knnlm index"):
                open_index(Datastore(copy))
            break
        store = Datastore(copy)
        assert len(store.documents()) == 10
        keep_index(store)
        assert verify(store).problems == ()
        assert bool((open_index(store).search(QUERIES, 8).rows >= 0).all())


def test_values_that_no_model_has_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", clustered(200).half())
    file = sorted((store.path / "shards").iterdir())[0]
    data = bytearray(file.read_bytes())
    values = torch.arange(100, dtype=torch.int32).numpy().tobytes()
    place = data.find(values)
    data[place + 3] = 64
    file.write_bytes(data)
    opened = Datastore(store.path)
    for read in (lambda: opened.values, lambda: opened.passage(0), lambda: opened.passage(5)):
        with pytest.raises(DatastoreCorruptError, match=f"{file.name}: a value is outside"):
            read()


def test_keys_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", clustered(200).half())
    file = sorted((store.path / "shards").iterdir())[0]
    data = bytearray(file.read_bytes())
    key = store.keys_at(torch.tensor([7]))[0].numpy().tobytes()
    place = data.find(key)
    data[place : place + 2] = b"\x00\x7e"
    file.write_bytes(data)
    opened = Datastore(store.path)
    with pytest.raises(DatastoreCorruptError, match=f"{file.name}: the key of row 7, "):
        opened.keys_at(torch.arange(20))
    with pytest.raises(DatastoreCorruptError, match=f"{file.name}: the key of row 7, "):
        build_index(opened, "ivf")
    opened.forget(["d0"])
    assert len(opened.keys_at(torch.arange(20))) == 20, "until compact the forgotten may be read"


def test_strays_are_named_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", clustered(200).half())
    build_index(store, "ivf", nprobe=1, k=8)
    inside = [
        store.path / name
        for name in ("shards/7.part", "index/ivf-9.safetensors", "index/faiss/1.index")
    ]
    beside = store.path / "notes.txt"
    for file in [*inside, beside]:
        file.parent.mkdir(exist_ok=True)
        file.write_text("stray")
    (store.path / "tuning.png").write_text("belongs")
    found = verify(store).problems
    assert len(found) == 4
    for file in [*inside, beside]:
        assert any(problem.startswith(f"{file}: does not belong") for problem in found)
    with store.writer():
        pass
    (problem,) = verify(store).problems
    assert problem == f"{beside}: does not belong to the datastore; remove it"
