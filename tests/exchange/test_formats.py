"""The files of other tools: what they hold is read from them, and what cannot be is refused."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from conftest import refusal

from knnlm.choices import ArrayFormat
from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreNotFoundError,
    InvalidArgumentError,
    MissingDependencyError,
)
from knnlm.exchange.entries import Entries
from knnlm.exchange.files import find_files

ROWS, DIMENSION = 301, 6
GENERATOR = np.random.default_rng(0)
KEYS = GENERATOR.normal(size=(ROWS, DIMENSION)).astype(np.float16)
VALUES = GENERATOR.integers(0, 32_000, ROWS)


def check(entries: Entries, key_dtype: torch.dtype = torch.float16) -> None:
    assert (entries.rows, entries.dimension) == (ROWS, DIMENSION)
    assert entries.key_dtype == key_dtype
    for start, stop in [(0, ROWS), (0, 0), (17, 18), (95, 205)]:
        keys = torch.from_numpy(KEYS[start:stop]).to(key_dtype)
        assert torch.equal(entries.keys(start, stop), keys)
        assert torch.equal(entries.values(start, stop), torch.from_numpy(VALUES[start:stop]))


@pytest.mark.parametrize("key_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value_dtype", [np.int16, np.int32, np.int64])
def test_raw_files_without_a_size(tmp_path: Path, key_dtype: type, value_dtype: type) -> None:
    peers.write_original(tmp_path, KEYS, VALUES, key_dtype, value_dtype)
    dtype = torch.float16 if key_dtype is np.float16 else torch.float32
    check(find_files([tmp_path], ArrayFormat.original).open(DIMENSION), dtype)
    both = [tmp_path / "dstore_vals.npy", tmp_path / "dstore_keys.npy"]
    check(find_files(both, ArrayFormat.original).open(DIMENSION), dtype)


def test_ids_of_large_vocabularies(tmp_path: Path) -> None:
    values = GENERATOR.integers(0, 262_144, ROWS)
    peers.write_original(tmp_path, KEYS, values, np.float16, np.int32)
    entries = find_files([tmp_path], ArrayFormat.original).open(DIMENSION)
    assert torch.equal(entries.values(0, ROWS), torch.from_numpy(values))


def test_knn_transformers(tmp_path: Path) -> None:
    peers.write_knn_transformers(tmp_path, KEYS, VALUES)
    (tmp_path / "index_llama_301_6.indexed").write_bytes(b"index")
    check(find_files([tmp_path], ArrayFormat.knn_transformers).open(None))


def test_knn_box(tmp_path: Path) -> None:
    peers.write_knn_box(tmp_path, KEYS, VALUES)
    check(find_files([tmp_path], ArrayFormat.knn_box).open(None))
    peers.write_knn_box(tmp_path, KEYS.astype(np.float32), VALUES)
    check(find_files([tmp_path], ArrayFormat.knn_box).open(None), torch.float32)


@pytest.mark.parametrize("footer", [False, True])
def test_arrow(tmp_path: Path, footer: bool) -> None:
    first = tmp_path / "dstore_llama_train_6.arrow"
    peers.write_arrow(first, KEYS[:200], VALUES[:200], 90, footer=footer)
    peers.write_arrow(tmp_path / "more.arrow", KEYS[200:], VALUES[200:], 1000, footer=footer)
    check(find_files([first, tmp_path / "more.arrow"], ArrayFormat.arrow).open(None))
    check(find_files([tmp_path], ArrayFormat.arrow).open(None))


def test_arrow_lists_of_any_length(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")

    def write(keys: Sequence[Sequence[float]]) -> list[Path]:
        table = arrow.table(
            {
                "keys": arrow.array(keys, type=arrow.list_(arrow.float32())),
                "vals": arrow.array(range(len(keys))),
            }
        )
        with (
            arrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
            arrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=2)
        return [tmp_path / "a.arrow"]

    entries = find_files(write([[1, 2], [3, 4], [5, 6]]), ArrayFormat.arrow).open(None)
    assert entries.keys(1, 3).tolist() == [[3, 4], [5, 6]]
    for ragged in ([[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0, 4.0], [5.0]]):
        with refusal(DatastoreCorruptError, "a.arrow", "one length"):
            find_files(write(ragged), ArrayFormat.arrow).open(None)


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", KEYS)
    for values in (VALUES, VALUES[:, None].astype(np.int32)):
        np.save(tmp_path / "vals.npy", values)
        check(find_files([tmp_path], ArrayFormat.npy).open(None))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def raw(folder: Path, break_it: Callable[[Path], object]) -> None:
    peers.write_knn_transformers(folder, KEYS, VALUES)
    break_it(next(folder.glob("*_keys.npy")))


def save_npy(folder: Path, keys: np.ndarray) -> None:
    np.save(folder / "keys.npy", keys, allow_pickle=True)
    np.save(folder / "vals.npy", VALUES)


IMPOSSIBLE: dict[str, tuple[ArrayFormat, Callable[[Path], object], str]] = {
    "cut keys": (ArrayFormat.knn_transformers, lambda f: raw(f, cut), "keys.npy must have"),
    "the name of another file": (
        ArrayFormat.knn_transformers,
        lambda f: raw(f, lambda keys: keys.rename(f / "dstore_llama_301_7_keys.npy")),
        "dstore_llama_301_7_keys.npy must have the bytes of 2107 numbers",
    ),
    "another dimension": (
        ArrayFormat.original,
        lambda f: peers.write_original(f, KEYS[:, :5], VALUES, np.float16, np.int32),
        "no number of rows fits",
    ),
    "empty": (
        ArrayFormat.original,
        lambda f: [(f / name).write_bytes(b"") for name in ("a_keys.npy", "a_vals.npy")],
        "a_keys.npy must hold entries, but it is empty",
    ),
    "knn-box shapes": (
        ArrayFormat.knn_box,
        lambda f: peers.write_knn_box(f, KEYS, VALUES[:-1]),
        "as many keys as values",
    ),
    "npy shapes": (
        ArrayFormat.npy,
        lambda f: save_npy(f, KEYS[0]),
        "keys.npy must be float16 or float32 [rows, dimension]",
    ),
    "npy objects": (
        ArrayFormat.npy,
        lambda f: save_npy(f, np.array([{}])),
        "keys.npy must be a .npy array",
    ),
    "no arrow": (
        ArrayFormat.arrow,
        lambda f: (f / "x.arrow").write_bytes(b"abc" * 99),
        "x.arrow must be an Arrow file",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    source, write, message = IMPOSSIBLE[case]
    write(tmp_path)
    with refusal(DatastoreCorruptError, message):
        find_files([tmp_path], source).open(DIMENSION if source is ArrayFormat.original else None)


def test_what_is_not_there_or_not_said(tmp_path: Path) -> None:
    with refusal(InvalidArgumentError, "got none"):
        find_files([], ArrayFormat.npy)
    with refusal(DatastoreNotFoundError, "nowhere"):
        find_files([tmp_path / "nowhere"], ArrayFormat.npy)
    with refusal(DatastoreNotFoundError, "one file of keys", "none"):
        find_files([tmp_path], ArrayFormat.original)
    with refusal(DatastoreNotFoundError, ".arrow files"):
        find_files([tmp_path], ArrayFormat.arrow)
    peers.write_original(tmp_path, KEYS, VALUES, np.float16, np.int32)
    with refusal(InvalidArgumentError, "dimension must be given"):
        find_files([tmp_path], ArrayFormat.original).open(None)
    with refusal(DatastoreNotFoundError, "config.json"):
        find_files([tmp_path], ArrayFormat.knn_box).open(None)
    np.save(tmp_path / "more_keys.npy", KEYS)
    with refusal(DatastoreNotFoundError, "one file of keys", "dstore_keys.npy, more_keys.npy"):
        find_files([tmp_path], ArrayFormat.original)
    with refusal(InvalidArgumentError, "one folder"):
        find_files([tmp_path, tmp_path / "more_keys.npy"], ArrayFormat.original)
    mixed = [tmp_path / "more_keys.npy", tmp_path / "dstore_vals.npy"]
    with refusal(InvalidArgumentError, "more_keys.npy", "header"):
        find_files(mixed, ArrayFormat.original).open(DIMENSION)
    peers.write_knn_transformers(tmp_path / "named", KEYS, VALUES)
    with refusal(InvalidArgumentError, "dimension must be that of the keys", "6, got 7"):
        find_files([tmp_path / "named"], ArrayFormat.knn_transformers).open(7)


def test_arrow_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.arrow").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refusal(MissingDependencyError, "pyarrow", "knnlm[data]"):
        find_files([tmp_path], ArrayFormat.arrow).open(None)
