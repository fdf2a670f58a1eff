"""Building and maintaining through the front door: the datastore comes with its index."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from stores import assert_same, distinct_documents

import knnlm
from knnlm.datastore.append import append_documents
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.facts import read_facts
from knnlm.errors import DatastoreMismatchError, InvalidArgumentError
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.policy import index_kind
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

DOCUMENTS = distinct_documents(12)


@pytest.fixture
def store(tmp_path: Path, llama_lm: LanguageModel) -> Datastore:
    return knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS, window=64, index="ivf")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with another key than the default."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LanguageModel(tiny_llama(), byte_tokenizer()).save(folder)
    return folder


def test_a_small_datastore_is_searched_exactly(tmp_path: Path, llama_lm: LanguageModel) -> None:
    built = knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS)
    assert isinstance(knnlm.open_index(built), ExactIndex)
    assert_same(built, append_documents(tmp_path / "other", llama_lm, DOCUMENTS))


def test_the_index_is_built_and_follows_the_datastore(
    store: Datastore, llama_lm: LanguageModel
) -> None:
    assert index_kind(store) == "ivf"
    rows = store.rows
    grown = knnlm.build(store.path, llama_lm, [*DOCUMENTS, Document("new", PROSE)])
    assert grown.rows > rows
    assert index_kind(grown) == "ivf", "by default as before"
    last = torch.tensor([grown.rows - 1])
    index = knnlm.open_index(grown)
    assert isinstance(index, IVFIndex)
    assert int(index.search(grown.keys_at(last).float(), 1).rows) == grown.rows - 1
    assert index_kind(knnlm.build(store.path, llama_lm, DOCUMENTS, index="exact")) == "exact"


@pytest.mark.parametrize("by_path", [True, False])
def test_compact_renews_the_index(store: Datastore, by_path: bool) -> None:
    store.forget(["d1", "d5"])
    removed = knnlm.compact(str(store.path) if by_path else store)
    assert (removed.documents, removed.rows > 0) == (2, True)
    store.refresh()
    index = knnlm.open_index(store)
    assert index_kind(store) == "ivf"
    assert int(index.search(store.keys_at(torch.tensor([3])).float(), 1).rows) == 3
    assert knnlm.verify(store.path if by_path else store).problems == ()


def test_a_model_can_be_named(tmp_path: Path, saved: Path) -> None:
    built = knnlm.build(tmp_path / "store", saved, DOCUMENTS[:2], window=64)
    assert built.settings.model == str(saved)
    assert built.settings.model_dtype == "float32"

    output = LanguageModel.load(saved, key="output")
    knnlm.build(tmp_path / "output", output, DOCUMENTS[:2])
    again = knnlm.build(tmp_path / "output", str(saved), DOCUMENTS[:3])
    assert again.settings.key == "output", "an existing datastore's own key"
    assert len(again.documents()) == 3


def test_documents_can_be_paths(tmp_path: Path, llama_lm: LanguageModel) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text(f"{path.name}: {PROSE}")
    forms: list[Any] = [paths, [str(path) for path in paths], str(tmp_path / "*.txt")]
    forms += [knnlm.read_documents(*paths), (document for document in knnlm.read_documents(*paths))]
    built = [
        knnlm.build(tmp_path / f"{number}.store", llama_lm, form)
        for number, form in enumerate(forms)
    ]
    assert [d.name for d in built[0].documents()] == [str(path) for path in paths]
    for other in built[1:]:
        assert_same(other, built[0])


def test_an_iterator_is_checked_as_it_is_consumed(tmp_path: Path, llama_lm: LanguageModel) -> None:
    def mixed() -> Iterator[Any]:
        yield DOCUMENTS[0]
        yield "a.txt"

    with refusal(InvalidArgumentError, "documents must be an iterable of Document", "got str"):
        knnlm.build(tmp_path / "store", llama_lm, mixed())
    assert not (tmp_path / "store").exists()


def test_wrong_types_are_refused_in_one_line(tmp_path: Path) -> None:
    """In another process, because in this one every function checks its arguments' types."""
    program = """if True:
        import knnlm
        document = knnlm.Document("d", "text")
        for lm, documents in [
            ("name", 3),
            ("name", None),
            ("name", document),
            ("name", [document, 4.5]),
            ("name", ["a.txt", document]),
            (7, [document]),
        ]:
            try:
                knnlm.build("new.store", lm, documents)
            except knnlm.InvalidArgumentError as error:
                print(error)
    """
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    *document_errors, lm_error = answer.stdout.splitlines()
    kinds = ["int", "NoneType", "Document", "float among others", "str among others"]
    assert document_errors == [
        f"documents must be an iterable of Document objects, or paths of texts, got {kind}: see "
        "read_documents"
        for kind in kinds
    ]
    assert lm_error == (
        "lm must be a LanguageModel, or the name or path of one, got int: wrap a transformers "
        "model and its tokenizer in LanguageModel"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ("annoy", ["index must be one of auto, exact", "got 'annoy'"]),
        ("faiss", ["index faiss needs a factory"]),
    ],
)
def test_an_index_that_cannot_be_built_is_refused_before_any_work(
    tmp_path: Path, llama_lm: LanguageModel, index: str, parts: list[str]
) -> None:
    with refusal(InvalidArgumentError, *parts):
        knnlm.build(tmp_path / "store", llama_lm, DOCUMENTS[:1], index=index)
    assert not (tmp_path / "store").exists()


def test_another_model_by_name_is_refused(store: Datastore, tmp_path: Path) -> None:
    LanguageModel(tiny_llama(seed=1), byte_tokenizer()).save(tmp_path / "other")
    with refusal(DatastoreMismatchError, "was built with tiny", "not with"):
        knnlm.build(store.path, tmp_path / "other", DOCUMENTS)


# facts


def test_facts_are_those_of_the_open_datastore(store: Datastore, llama_lm: LanguageModel) -> None:
    knnlm.build(store.path, llama_lm, [Document("long", PROSE * 5)], max_entries=store.rows + 130)
    store.forget(["d2"])
    store.save_parameters(Parameters(k=3), {"tokens": 12})
    facts = read_facts(store.path)
    assert facts == {
        "path": str(store.path),
        "entries": len(store),
        "forgotten_entries": store.forgotten_rows,
        "documents": 12,
        "incomplete_documents": ["long"],
        "shards": 2,
        "size_bytes": sum(f.stat().st_size for f in (store.path / "shards").iterdir()),
        "generation": store.generation,
        "settings": facts["settings"],
        "origin": None,
        "parameters": {"k": 3, "lmbda": 0.25, "temperature": 1.0},
        "tuning": {"tokens": 12},
    }
    assert facts["settings"]["window"] == 64
    listed = read_facts(str(store.path), list_documents=True)["document_list"]
    assert [tuple(each.values()) for each in listed] == [
        (d.name, d.start, d.stop, d.complete) for d in store.documents()
    ]


@pytest.mark.parametrize("module", ["catalog", "facts"])
def test_facts_are_light(store: Datastore, module: str) -> None:
    """Neither torch nor its like is loaded, even to read the facts of a datastore."""
    program = (
        f"import sys, knnlm.datastore.{module} as m; "
        f"getattr(m, 'read_facts', len)({str(store.path)!r}); "
        "sys.stdout.write(' '.join(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(answer.stdout.split())
    assert f"knnlm.datastore.{module}" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "safetensors", "numpy", "jaxtyping"})


def test_facts_of_a_damaged_datastore_are_refused(store: Datastore, tmp_path: Path) -> None:
    path = Path(shutil.copytree(store.path, tmp_path / "copy"))
    (path / "shards" / "00000001.safetensors").unlink()
    with refusal(knnlm.DatastoreCorruptError, "00000001.safetensors is missing, written with"):
        read_facts(path)
    with refusal(knnlm.DatastoreNotFoundError, "is not a datastore"):
        read_facts(tmp_path / "nothing")
