"""Imports: proved by reading the values again, atomic, and datastores like any other afterwards."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from kills import PLACES, ends_by_kill
from stores import assert_same, distinct_documents, stored_keys

import knnlm
from knnlm.apps.explorer.analysis import stores_to_dicts
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.facts import read_facts
from knnlm.datastore.origin import read_origin
from knnlm.errors import (
    DatastoreCorruptError,
    DatastoreMismatchError,
    InvalidArgumentError,
    NonFiniteKeysError,
)
from knnlm.exchange import staging
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

BLOCK, STRIDE = 64, 32
SIZES = {"window": 63, "context": 31}  # the last position of a block predicts nothing


@pytest.fixture(scope="module")
def peer(llama_lm: LanguageModel) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as knn-transformers keeps them, of two groups of texts."""
    text = "".join(
        document.text for document in distinct_documents(14) if isinstance(document.text, str)
    )
    tokens = llama_lm.encode([text])[0].tolist()
    return peers.knn_transformers_rows(llama_lm, [tokens[:1500], tokens[1500:]], BLOCK, STRIDE)


@pytest.fixture
def files(tmp_path: Path, peer: tuple[np.ndarray, np.ndarray]) -> Path:
    peers.write_knn_transformers(tmp_path / "files", *peer)
    return tmp_path / "files"


@pytest.fixture
def imported(tmp_path: Path, files: Path, llama_lm: LanguageModel) -> Datastore:
    return import_(tmp_path, llama_lm)


def import_(work: Path, lm: Any, **changes: Any) -> Datastore:
    options: dict[str, Any] = {"source": "knn-transformers", **SIZES, **changes}
    return knnlm.import_datastore(work / "store", work / "files", lm, **options)


def test_knn_transformers(
    tmp_path: Path, imported: Datastore, peer: tuple[np.ndarray, np.ndarray]
) -> None:
    keys, values = peer
    assert np.array_equal(stored_keys(imported).numpy(), keys)
    assert np.array_equal(imported.values.numpy(), values[:, 0])
    origin = read_origin(imported.catalog)
    assert origin is not None
    assert origin["verified"]
    assert origin["proof"]["exact"] >= 8, "the windows of the first group"
    assert origin["proof"]["alike"] == origin["proof"]["windows"]
    assert not knnlm.verify(imported).problems
    exported = knnlm.export_datastore(
        imported, tmp_path / "back", target="knn-transformers", model_type=peers.MODEL_TYPE
    )
    for name in exported.files:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


def test_the_default_sizes_are_those_of_the_tool(
    tmp_path: Path, files: Path, llama_lm: LanguageModel
) -> None:
    with refusal(InvalidArgumentError, "window must be at most 256", "got 1023"):
        import_(tmp_path, llama_lm, window=None, context=None)
    store = import_(tmp_path, "tiny", window=None, context=None, key="output", unverified=True)
    settings = store.settings
    assert (settings.window, settings.context, settings.boundary) == (1023, 511, "stream")
    assert settings.key == "output"


def other_model() -> LanguageModel:
    return LanguageModel(tiny_llama(seed=1), byte_tokenizer(), name="other")


def other_key() -> LanguageModel:
    return LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny", key="output_after_norm")


def shifted(keys: np.ndarray, values: np.ndarray) -> None:
    values[:] = np.roll(values, 1)


def second_half_of_another(keys: np.ndarray, values: np.ndarray) -> None:
    half = len(keys) // 2
    keys[half:] = keys[half:][::-1]


@pytest.mark.parametrize("change", [other_model, other_key])
def test_another_model_or_key_is_refused(
    tmp_path: Path, files: Path, change: Callable[[], LanguageModel]
) -> None:
    with refusal(DatastoreMismatchError, "keys must be those of", "agree exactly in 0"):
        import_(tmp_path, change())
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def break_value(row: int, value: int, keys: np.ndarray, values: np.ndarray) -> None:
    values[row] = value


def break_key(row: int, value: float, keys: np.ndarray, values: np.ndarray) -> None:
    keys[row] = value


BROKEN: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "shifted": (shifted, DatastoreMismatchError, "agree exactly in 0"),
    "half is of another": (second_half_of_another, DatastoreMismatchError, "nearly in"),
    "wrapped": (partial(break_value, 7, -3), DatastoreCorruptError, "row 7 is -3, an id below 0"),
    "beyond": (partial(break_value, 9, 384), DatastoreCorruptError, "row 9 is 384, outside"),
    "nan": (partial(break_key, 2000, np.nan), NonFiniteKeysError, "row 2000 is not finite"),
    "inf": (partial(break_key, 2000, np.inf), NonFiniteKeysError, "row 2000 is not finite"),
    "unwritten": (partial(break_key, 2000, 0), DatastoreCorruptError, "row 2000 is all zeros"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_entries_are_refused_and_leave_nothing(
    tmp_path: Path, peer: tuple[np.ndarray, np.ndarray], llama_lm: LanguageModel, case: str
) -> None:
    change, error, message = BROKEN[case]
    keys, values = (array.copy() for array in peer)
    change(keys, values)
    peers.write_knn_transformers(tmp_path / "files", keys, values)
    with refusal(error, message):
        import_(tmp_path, llama_lm)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_rows_that_were_never_written_can_be_left_out(
    tmp_path: Path, peer: tuple[np.ndarray, np.ndarray], llama_lm: LanguageModel
) -> None:
    keys, values = (array.copy() for array in peer)
    keys[2000:], values[2000:] = 0, 0
    peers.write_knn_transformers(tmp_path / "files", keys, values)
    with refusal(DatastoreCorruptError, "take only the 2000 rows before it"):
        import_(tmp_path, llama_lm)
    store = import_(tmp_path, llama_lm, max_entries=2000)
    assert np.array_equal(store.values.numpy(), values[:2000, 0])


def test_arguments_are_checked(tmp_path: Path, files: Path, llama_lm: LanguageModel) -> None:
    with refusal(InvalidArgumentError, "source must be one of", "knn-transformers"):
        import_(tmp_path, llama_lm, source="fairseq")
    with refusal(InvalidArgumentError, "lm must be the model", "got none"):
        import_(tmp_path, None)
    with refusal(InvalidArgumentError, "key must be given for an unverified import"):
        import_(tmp_path, "tiny", unverified=True)
    with refusal(InvalidArgumentError, "key must be ffn_input"):
        import_(tmp_path, llama_lm, key="output")
    with refusal(InvalidArgumentError, "cut_after must be a token that", "1 is not in it"):
        import_(tmp_path, llama_lm, cut_after=1)
    with refusal(InvalidArgumentError, "at least one whole window"):
        import_(tmp_path, llama_lm, max_entries=60)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes").touch()
    with refusal(InvalidArgumentError, "store exists already"):
        import_(tmp_path, llama_lm)
    shutil.rmtree(tmp_path / "store")
    import_(tmp_path, llama_lm)
    with refusal(InvalidArgumentError, "store is a datastore already"):
        import_(tmp_path, llama_lm)


def test_other_key_dtypes(
    tmp_path: Path, peer: tuple[np.ndarray, np.ndarray], llama_lm: LanguageModel
) -> None:
    keys, values = peer
    peers.write_original(tmp_path / "files", keys.astype(np.float32), values, np.float32, np.int64)
    options = {"source": "original", "unverified": True, "key": "ffn_input", "dimension": 32}
    assert import_(tmp_path, "tiny", **options).settings.key_dtype == "float32"
    shutil.rmtree(tmp_path / "store")
    store = import_(tmp_path, "tiny", **options, key_dtype="float16")
    assert np.array_equal(stored_keys(store).numpy(), keys)
    shutil.rmtree(tmp_path / "store")
    peers.write_original(
        tmp_path / "files", keys.astype(np.float32) * 1e6, values, np.float32, np.int64
    )
    with refusal(NonFiniteKeysError, "not finite", "choose another key_dtype"):
        import_(tmp_path, "tiny", **options, key_dtype="float16")


def test_documents_are_cut_at_a_token(tmp_path: Path, files: Path, llama_lm: LanguageModel) -> None:
    (end,) = llama_lm.encode(["\n"])[0].tolist()
    store = import_(tmp_path, llama_lm, cut_after=end, name="wiki")
    documents = store.documents()
    assert [document.name for document in documents[:2]] == ["wiki:1", "wiki:2"]
    ends = (store.values == end).nonzero()[:, 0] + 1
    assert [document.stop for document in documents][: len(ends)] == ends.tolist()
    row = documents[3].start + 1
    passage = store.passage(row)
    assert passage.before.tolist() == [int(store.values[row - 1])], "not of another document"
    store.forget(["wiki:2"])
    assert len(store) == store.rows - (documents[1].stop - documents[1].start)
    knnlm.compact(store)
    assert "wiki:2" not in [document.name for document in Datastore(store.path).documents()]
    again = knnlm.build(store.path, llama_lm, [Document("new", PROSE)])
    assert again.documents()[-1].name == "new"
    model = knnlm.KNNLM(llama_lm, again)
    assert model.explain(PROSE[:40])[-1].sources


def test_unverified_until_it_is_proved(
    tmp_path: Path, files: Path, llama_lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    store = import_(tmp_path, "tiny", key="ffn_input", unverified=True)
    origin = read_facts(store.path)["origin"]
    assert not origin["verified"]
    assert origin["proof"] is None
    with caplog.at_level(logging.WARNING):
        model = knnlm.KNNLM(llama_lm, store)
    assert "is unverified" in caplog.text
    assert model.perplexity([Document("held out", PROSE)]).unverified == (str(store.path),)
    assert stores_to_dicts(model.retrievers)[0]["is_unverified"], "on the explorer's page"
    with refusal(DatastoreMismatchError, "imported unverified", "knnlm import"):
        knnlm.build(store.path, llama_lm, [Document("new", PROSE)])
    with refusal(DatastoreMismatchError, "keys must be those of other"):
        knnlm.prove_import(store, other_model())
    with refusal(DatastoreMismatchError, "key ffn_input", "key output_after_norm"):
        knnlm.prove_import(store, other_key())
    proof = knnlm.prove_import(store, llama_lm)
    assert proof.exact >= 8
    reopened = Datastore(store.path)
    assert reopened.settings.weights_fingerprint == llama_lm.weights_fingerprint
    assert not reopened.is_unverified
    assert not knnlm.verify(reopened).problems
    caplog.clear()
    assert knnlm.KNNLM(llama_lm, reopened).mixer.unverified == ()
    assert "unverified" not in caplog.text
    knnlm.build(store.path, llama_lm, [Document("new", PROSE)])


def test_what_was_built_here_needs_no_proof(tmp_path: Path, llama_lm: LanguageModel) -> None:
    built = knnlm.build(tmp_path / "store", llama_lm, distinct_documents(1))
    assert read_facts(built.path)["origin"] is None
    with refusal(InvalidArgumentError, "must have been imported"):
        knnlm.prove_import(built, llama_lm)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_import_is_resumed(
    tmp_path: Path,
    files: Path,
    peer: tuple[np.ndarray, np.ndarray],
    llama_lm: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    monkeypatch.setattr(staging, "_SHARD_BYTES", 700 * 64)
    want = import_(tmp_path, llama_lm)
    whole = want.path.rename(tmp_path / "whole")
    for count in (1, 2, 3, 5, 8, 13):

        def work(count: int = count) -> None:
            PLACES[place](count)
            import_(tmp_path, llama_lm)

        killed = ends_by_kill(work)
        if (tmp_path / "store").exists():
            assert len(Datastore(tmp_path / "store")) == len(peer[0]), "whole or not there"
        else:
            import_(tmp_path, llama_lm)
        assert_same(Datastore(tmp_path / "store"), Datastore(whole))
        assert not knnlm.verify(tmp_path / "store").problems
        shutil.rmtree(tmp_path / "store")
        assert not (tmp_path / "store.importing").exists()
        if not killed:
            break


def test_leftovers_of_another_import_are_not_resumed(
    tmp_path: Path, files: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SHARD_BYTES", 700 * 64)

    def work() -> None:
        PLACES["after commit"](4)
        import_(tmp_path, llama_lm)

    assert ends_by_kill(work)
    assert (tmp_path / "store.importing").exists()
    assert import_(tmp_path, llama_lm, max_entries=900).rows == 900
    assert not (tmp_path / "store.importing").exists()
