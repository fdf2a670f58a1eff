"""Tuning on the datastore's own text: what is read, what has no vote, and when it is done."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from stores import stored_keys

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.near_copies import find_copies, places_of_rows
from knnlm.errors import DatastoreCorruptError, DatastoreMismatchError, InvalidArgumentError
from knnlm.evaluation.scoring import CacheRequest, ScoreRequest, score_documents
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build, compact
from knnlm.mixture.features import GateInput
from knnlm.mixture.gate import LearnedGate
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import read_keys
from knnlm.text.documents import Document
from knnlm.tuning import upkeep
from knnlm.tuning.fitting import fit_mixture
from knnlm.tuning.held_out import CACHE_K, CACHE_SIZES, at_most
from knnlm.tuning.left_out import Queries, leave_out, search_others
from knnlm.tuning.stored_text import read_stored
from knnlm.tuning.stored_windows import sample_windows
from knnlm.tuning.tune import tune
from knnlm.tuning.upkeep import keep_tuned

WORDS = sorted(set(PROSE.replace(".", "").replace(";", "").replace(",", "").split()))


def page(seed: int, words: int) -> str:
    """Return a text of its own: no two have more than a few words in the same order."""
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, words)) + ".\n"


def pages(count: int, words: int = 60) -> list[Document]:
    return [Document(f"p{number}", page(number, words)) for number in range(count)]


@pytest.fixture(scope="module")
def store(llama_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    path = tmp_path_factory.mktemp("stored") / "store"
    return build(path, llama_lm, pages(8), window=48, context=16)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune on less, with gates that hardly learn."""
    monkeypatch.setattr(upkeep, "_LEAST_TOKENS", 200)
    monkeypatch.setattr("knnlm.tuning.fitting.LEAST_TOKENS", 600)
    monkeypatch.setattr("knnlm.tuning.gate_training._LEAST_STEPS", 60)
    monkeypatch.setattr("knnlm.tuning.gate_training._EPOCHS", 1)


# which windows are read


@pytest.mark.parametrize("context", [0, 16])
@pytest.mark.parametrize("boundary", ["document", "stream"])
def test_windows_are_those_of_the_build(
    llama_lm: LanguageModel, tmp_path: Path, boundary: str, context: int
) -> None:
    documents = pages(7)
    for stored in (documents[:4], documents[4:]):  # a stream's windows begin anew
        store = build(
            tmp_path / "s",
            llama_lm,
            stored,
            window=48,
            context=context,
            boundary=boundary,
            key_dtype="float32",
        )
    store.forget(["p5"])
    windows = sample_windows(store, llama_lm.start_token, 10**6, 0)
    rows = torch.cat([torch.arange(one.row, one.row + one.window.new) for one in windows])
    assert bool(store.alive[rows].all())
    assert len(set(rows.tolist())) == len(rows)
    if boundary == "document":
        assert len(rows) == len(store)
    else:  # a block around the forgotten page, and one whose context is not stored
        assert len(rows) > len(store) - 3 * 48
    targets = np.concatenate([one.window.targets for one in windows])
    assert np.array_equal(targets, store.values[rows].numpy())
    keys = dict(read_keys(llama_lm, [one.window for one in windows]))
    again = torch.cat([keys[number] for number in range(len(windows))])
    assert torch.allclose(again, store.keys_at(rows), atol=1e-4)


def test_a_sample_is_spread_over_all_of_the_datastore(store: Datastore) -> None:
    def sampled(tokens: int, seed: int = 0) -> list[int]:
        windows = sample_windows(store, 0, tokens, seed)
        assert 0.8 * tokens <= sum(one.window.new for one in windows) <= tokens
        return [one.row for one in windows]

    places = places_of_rows(store)
    rows = sampled(len(store) // 3)
    assert rows == sorted(rows)
    assert len({int(places[row]) for row in rows}) >= 6, "of 8 documents"
    assert rows == sampled(len(store) // 3)
    assert rows != sampled(len(store) // 3, seed=1)
    assert len(sampled(1)) == 1
    assert sampled(1, seed=-1)


def test_the_cache_is_filled_with_what_came_before_a_window(
    llama_lm: LanguageModel, store: Datastore
) -> None:
    text = read_stored(KNNLM(llama_lm, store), 4).text
    request = ScoreRequest((), CacheRequest(CACHE_SIZES, CACHE_K), summary=True)
    (expected,) = score_documents(llama_lm, pages(8), store.windowing, request).scores
    assert torch.equal(text.targets, expected.targets)
    assert torch.allclose(text.lm_log_probs, expected.lm_log_probs, atol=1e-4)
    for own, other in zip(text.cache_neighbors, expected.cache_neighbors, strict=True):
        width = min(own.tokens.shape[1], other.tokens.shape[1])
        ages, found = own.squared_distances[:, :width], other.squared_distances[:, :width]
        assert torch.equal(ages.isinf(), found.isinf())
        close = torch.isclose(ages, found, rtol=0.02, atol=0.05) | ages.isinf()
        assert close.float().mean() > 0.999, "but for the float16 of stored keys"


# what has no vote


def test_copies_and_near_copies_are_found(llama_lm: LanguageModel, tmp_path: Path) -> None:
    license_text, common = page(100, 60), page(101, 200)
    edited = f"{common[:300]} and {common[300:]}"
    texts = {
        "one": license_text + page(1, 150),
        "two": license_text + page(2, 150),
        "version 1": common,
        "version 2": edited,
        "all in one": page(3, 250) + common + page(4, 250),
        "short": "A memory.",
        "short again": "A memory.",
        "short too": "A memory of",
    }
    documents = [Document(name, text) for name, text in texts.items()]
    store = build(tmp_path / "s", llama_lm, documents, window=64)
    other = build(tmp_path / "t", llama_lm, [Document("again", common)], window=64)
    found, there = find_copies(store, range(len(texts)), [store, other])
    names = list(texts)
    copies = {
        name: {names[place] for place in places} - {name}
        for name, places in zip(names, found, strict=True)
    }
    versions = {"version 1", "version 2", "all in one"}
    assert copies == {
        "one": set(),
        "two": set(),
        **{name: versions - {name} for name in versions},
        "short": {"short again"},
        "short again": {"short"},
        "short too": set(),
    }
    assert [len(places) for places in there] == [0, 0, 1, 1, 1, 0, 0, 0]


def test_a_search_of_others_equals_brute_force(llama_lm: LanguageModel, tmp_path: Path) -> None:
    """Pages, one of which is there twice, and one that is most of the datastore."""
    documents = [*pages(5), Document("copy", page(2, 60)), Document("long", page(9, 400))]
    store = build(tmp_path / "s", llama_lm, documents, window=32)
    (retriever,) = at_most(20, KNNLM(llama_lm, store).retrievers)
    places = places_of_rows(store)
    chosen = list(range(len(documents)))
    (left_out,) = leave_out(store, chosen, [store])
    rows = np.arange(0, store.rows, 3)
    keys = store.keys_at(torch.from_numpy(rows)).float()
    found = search_others(retriever, Queries(rows, places[rows].astype(np.int64)), keys, left_out)

    all_keys, reach = stored_keys(store).double(), max(len(store) // 20, 32)
    for number, row in enumerate(rows.tolist()):
        distances = (all_keys - keys[number].double()).square().sum(dim=1)
        for other in range(store.rows):
            same = places[other] == places[row] or {places[other], places[row]} == {2, 5}
            if same and (places[row] != 6 or abs(other - row) <= reach):
                distances[other] = torch.inf
        nearest = distances.topk(20, largest=False).values
        assert torch.allclose(found.squared_distances[number].double(), nearest, rtol=1e-3)
        assert len(set(found.rows[number].tolist())) == 20
        assert torch.allclose(distances[found.rows[number]], nearest, rtol=1e-3)


def test_where_all_documents_are_copies_the_lm_is_left_alone(
    few_tokens: None, llama_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_LEAST_TOKENS", 800)
    text = page(0, 60)
    copies = [Document(f"c{n}", f"{n} {text} {n}") for n in range(7)]
    store = build(tmp_path / "s", llama_lm, copies, window=64, tune=True)
    tuning = store.tuning
    assert tuning is not None
    assert tuning["tokens"] > 600, "enough for a gate"
    assert tuning["stored"]["alone"] == tuning["tokens"]
    assert tuning["stored"]["copies"] == 7
    assert store.parameters is not None
    assert store.parameters.lmbda == 0.0
    report = KNNLM(llama_lm, store).perplexity(pages(2))
    assert report.knn.perplexity <= report.lm.perplexity * 1.0001


def test_of_a_single_document_the_neighborhood_is_left_out(
    llama_lm: LanguageModel, tmp_path: Path
) -> None:
    store = build(tmp_path / "s", llama_lm, [Document("book", page(0, 500))], window=64)
    (retriever,) = at_most(8, KNNLM(llama_lm, store).retrievers)
    rows = np.arange(store.rows)
    (left_out,) = leave_out(store, [0], [store])
    keys = store.keys_at(torch.from_numpy(rows)).float()
    found = search_others(retriever, Queries(rows, np.zeros(len(rows), np.int64)), keys, left_out)
    assert int((found.rows - torch.from_numpy(rows)[:, None]).abs().amin()) == 65
    tuning = tune(KNNLM(llama_lm, store), max_k=8)
    assert tuning.stored is not None
    assert tuning.stored.large == tuning.tokens == len(store)
    assert tuning.stored.alone == 0


def test_several_datastores_are_tuned_on_the_first(
    llama_lm: LanguageModel, store: Datastore, tmp_path: Path
) -> None:
    other = build(tmp_path / "s", llama_lm, [*pages(2), *pages(12)[10:]], window=48)
    tuning = tune(KNNLM(llama_lm, [store, other]), max_k=8)
    assert tuning.stored is not None
    assert tuning.tokens == len(store)
    assert tuning.stored.copies == 2, "the two pages that both have"
    assert len(tuning.parameters) == 2


# the result


def test_a_seed_repeats_a_tuning(llama_lm: LanguageModel, store: Datastore) -> None:
    model = KNNLM(llama_lm, store)
    found = [tune(model, max_k=8, max_tokens=400, seed=seed).to_dict() for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_stored_and_held_out_text_together(llama_lm: LanguageModel, store: Datastore) -> None:
    model, held_out = KNNLM(llama_lm, store), pages(9)[8:]
    together = tune(model, held_out, stored=True, max_k=8, max_tokens=300)
    assert together.stored is not None
    assert together.overlap is not None
    alone = tune(model, held_out, max_k=8, max_tokens=300)
    assert alone.stored is None
    assert together.tokens == together.stored.tokens + alone.tokens


def test_a_build_and_nothing_else_is_no_worse_than_the_lm(
    few_tokens: None, llama_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_LEAST_TOKENS", 800)
    store = build(tmp_path / "s", llama_lm, pages(12), window=64, tune=True)
    report = KNNLM(llama_lm, store).perplexity(pages(15)[12:])
    assert report.weights == "learned"
    assert report.knn.perplexity < 0.8 * report.lm.perplexity


def test_refusals(llama_lm: LanguageModel, store: Datastore) -> None:
    model = KNNLM(llama_lm, store)
    with refusal(InvalidArgumentError, "documents must be given where stored is False"):
        tune(model, stored=False)
    with refusal(InvalidArgumentError, "documents must be given where", "windowing"):
        tune(model, windowing=store.windowing)
    with refusal(InvalidArgumentError, "max_tokens must be at least 1, got 0"):
        tune(model, max_tokens=0)


def test_a_model_that_computes_other_keys_is_refused(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny")
    store = build(tmp_path / "s", lm, pages(3), window=48)
    model = KNNLM(lm, store)
    with torch.no_grad():  # as an adapter would
        lm.model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(-1)
    with refusal(DatastoreMismatchError, f"the keys of {store.path} must be those that tiny"):
        tune(model, max_k=4)


def test_a_stream_that_was_cut_is_tuned_with_a_warning(
    llama_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(tmp_path / "s", llama_lm, pages(6), window=32, context=0, boundary="stream")
    store.forget(["p0"])
    compact(store)
    tuning = tune(KNNLM(llama_lm, store), max_k=4)
    assert tuning.tokens > len(store) // 2
    assert "was the stream cut by forget and compact?" in caplog.text


# when it is done


def test_a_datastore_is_tuned_again_when_it_has_grown(
    few_tokens: None, llama_lm: LanguageModel, tmp_path: Path
) -> None:
    def entries() -> int:
        tuning = Datastore(tmp_path / "s").tuning
        assert tuning is not None
        return int(tuning["entries"])

    first = build(tmp_path / "s", llama_lm, pages(8), window=64, tune=True)
    assert entries() == len(first)
    build(tmp_path / "s", llama_lm, pages(9), tune=True)
    assert entries() == len(first), "an eighth more"
    grown = build(tmp_path / "s", llama_lm, pages(11), tune=True)
    assert entries() == len(grown) > 1.25 * len(first)


def test_what_was_tuned_on_held_out_text_stays(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = build(tmp_path / "s", llama_lm, pages(2), window=64)
    assert store.parameters is None
    tune(KNNLM(llama_lm, store), pages(3)[2:], max_k=4).save(store, ["held"])
    before = store.tuning
    grown = build(tmp_path / "s", llama_lm, pages(6), tune=True)
    assert grown.tuning == before


def test_a_tuning_that_ends_early_changes_nothing(
    few_tokens: None,
    llama_lm: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def end(error: BaseException) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("knnlm.tuning.tune.fit_mixture", fail)

    end(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", llama_lm, pages(4), window=64, tune=True)
    store = Datastore(tmp_path / "s")
    assert len(store.documents()) == 4
    assert store.parameters is None
    assert store.tuning is None
    end(InvalidArgumentError("no such thing"))
    with caplog.at_level(logging.WARNING):
        assert keep_tuned(store, llama_lm) is None
    assert f"{store.path} is built, but could not be tuned: no such thing" in caplog.text
    monkeypatch.setattr("knnlm.tuning.tune.fit_mixture", fit_mixture)
    assert keep_tuned(store, llama_lm) is not None, "the next time"
    stored = store.tuning
    end(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tune(KNNLM(llama_lm, store), max_tokens=200)
    assert store.tuning == stored


def test_nothing_is_tuned_where_nothing_is_stored(
    llama_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(tmp_path / "s", llama_lm, pages(1), window=64)
    store.forget(["*"])
    assert keep_tuned(store, llama_lm) is None
    assert not caplog.text


def test_a_gate_of_another_version_is_replaced(
    few_tokens: None, llama_lm: LanguageModel, tmp_path: Path
) -> None:
    store = build(tmp_path / "s", llama_lm, pages(4), window=64, tune=True)
    tuned = store.mixture()
    assert tuned is not None
    assert store.parameters is not None
    assert store.tuning is not None
    sizes = [(3, 8), (8, 8), (8, 4)]
    network = [t for i, o in sizes for t in (torch.zeros(1, i, o), torch.zeros(1, 1, o))]
    old = LearnedGate([GateInput(5, 1.0)], torch.zeros(3), torch.ones(3), network)
    store.save_parameters(store.parameters, store.tuning, replace(tuned, gate=old))
    with refusal(DatastoreCorruptError, "features", "tune the datastore again"):
        KNNLM(llama_lm, store)
    assert keep_tuned(store, llama_lm) is not None
    assert KNNLM(llama_lm, store).perplexity(pages(2)).tokens > 0
    assert keep_tuned(store, llama_lm) is None, "it has not grown"
