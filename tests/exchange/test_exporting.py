"""Exports: what was imported comes back byte for byte, what was built comes back whole."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, refusal
from kills import PLACES, ends_by_kill
from stores import assert_same, distinct_documents, stored_keys

import knnlm
from knnlm.choices import ArrayFormat
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError, NonFiniteKeysError
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

DOCUMENTS = distinct_documents(6)


def model_type(target: str) -> str | None:
    return "llama" if target in (ArrayFormat.knn_transformers, ArrayFormat.arrow) else None


def round_trip(store: Datastore, lm: LanguageModel, target: str, folder: Path) -> Datastore:
    knnlm.export_datastore(store, folder, target=target, model_type=model_type(target))
    return knnlm.import_datastore(folder.with_suffix(".store"), folder, lm, source=target)


@pytest.mark.parametrize("target", list(ArrayFormat))
@pytest.mark.parametrize("boundary", ["document", "stream"])
def test_what_was_built_comes_back_whole(
    tmp_path: Path, llama_lm: LanguageModel, target: str, boundary: str
) -> None:
    store = knnlm.build(
        tmp_path / "store", llama_lm, DOCUMENTS, window=64, context=16, boundary=boundary
    )
    back = round_trip(store, llama_lm, target, tmp_path / "arrays")
    assert_same(back, store)
    assert back.settings == store.settings
    assert back.documents() == store.documents(), "with names, identities and fingerprints"
    more = [*DOCUMENTS, Document("more", PROSE)]
    grown, expected = (knnlm.build(each.path, llama_lm, more) for each in (back, store))
    assert grown.changes == expected.changes
    assert grown.changes is not None
    assert grown.changes.unchanged == len(DOCUMENTS)
    assert_same(grown, expected)


def test_forgotten_documents_are_left_out(tmp_path: Path, llama_lm: LanguageModel) -> None:
    store = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS, window=64)
    store.forget(["d0", "d3"])
    back = round_trip(store, llama_lm, "npy", tmp_path / "arrays")
    knnlm.compact(store)
    store.refresh()
    assert [document.name for document in back.documents()] == ["d1", "d2", "d4", "d5"]
    assert torch.equal(back.values, store.values)
    assert torch.equal(stored_keys(back), stored_keys(store))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wider_keys(tmp_path: Path, llama_lm: LanguageModel, dtype: str) -> None:
    store = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS[:2], key_dtype=dtype)
    exported = knnlm.export_datastore(store, tmp_path / "arrays")
    assert exported.key_dtype == "float32", "which holds every bfloat16"
    keys = np.load(tmp_path / "arrays" / "keys.npy")
    assert np.array_equal(keys, stored_keys(store).float().numpy())
    assert np.load(tmp_path / "arrays" / "vals.npy").dtype == np.int32


def test_what_stands_beside_the_arrays(tmp_path: Path, llama_lm: LanguageModel) -> None:
    store = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS[:2], window=64)
    exported = knnlm.export_datastore(store, tmp_path / "arrays", target="original")
    described = json.loads((tmp_path / "arrays" / "knnlm.json").read_text())
    assert described["keys"] == {"dtype": "float16", "shape": [store.rows, 32]}
    assert described["values"] == {"dtype": "int16", "shape": [store.rows]}
    assert described["settings"]["weights_fingerprint"] == llama_lm.weights_fingerprint
    assert described["order"].startswith("as stored")
    assert described["provenance"]["versions"]["knnlm"]
    lines = (tmp_path / "arrays" / "documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["d0", "d1"]
    assert exported.documents == 2
    sizes = [(tmp_path / "arrays" / name).stat().st_size for name in exported.files]
    assert sizes == [store.rows * 32 * 2, store.rows * 2]


def test_lists_of_documents_that_do_not_fit_are_refused(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    store = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS, window=64)
    knnlm.export_datastore(store, tmp_path / "arrays")
    listed = tmp_path / "arrays" / "documents.jsonl"
    lines = listed.read_text().splitlines(keepends=True)
    for text, message in [
        ("".join(lines[:-1]), "must list the documents of all"),
        ("".join(lines[1:]), "line 1: document 'd1' must begin at row 0"),
        (lines[0] + "{}\n", "line 2, must be a document"),
    ]:
        listed.write_text(text)
        with refusal(knnlm.DatastoreCorruptError, "documents.jsonl", message):
            knnlm.import_datastore(tmp_path / "back", tmp_path / "arrays", llama_lm, source="npy")
    listed.unlink()
    manifest = tmp_path / "arrays" / "knnlm.json"
    described = json.loads(manifest.read_text())
    for text in ("{}", "no JSON", json.dumps(described | {"first_block": "31"})):
        manifest.write_text(text)
        with refusal(knnlm.DatastoreCorruptError, "knnlm.json"):
            knnlm.import_datastore(tmp_path / "back", tmp_path / "arrays", llama_lm, source="npy")


def test_arguments_are_checked(tmp_path: Path, llama_lm: LanguageModel) -> None:
    store = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS[:1])
    with refusal(InvalidArgumentError, "target must be one of"):
        knnlm.export_datastore(store, tmp_path / "arrays", target="csv")
    with refusal(InvalidArgumentError, "model_type goes with knn-transformers"):
        knnlm.export_datastore(store, tmp_path / "arrays", target="knn-transformers")
    with refusal(InvalidArgumentError, "model_type goes with knn-transformers"):
        knnlm.export_datastore(store, tmp_path / "arrays", model_type="gpt2")
    with refusal(InvalidArgumentError, "part of a file's name"):
        knnlm.export_datastore(store, tmp_path / "a", target="arrow", model_type="a/b")
    with refusal(InvalidArgumentError, "store exists already"):
        knnlm.export_datastore(store, tmp_path / "store")
    store.forget(["d0"])
    with refusal(InvalidArgumentError, "is empty"):
        knnlm.export_datastore(store, tmp_path / "arrays")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_keys_that_the_format_cannot_hold(tmp_path: Path, llama_lm: LanguageModel) -> None:
    np.save(tmp_path / "keys.npy", np.full((3, 4), 1e6, np.float32))
    np.save(tmp_path / "vals.npy", np.arange(3))
    store = knnlm.import_datastore(
        tmp_path / "store",
        [tmp_path / "keys.npy", tmp_path / "vals.npy"],
        "any",
        source="npy",
        key="output",
        unverified=True,
    )
    with refusal(NonFiniteKeysError, "key of row 0 has 1e+06", "export it as npy"):
        knnlm.export_datastore(store, tmp_path / "arrays", target="arrow", model_type="llama")
    assert not list(tmp_path.glob("arrays*"))


@pytest.mark.parametrize("place", ["before fsync", "before rename", "after rename"])
def test_a_killed_export_is_whole_or_not_there(
    tmp_path: Path, llama_lm: LanguageModel, place: str
) -> None:
    store = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS[:2], window=64)
    wanted = knnlm.export_datastore(store, tmp_path / "wanted")

    def work() -> None:
        PLACES[place](1)
        knnlm.export_datastore(tmp_path / "store", tmp_path / "arrays")

    assert ends_by_kill(work)
    if (tmp_path / "arrays").exists():
        for name in wanted.files:
            exported = (tmp_path / "arrays" / name).read_bytes()
            assert exported == (tmp_path / "wanted" / name).read_bytes()
        shutil.rmtree(tmp_path / "arrays")
    knnlm.export_datastore(store, tmp_path / "arrays")
    assert not (tmp_path / "arrays.exporting").exists()
