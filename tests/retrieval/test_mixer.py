"""Learned weights and the continuous cache, from tuning to every way of predicting with them."""

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from families import FAMILIES
from stores import distinct_documents
from torch import Tensor
from transformers import LogitsProcessor
from typer.testing import CliRunner

import knnlm.retrieval.mixer
import knnlm.tuning.fitting
from knnlm.apps.cli.main import app
from knnlm.attachment.attachment import attach
from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreCorruptError, InvalidArgumentError, UnsupportedModelError
from knnlm.evaluation.scoring import Scores
from knnlm.evaluation.tally import Tally, bootstrap
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.interpolation import interpolate_vocabulary
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.stored import TunedMixture
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import override_mixer
from knnlm.text.documents import Document
from knnlm.text.windows import Span, Window
from knnlm.tuning.tune import Tuning, tune

HELD_OUT = [Document("held", PROSE[60:900] + "Something else."), Document("out", "A memory is.")]
TEXTS = [Document("a", PROSE[200:700]), Document("b", "A memory of what a memory is.")]
CACHE = CacheParameters(40, Parameters(16, 0.3, 20.0))


@pytest.fixture(scope="module")
def short() -> Any:
    """Texts of any length are enough to learn from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knnlm.tuning.fitting, "LEAST_TOKENS", 64)
        yield


@pytest.fixture(scope="module")
def tuned(
    short: None, llama_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Datastore, Tuning]:
    path = tmp_path_factory.mktemp("mixer") / "store"
    store = build(path, llama_lm, distinct_documents(3), window=48, context=16)
    tuning = tune(KNNLM(llama_lm, store), HELD_OUT, max_k=50)
    assert tuning.mixture.gate is not None
    assert tuning.mixture.cache_gate is not None
    tuning.save([store], ["held"])
    return Datastore(path), tuning


def dense_log_probs(model: KNNLM, document: Document) -> Tensor:
    tokens = [model.lm.start_token, *model.lm.encode([str(document.text)])[0].tolist()]
    inputs, targets = torch.tensor([tokens[:-1]]), torch.tensor(tokens[1:])
    log_probs = model.log_probs(inputs)[0]
    torch.testing.assert_close(
        log_probs.double().exp().sum(dim=1), torch.ones(len(targets), dtype=torch.float64),
        atol=1e-5, rtol=0,
    )  # fmt: skip
    return log_probs.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize(
    ("given", "weights", "cached"),
    [
        ({}, "learned", False),
        ({"weights": "learned"}, "learned", False),
        ({"cache": True}, "learned", True),
        ({"weights": "fixed"}, "fixed", False),
        ({"weights": "fixed", "cache": True}, "fixed", True),
        ({"weights": "distance"}, "distance", False),
        ({"lmbda": 0.4, "cache": True}, "fixed", True),
        ({"lmbda": 0.4, "cache": CACHE}, "fixed", True),
        ({"temperature": 3.0}, "fixed", False),
    ],
)
def test_a_report_equals_the_whole_distribution(
    llama_lm: LanguageModel,
    tuned: tuple[Datastore, Tuning],
    given: dict[str, Any],
    weights: str,
    cached: bool,
) -> None:
    store, _ = tuned
    model = KNNLM(llama_lm, store, **given)
    assert model.mixer.weights == weights
    assert (model.mixer.cache is not None) == cached
    for document in TEXTS:
        report = model.perplexity([document], windowing=replace(model.windowing, window=256))
        dense = dense_log_probs(model, document)
        assert report.tokens == len(dense)
        assert report.knn.nats_per_token == pytest.approx(-float(dense.mean()), rel=1e-4)
        assert report.weights == weights
        assert report.cache == model.mixer.cache
        lm = dense_log_probs(KNNLM(llama_lm, store, lmbda=0.0), document)
        assert report.share_hurt == pytest.approx(float((dense < lm - 0.1).float().mean()))
        json.dumps(report.to_dict())


def test_a_continuous_cache_changes_the_prediction_and_forgets_with_the_document(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    store, _ = tuned
    model = KNNLM(llama_lm, store, lmbda=0.2, cache=CACHE)
    alone = KNNLM(llama_lm, store, lmbda=0.2)
    document = Document("again", PROSE[:150] + PROSE[:150])
    assert model.perplexity([document]).knn.perplexity < alone.perplexity([document]).knn.perplexity
    one, other = (model.perplexity([text]) for text in TEXTS)
    both = model.perplexity(TEXTS)
    nats = one.knn.nats_per_token * one.tokens + other.knn.nats_per_token * other.tokens
    assert both.knn.nats_per_token == pytest.approx(nats / both.tokens, rel=1e-5)
    stream = model.perplexity(TEXTS, windowing=replace(model.windowing, boundary="stream"))
    assert stream.tokens != both.tokens


def test_windows_do_not_interrupt_the_continuous_cache(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    store, _ = tuned
    text = PROSE[:200]
    model = KNNLM(llama_lm, store, lmbda=0.0, cache=CacheParameters(500, Parameters(500, 0.3, 9.0)))
    # λ = 0 and a sharp cache: what differs between the windows is the model's context alone
    whole = model.perplexity([Document("t", text)], windowing=replace(model.windowing, window=250))
    cut = model.perplexity([Document("t", text)], windowing=replace(model.windowing, window=60))
    alone = KNNLM(llama_lm, store, lmbda=0.0).perplexity([Document("t", text)])
    assert whole.knn.perplexity != alone.knn.perplexity
    assert cut.tokens == whole.tokens
    gain, expected = (r.knn.nats_per_token - r.lm.nats_per_token for r in (cut, whole))
    assert gain == pytest.approx(expected, abs=0.05)


def test_without_weight_the_model_is_itself(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    store, _ = tuned
    tokens = torch.tensor([[0, 5, 9, 11]])
    expected = torch.log_softmax(llama_lm.keys_and_logits(tokens).logits, dim=-1)
    cache = CacheParameters(8, Parameters(4, 0.0, 1.0))
    for given in ({"lmbda": 0.0}, {"lmbda": 0.0, "cache": cache}):
        assert torch.equal(KNNLM(llama_lm, store, **given).log_probs(tokens), expected)


def test_what_is_stored_comes_back_and_is_for_these_datastores_only(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning], tmp_path: Path
) -> None:
    store, tuning = tuned
    stored = store.mixture()
    assert stored is not None
    assert (stored.cache, stored.lmbdas) == (tuning.mixture.cache, tuning.mixture.lmbdas)
    for name in ("gate", "cache_gate"):
        ours, theirs = getattr(tuning.mixture, name), getattr(stored, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.inputs == theirs.inputs
            for one, other in zip(ours.network, theirs.network, strict=True):
                assert torch.equal(one, other)
    assert tuning.mixture.by_distance is not None
    assert stored.by_distance is not None
    for name, tensor in asdict(tuning.mixture.by_distance).items():
        assert torch.equal(tensor, getattr(stored.by_distance, name))
    other = build(tmp_path / "other", llama_lm, distinct_documents(1), window=48)
    assert store.mixture([other]) is None
    assert KNNLM(llama_lm, [store, other], lmbda=[0.1, 0.1]).mixer.gate is None
    with refusal(InvalidArgumentError, "cache must have been tuned for these datastores"):
        KNNLM(llama_lm, [store, other], lmbda=[0.1, 0.1], cache=True)
    json.dumps(tuning.to_dict())


def test_a_damaged_mixture_is_refused(tuned: tuple[Datastore, Tuning]) -> None:
    plain = tuned[1].mixture.to_dict()
    assert TunedMixture.from_dict(plain).lmbdas == tuned[1].mixture.lmbdas
    for damage in (
        {"sha256": "0" * 64},
        {"tensors": plain["tensors"][:-8]},
        {"cache": {"size": 0}},
        {"lmbdas": None},
    ):
        damaged = copy.deepcopy(plain) | damage
        with refusal(DatastoreCorruptError, "the stored mixture cannot be read", "tune"):
            TunedMixture.from_dict(damaged)


def test_gates_of_two_datastores(short: None, llama_lm: LanguageModel, tmp_path: Path) -> None:
    parts = distinct_documents(4)
    stores = [
        build(tmp_path / name, llama_lm, documents, window=64)
        for name, documents in [("one", parts[:2]), ("other", parts[2:])]
    ]
    tuning = tune(KNNLM(llama_lm, stores, lmbda=0.0), HELD_OUT, max_k=16)
    tuning.save(stores, ["held"])
    opened = [Datastore(store.path) for store in stores]
    for cache in (False, True):
        model = KNNLM(llama_lm, opened, cache=cache)
        gate = tuning.mixture.cache_gate if cache else tuning.mixture.gate
        assert (model.mixer.gate is None) == (gate is None)
        report = model.perplexity([TEXTS[0]], windowing=replace(model.windowing, window=256))
        dense = dense_log_probs(model, TEXTS[0])
        assert report.knn.nats_per_token == pytest.approx(-float(dense.mean()), rel=1e-4)
    assert KNNLM(llama_lm, opened[::-1]).mixer.gate is None, "in the order that they were tuned in"


def test_the_perplexities_of_tune_are_those_of_eval(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    store, tuning = tuned
    fits = {fit.name: fit for fit in tuning.fits}
    fixed = KNNLM(llama_lm, store, weights="fixed").perplexity(HELD_OUT)
    assert fits["fixed weights"].perplexity == pytest.approx(fixed.knn.perplexity, rel=1e-4)
    assert fits["fixed weights"].share_hurt == pytest.approx(fixed.share_hurt, abs=1e-6)
    mixture = tuning.mixture
    with_cache = KNNLM(llama_lm, store, lmbda=mixture.lmbdas[0], cache=mixture.cache).perplexity(
        HELD_OUT
    )
    expected = fits["fixed weights + cache"]
    assert expected.perplexity == pytest.approx(with_cache.knn.perplexity, rel=1e-4)
    assert expected.perplexity <= fits["fixed weights"].perplexity * 1.002
    assert [name for name, fit in fits.items() if fit.held_out] == [
        "λ by distance",
        "learned weights",
        "learned weights + cache",
    ]
    assert fits["λ by distance"].perplexity < tuning.lm_perplexity


def test_info_names_what_learned_weights_gave(tuned: tuple[Datastore, Tuning]) -> None:
    store, tuning = tuned
    out = CliRunner().invoke(app, ["info", str(store.path)]).stdout
    (learned,) = (fit.perplexity for fit in tuning.fits if fit.name == "learned weights")
    shown = " ".join(out.replace("│", " ").split())
    assert f"learned weights {learned:.3f}" in shown


def test_lambda_by_distance_suits_the_text_that_it_was_fitted_to(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    store, tuning = tuned
    fixed = KNNLM(llama_lm, store, weights="fixed").perplexity(HELD_OUT)
    model = KNNLM(llama_lm, store, weights="distance")
    assert model.perplexity(HELD_OUT).knn.perplexity < fixed.knn.perplexity
    buckets = tuning.mixture.by_distance
    assert buckets is not None
    keys = llama_lm.keys_and_logits(torch.tensor([[0, 5, 9, 11, 40, 7]])).keys[0]
    (retriever,) = model.retrievers
    votes = retriever.vote(retriever.search(keys))
    nearest = retriever.search(keys).squared_distances[:, :1]
    assert torch.equal(votes.lmbda, buckets(nearest))


def test_lambda_by_distance_is_fixed_again_where_lambda_is_given(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    mixer = KNNLM(llama_lm, tuned[0], weights="distance").mixer
    overridden = override_mixer(mixer, lmbda=0.0)
    assert (overridden.weights, overridden.counts) == ("fixed", False)
    assert override_mixer(mixer).weights == "distance"


def test_a_short_text_is_not_learned_from(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = build(tmp_path / "s", llama_lm, distinct_documents(2), window=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knnlm.tuning.fitting, "LEAST_TOKENS", 10**6)
        tuning = tune(KNNLM(llama_lm, store), HELD_OUT, max_k=16)
    assert tuning.mixture.gate is None
    assert tuning.mixture.cache_gate is None
    assert tuning.mixture.by_distance is None
    assert [fit.held_out for fit in tuning.fits] == [False, False]
    tuning.save([store], ["held"])
    assert not store.is_learned
    assert KNNLM(llama_lm, store, cache=True).mixer.cache == tuning.mixture.cache
    with refusal(InvalidArgumentError, "weights='distance' must have been tuned", "run knnlm tune"):
        KNNLM(llama_lm, store, weights="distance")


def test_refusals(llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning], tmp_path: Path) -> None:
    store, _ = tuned
    with refusal(InvalidArgumentError, "the datastores and the continuous cache must add up to at"):
        KNNLM(llama_lm, store, lmbda=0.9, cache=CACHE)
    untuned = build(tmp_path / "s", llama_lm, distinct_documents(1), window=64)
    with refusal(InvalidArgumentError, "cache must have been tuned", "run knnlm tune"):
        KNNLM(llama_lm, untuned, cache=True)
    with refusal(InvalidArgumentError, "weights='distance' must have been tuned", "run knnlm tune"):
        KNNLM(llama_lm, untuned, weights="distance")
    for cache in (False, CACHE):
        with refusal(InvalidArgumentError, "weights='learned' must "):
            KNNLM(llama_lm, untuned, weights="learned", cache=cache)
    given: dict[str, Any]
    for given in ({"k": 3}, {"lmbda": 0.1}, {"temperature": 2.0}, {"cache": CACHE}):
        with refusal(InvalidArgumentError, "weights='learned' must come without k, lmbda"):
            KNNLM(llama_lm, store, weights="learned", **given)
    for given in ({"k": 3}, {"lmbda": 0.1}, {"temperature": 2.0}, {"cache": True}):
        with refusal(InvalidArgumentError, "weights='distance' must come without k, lmbda"):
            KNNLM(llama_lm, store, weights="distance", **given)
    with refusal(
        InvalidArgumentError, "weights must be one of learned, distance, fixed, got 'best'"
    ):
        KNNLM(llama_lm, store, weights="best")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cache": True},
        {"weights": "distance"},
        {"weights": "fixed"},
        {"lmbda": 0.2, "cache": CACHE},
        {"lmbda": 0.0},
    ],
    ids=str,
)
def test_a_mixture_comes_with_its_votes(
    llama_lm: LanguageModel,
    tuned: tuple[Datastore, Tuning],
    given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summarized = []

    def counted(log_probs: Tensor) -> LMSummary:
        summarized.append(len(log_probs))
        return summarize_lm(log_probs)

    monkeypatch.setattr(knnlm.retrieval.mixer, "summarize_lm", counted)
    mixer = KNNLM(llama_lm, tuned[0], **given).mixer
    tokens = torch.tensor([[0, 5, 9, 11, 40, 7], [0, 9, 9, 5, 5, 9]])
    reading = llama_lm.keys_and_logits(tokens)
    lm_log_probs = torch.log_softmax(reading.logits, dim=-1)
    view = None
    if mixer.uses_cache:
        view = mixer.new_cache(reading.keys).read(tokens, reading.keys)
    mixed = mixer.mix(mixer.search(reading.keys), view, lm_log_probs)
    by_token = [votes.by_token() for votes in mixed.votes]
    expected = interpolate_vocabulary(lm_log_probs.flatten(0, 1), by_token)
    torch.testing.assert_close(mixed.log_probs.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    assert mixed.log_probs.shape == lm_log_probs.shape
    for votes, at_seven in zip(mixed.votes, mixed.votes_at(7), strict=True):
        assert torch.equal(votes.log_weights[[7]], at_seven.log_weights)
        assert torch.equal(votes.lmbda[[7]], at_seven.lmbda)
    assert summarized == ([] if mixer.gate is None else [12])


# attached


class SlowMixture(LogitsProcessor):  # type: ignore[misc]
    """Replaces what an unattached model says by the mixture, reading all tokens again each time."""

    def __init__(self, model: KNNLM, padding: list[int]) -> None:
        self.model, self.padding = model, padding

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        beams = len(input_ids) // len(self.padding)
        rows = [
            self.model.log_probs(tokens[self.padding[number // beams] :][None])[0, -1]
            for number, tokens in enumerate(input_ids)
        ]
        return torch.stack(rows).to(scores.dtype)


PROMPTS = ["A memory of a memory of a", "A datastore", "What followed there is a guess at what"]
WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "greedy": (PROMPTS[:1], {}),
    "no cache": (PROMPTS[:1], {"use_cache": False}),
    "padded batch": (PROMPTS, {}),
    "beams": (PROMPTS[:2], {"num_beams": 3}),
    "static cache": (PROMPTS[:1], {"cache_implementation": "static"}),
    "prompt lookup": (PROMPTS[:1], {"prompt_lookup_num_tokens": 3}),
    "assisted": (PROMPTS[:1], {"assistant_model": tiny_llama(seed=7)}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["learned", "distance", "learned with cache", "fixed with cache"])
def test_attached_it_equals_reading_everything_again(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning], way: str, how: str
) -> None:
    store, _ = tuned
    settings: dict[str, dict[str, Any]] = {
        "learned": {},
        "distance": {"weights": "distance"},
        "learned with cache": {"cache": True},
        "fixed with cache": {"lmbda": 0.3, "cache": CACHE},
    }
    given = settings[how]
    prompts, options = WAYS[way]
    rows = [[llama_lm.start_token, *tokens.tolist()] for tokens in llama_lm.encode(prompts)]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    inputs = {
        "input_ids": torch.tensor([[0] * n + r for n, r in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor(
            [[0] * n + [1] * len(r) for n, r in zip(padding, rows, strict=True)]
        ),
    }

    def generated(**more: Any) -> list[list[int]]:
        tokens = llama_lm.model.generate(
            **inputs, max_new_tokens=10, do_sample=False, pad_token_id=0, **more
        )
        new: list[list[int]] = tokens[:, longest:].tolist()
        return new

    slow = SlowMixture(KNNLM(llama_lm, store, **given), padding)
    plain = way in ("static cache", "prompt lookup", "assisted", "no cache")
    expected = generated(logits_processor=[slow], **({} if plain else options))
    with attach(llama_lm.model, store, **given):
        assert generated(**options) == expected


@pytest.mark.parametrize(
    "given", [{}, {"cache": True}, {"weights": "distance"}, {"weights": "fixed"}], ids=str
)
def test_explanations_are_of_the_mixture(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning], given: dict[str, Any]
) -> None:
    store, _ = tuned
    model = KNNLM(llama_lm, store, **given)
    document = Document("t", PROSE[100:140])
    explained = model.explain(str(document.text))
    log_probs = torch.tensor([explanation.log_prob for explanation in explained])
    torch.testing.assert_close(log_probs, dense_log_probs(model, document), atol=1e-4, rtol=1e-4)


def test_a_state_without_positions_is_refused(tmp_path: Path) -> None:
    lm = LanguageModel(FAMILIES["mamba"](), byte_tokenizer(), name="mamba")
    store = build(tmp_path / "s", lm, distinct_documents(1), window=48)
    tokens = torch.tensor([[0, 5, 9]])
    with attach(lm.model, store, lmbda=0.3, cache=CACHE), torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="use_cache=False"):
            lm.model(tokens, use_cache=True)
        logits = lm.model(tokens, use_cache=False).logits
    expected = KNNLM(lm, store, lmbda=0.3, cache=CACHE).log_probs(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    embedded = lm.model.get_input_embeddings()(tokens)
    with (
        attach(lm.model, store, lmbda=0.3, cache=CACHE),
        pytest.raises(UnsupportedModelError, match="token ids"),
    ):
        lm.model(inputs_embeds=embedded, use_cache=False)


def test_buckets_of_frequency_and_errors_are_of_the_whole_text(
    llama_lm: LanguageModel, tuned: tuple[Datastore, Tuning]
) -> None:
    store, _ = tuned
    report = KNNLM(llama_lm, store).perplexity(TEXTS)
    for side, total in (("lm_perplexity", report.lm), ("knn_perplexity", report.knn)):
        nats = sum(b.tokens * math.log(getattr(b, side)) for b in report.frequencies)
        assert nats == pytest.approx(total.nats_per_token * report.tokens, rel=1e-6)
    counts = torch.bincount(store.values, minlength=llama_lm.vocab_size)
    targets = torch.cat(
        [torch.from_numpy(t).long() for t in llama_lm.encode([str(d.text) for d in TEXTS])]
    )
    for bucket in report.frequencies:
        inside = (counts[targets] >= bucket.at_least) & (counts[targets] <= bucket.at_most)
        assert bucket.tokens == int(inside.sum())
    assert report.change == pytest.approx(report.knn.perplexity / report.lm.perplexity - 1)
    assert report.change_error is not None
    assert report.change_error > 0
    assert report.errors_over == "blocks of 256 tokens"
    short = KNNLM(llama_lm, store).perplexity(TEXTS[1:])
    assert (short.change_error, short.lm.perplexity_error, short.errors_over) == (None, None, None)


def test_the_bootstrap_agrees_with_the_spread_of_documents() -> None:
    tally = Tally([], 4)
    generator = torch.Generator().manual_seed(0)
    nats = torch.rand(400, generator=generator)
    for number, of_document in enumerate(nats):
        window = Window(np.array([0, 1], dtype=np.int32), 0, (Span(number, 1),))
        scores = Scores([window], torch.tensor([1]), torch.zeros(1, 2), -of_document[None], ())
        tally.add(scores, -0.5 * of_document[None])
    errors = tally.errors()
    assert errors is not None
    assert errors.over == "documents"
    spread = float(nats.std()) / 20
    assert errors.lm == pytest.approx(spread * math.exp(float(nats.mean())), rel=0.1)
    ratio = math.exp(-0.5 * float(nats.mean()))
    assert errors.change == pytest.approx(0.5 * spread * ratio, rel=0.1)


def test_few_documents_are_drawn_in_blocks_of_256_tokens() -> None:
    """Two documents, read in windows that end within blocks: 41 blocks, the last one shorter."""
    tally = Tally([], 4)
    lengths = (20 * 256, 20 * 256 + 100)
    nats = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0)) + 1
    start = 0
    for number, length in enumerate(lengths):
        for begin in range(0, length, 700):
            count = min(700, length - begin)
            inputs = np.zeros(count + 1, dtype=np.int32)
            window = Window(inputs, 0, (Span(number, count),))
            own = nats[start : start + count]
            start += count
            targets, keys = torch.ones(count, dtype=torch.int64), torch.zeros(count, 2)
            tally.add(Scores([window], targets, keys, -own, ()), -own / 2)
    assert tally.nats[0] == pytest.approx(float(nats.double().sum()))
    errors = tally.errors()
    assert errors is not None
    assert errors.over == "blocks of 256 tokens"
    blocks = [
        part
        for document in nats.double().split(lengths)  # type: ignore[no-untyped-call]
        for part in document.split(256)
    ]
    assert len(blocks) == 41
    expected = bootstrap(
        np.array([[float(part.sum())] for part in blocks]),
        np.array([float(len(part)) for part in blocks]),
    )
    assert errors.lm == pytest.approx(float(np.exp(expected).std(ddof=1)))
