"""The batched work, without a protocol: against `generate`, and against being alone."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer
from families import FAMILIES
from serving import PARAMETERS, fresh_lm, tiny_store
from stores import distinct_documents
from transformers import AutoConfig, AutoModelForCausalLM

import knnlm.apps.engine.steps
import knnlm.apps.engine.worker
import knnlm.retrieval.mixer
import knnlm.tuning.fitting
from knnlm.apps.engine.jobs import (
    Completion,
    Event,
    Failed,
    Grown,
    Overrides,
    PromptRead,
    ScoredToken,
)
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.samples import Sample
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.engine.worker import Worker
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.evaluation.explain import explain
from knnlm.index.policy import build_index
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.mixture.by_distance import BucketedLambda
from knnlm.model.decoding import Decoder
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.retriever import Retriever
from knnlm.text.documents import Document
from knnlm.tuning.tune import tune

TEXTS = [
    "The nearest",
    "",
    "A datastore is a retriever: one entry for every token of the",
    "x",
    PROSE[:150],
    "What followed there is a guess at",
]
SHORTEST_FIRST = sorted(TEXTS, key=len)
"""The order in which they are read, and that of a batch."""


@dataclass
class Asked:
    """A completion, and what came of it."""

    job: Completion
    events: list[Event] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        parts = [""] * self.job.samples
        for event in self.events:
            if isinstance(event, Grown):
                parts[event.sample] += event.text
        return parts

    def tokens(self, sample: int = 0) -> list[ScoredToken]:
        grown = [event for event in self.events if isinstance(event, Grown)]
        return [scored for event in grown if event.sample == sample for scored in event.tokens]

    @property
    def prompt(self) -> Sequence[ScoredToken]:
        (read,) = [event for event in self.events if isinstance(event, PromptRead)]
        return read.tokens

    @property
    def reasons(self) -> list[str]:
        grown = [event for event in self.events if isinstance(event, Grown)]
        return [event.finish_reason for event in grown if event.finish_reason is not None]


def ask(lm: LanguageModel, text: str, overrides: Overrides | None = None, **options: Any) -> Asked:
    options = {"max_tokens": 12, "temperature": 0.0} | options
    names = {"temperature", "top_p", "seed"} & set(options)
    sampling = SamplingOptions(**{name: options.pop(name) for name in names})
    events: list[Event] = []
    prompt = [lm.start_token, *lm.encode([text])[0].tolist()]
    job = Completion(
        events.append, overrides or Overrides(), prompt, 1, sampling=sampling, **options
    )
    return Asked(job, events)


def work(
    model: KNNLM, *asked: Asked, together: bool = True, metrics: Metrics | None = None
) -> None:
    worker = Worker(model, metrics or Metrics())
    for one in asked:
        worker.begin(one.job)
        while not together and worker.jobs:
            worker.turn()
    while worker.jobs:
        worker.turn()
    worker.close()
    for one in asked:
        assert not any(isinstance(event, Failed) for event in one.events), one.events


def run(worker: Worker, asked: Sequence[Asked]) -> None:
    """Begin what was asked, and work until all jobs are done."""
    for one in asked:
        if one.job not in worker.jobs:
            worker.begin(one.job)
    while worker.jobs:
        worker.turn()
    worker.close()


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("worker") / "store")


@pytest.fixture(scope="session")
def model(path: Path) -> KNNLM:
    return KNNLM(fresh_lm(), Datastore(path), **PARAMETERS)


@pytest.mark.usefixtures("eager_drafts")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_as_transformers_does(tmp_path: Path, family: str) -> None:
    """Rows of different lengths in one batch; prompts beyond a sliding window of 64."""
    lm = LanguageModel(FAMILIES[family](), byte_tokenizer(), name=family)
    store = build(tmp_path / "s", lm, distinct_documents(2), window=48, context=16)
    model = KNNLM(lm, store, **PARAMETERS)
    texts = [*TEXTS, (PROSE * 2)[:400]]
    wanted = [model.generate(text, max_new_tokens=12, drafts=False) for text in texts]
    asked = [ask(lm, text) for text in texts]
    assert max(len(one.job.prompt) for one in asked) > 80
    work(model, *asked)
    for one, generation in zip(asked, wanted, strict=True):
        ended = generation.tokens[-1] == lm.tokenizer.eos_token_id
        kept = generation.tokens[:-1] if ended else generation.tokens
        assert [scored.token for scored in one.tokens()] == kept
        assert one.texts == [generation.text]
        assert one.reasons == ["stop" if ended else "length"]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("rwkv", {"attention_hidden_size": 32, "context_length": 256}),
        (
            "recurrent_gemma",
            {"lru_width": 32, "attention_window_size": 64, "num_key_value_heads": 2,
             "num_attention_heads": 4, "block_types": ["recurrent", "attention"]},
        ),
        ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    ],
)  # fmt: skip
def test_models_that_hand_no_cache_over(tmp_path: Path, kind: str, own: dict[str, Any]) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ends = {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | ends | own))
    lm = LanguageModel(network.eval(), byte_tokenizer(), name=kind)
    model = KNNLM(lm, build(tmp_path / "s", lm, distinct_documents(2), window=48), **PARAMETERS)
    wanted = [model.generate(text, max_new_tokens=12) for text in TEXTS]
    asked = [ask(lm, text, log_probs=0, samples=2) for text in TEXTS]
    work(model, *asked)
    for one, generation in zip(asked, wanted, strict=True):
        assert one.texts == [generation.text] * 2
        tokens = torch.tensor([[*one.job.prompt, *(scored.token for scored in one.tokens())]])
        expected = model.log_probs(tokens)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        found = [scored.log_prob for scored in one.tokens()]
        assert found == pytest.approx(expected[-len(found) :].tolist(), abs=5e-5)


@pytest.mark.parametrize("piece", [1, 7, 256])
def test_log_probs_are_the_mixtures(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(knnlm.apps.engine.worker, "_PROMPT_TOKENS", piece)
    asked = [ask(model.lm, text, log_probs=3, score_prompt=True) for text in TEXTS]
    work(model, *asked)
    for one in asked:
        tokens = [*one.job.prompt, *(scored.token for scored in one.tokens())]
        log_probs = model.log_probs(torch.tensor([tokens]))[0, :-1]
        expected = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        scored = [*one.prompt, *one.tokens()]
        assert [token.token for token in scored] == tokens[1:]
        found = torch.tensor([token.log_prob for token in scored])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        for position, token in enumerate(scored):
            best = log_probs[position].topk(3)
            chosen = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            chosen[token.token] = float(log_probs[position, token.token])
            names = model.lm.token_texts.names(chosen, tokens[1 : position + 1])
            assert len(set(names)) == len(chosen), "halves of characters have names of their own"
            wanted = dict(zip(names, chosen.values(), strict=True))
            found_top = {likely.name: likely.log_prob for likely in token.top or ()}
            assert found_top == pytest.approx(wanted, abs=2e-5)


def test_offsets_are_where_the_tokens_begin(model: KNNLM) -> None:
    text = "naïve — 日本語🙂 end"
    asked = ask(model.lm, text, log_probs=0, score_prompt=True, max_tokens=0)
    work(model, asked)
    offsets = [scored.offset for scored in asked.prompt]
    assert offsets == sorted(offsets)
    for number, offset in enumerate(offsets):
        before = model.lm.decode([scored.token for scored in asked.prompt[:number]])
        assert before.rstrip("\ufffd") == text[:offset]


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": number, "max_tokens": 5 + 7 * number, "top_p": 1 - 0.1 * number}
    for number in range(len(TEXTS))
]


def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(model: KNNLM) -> None:
    def all_asked() -> list[Asked]:
        return [
            ask(model.lm, text, **options) for text, options in zip(TEXTS, SAMPLED, strict=True)
        ]

    together, alone, reversed_ = all_asked(), all_asked(), all_asked()
    work(model, *together)
    work(model, *alone, together=False)
    work(model, *reversed(reversed_))
    for one, other, third in zip(together, alone, reversed_, strict=True):
        assert one.texts == other.texts == third.texts
        assert one.reasons == other.reasons == third.reasons
    assert len({one.texts[0] for one in together}) == len(TEXTS)


def test_samples_differ_and_the_first_is_that_of_one(model: KNNLM) -> None:
    several = ask(model.lm, TEXTS[0], samples=4, temperature=1.0, seed=5)
    one = ask(model.lm, TEXTS[0], temperature=1.0, seed=5)
    work(model, several, ask(model.lm, TEXTS[2]))
    work(model, one)
    assert len(set(several.texts)) == 4
    assert several.texts[0] == one.texts[0]


def test_every_request_has_its_own_parameters(path: Path) -> None:
    overrides = [
        Overrides(),
        Overrides(lmbda=0.0),
        Overrides(k=3),
        Overrides(temperature=0.5),
        Overrides(k=5, lmbda=1.0, temperature=200.0),
        Overrides(lmbda=[0.7]),
    ]
    lm = fresh_lm()
    asked = [ask(lm, PROSE[:60], one, log_probs=0, score_prompt=True) for one in overrides]
    work(KNNLM(lm, Datastore(path), **PARAMETERS), *asked)
    answers = set()
    for one, given in zip(asked, overrides, strict=True):
        names = {"k": given.k, "lmbda": given.lmbda, "temperature": given.temperature}
        wanted = PARAMETERS | {name: value for name, value in names.items() if value is not None}
        other = KNNLM(lm, Datastore(path), **wanted)
        tokens = torch.tensor([[*one.job.prompt, *(scored.token for scored in one.tokens())]])
        expected = other.log_probs(tokens)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        found = torch.tensor([scored.log_prob for scored in [*one.prompt, *one.tokens()]])
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
        assert [s.token for s in one.tokens()] == other.generate(
            PROSE[:60], max_new_tokens=12
        ).tokens[: len(one.tokens())]
        answers.add(tuple(found.tolist()))
    assert len(answers) == len(overrides)


def test_two_datastores(path: Path, tmp_path: Path) -> None:
    lm = fresh_lm()
    other = build(tmp_path / "other", lm, distinct_documents(2)[1:], window=64, context=16)
    stores = [Datastore(path), other]
    model = KNNLM(lm, stores, k=[9, 4], lmbda=[0.3, 0.5], temperature=8.0)
    asked = [ask(lm, TEXTS[2], sources=20), ask(lm, TEXTS[0], Overrides(lmbda=[0.0, 0.9]))]
    work(model, *asked)
    assert [s.token for s in asked[0].tokens()] == model.generate(
        TEXTS[2], max_new_tokens=12
    ).tokens
    alone = KNNLM(lm, stores, k=[9, 4], lmbda=[0.0, 0.9], temperature=8.0)
    assert [s.token for s in asked[1].tokens()] == alone.generate(
        TEXTS[0], max_new_tokens=12
    ).tokens
    for scored in asked[0].tokens():
        assert scored.explanation is not None
        named = [source.store for source in scored.explanation.sources]
        assert named.count(str(path)) == 9
        assert named.count(str(tmp_path / "other")) == 4


def test_sources_are_those_that_explain_names(model: KNNLM) -> None:
    asked = ask(model.lm, TEXTS[2], sources=4)
    work(model, asked)
    tokens = asked.tokens()
    text = TEXTS[2] + asked.texts[0]
    assert model.lm.encode([text])[0].tolist()[-len(tokens) :] == [s.token for s in tokens]
    explained = explain(model, text, sources=4)[-len(tokens) :]
    for scored, expected in zip(tokens, explained, strict=True):
        found = scored.explanation
        assert found is not None
        assert found.token == expected.token
        assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert found.lm_log_prob == pytest.approx(expected.lm_log_prob, abs=1e-4)
        assert found.knn_prob == pytest.approx(expected.knn_prob, abs=1e-4)
        for source, wanted in zip(found.sources, expected.sources, strict=True):
            assert source.weight == pytest.approx(wanted.weight, abs=1e-4)
            assert source.squared_distance == pytest.approx(wanted.squared_distance, rel=1e-3)
        assert {source.row for source in found.sources} == {s.row for s in expected.sources}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> KNNLM:
    """A model whose weights a gate chooses."""
    path, lm = tmp_path_factory.mktemp("learned") / "store", fresh_lm()
    store = build(path, lm, [Document("one", PROSE)], window=48, context=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knnlm.tuning.fitting, "LEAST_TOKENS", 64)
        tuning = tune(KNNLM(lm, store), [Document("held", PROSE[60:400])], max_k=40)
    tuning.save([store], ["held"])
    model = KNNLM(lm, Datastore(path))
    assert model.mixer.gate is not None
    return model


def test_sources_of_learned_weights_are_those_that_explain_names(learned: KNNLM) -> None:
    asked = ask(learned.lm, TEXTS[2], sources=4, log_probs=0)
    work(learned, asked)
    tokens = asked.tokens()
    generated = [scored.token for scored in tokens]
    explained = explain(learned, TEXTS[2], generated=generated, sources=4)[-len(tokens) :]
    for scored, expected in zip(tokens, explained, strict=True):
        assert scored.explanation is not None
        assert scored.log_prob == pytest.approx(scored.explanation.log_prob, abs=1e-5)
        assert scored.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        weights = [source.weight for source in scored.explanation.sources]
        assert weights == pytest.approx([s.weight for s in expected.sources], abs=1e-4)


@pytest.mark.parametrize("is_learned", [False, True])
def test_sources_cost_no_second_vote(
    model: KNNLM, learned: KNNLM, monkeypatch: pytest.MonkeyPatch, is_learned: bool
) -> None:
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(Retriever, "tokens")
    count(knnlm.retrieval.mixer, "summarize_lm")
    asked = ask((learned if is_learned else model).lm, TEXTS[2], sources=4, max_tokens=5)
    work(learned if is_learned else model, asked)
    assert len(asked.tokens()) == 5
    assert calls["tokens"] == 5
    assert calls["summarize_lm"] == (5 if is_learned else 0)


def test_without_weight_there_are_no_sources(model: KNNLM) -> None:
    asked = ask(model.lm, TEXTS[2], Overrides(lmbda=0.0), sources=4)
    work(model, asked)
    for scored in asked.tokens():
        assert scored.explanation is not None
        assert scored.explanation.sources == ()
        assert scored.explanation.gain == 0.0


def test_what_is_forgotten_or_compacted_meanwhile_is_seen(tmp_path: Path) -> None:
    path = tiny_store(tmp_path / "store")
    model = KNNLM(fresh_lm(), Datastore(path), **PARAMETERS)
    worker = Worker(model, Metrics())

    def documents() -> set[str]:
        asked = ask(model.lm, PROSE[:100], sources=64)
        worker.begin(asked.job)
        while worker.jobs:
            worker.turn()
        explanations = [scored.explanation for scored in asked.tokens()]
        return {source.document for one in explanations if one for source in one.sources}

    before = documents()
    assert before == {"d0", "d1", "d2", "d3", "d4"}
    elsewhere = Datastore(path)
    elsewhere.forget(["d0", "d3"])
    assert documents() == {"d1", "d2", "d4"}
    compact(elsewhere)
    assert documents() == {"d1", "d2", "d4"}
    build(path, fresh_lm(), distinct_documents(1))
    assert documents() == {"d0", "d1", "d2", "d4"}
    worker.close()


def test_weights_by_distance_outlive_a_compaction(tmp_path: Path) -> None:
    path = tiny_store(tmp_path / "store")
    model = KNNLM(fresh_lm(), Datastore(path), **PARAMETERS | {"lmbda": 0.0})
    by_distance = BucketedLambda(torch.tensor([1.0]), torch.tensor([0.9, 0.5]))
    retrievers = (replace(model.retrievers[0], by_distance=by_distance),)
    model.mixer = replace(model.mixer, retrievers=retrievers)
    worker = Worker(model, Metrics())

    def log_probs() -> list[float | None]:
        asked = ask(model.lm, PROSE[:100], log_probs=1)
        worker.begin(asked.job)
        while worker.jobs:
            worker.turn()
        return [scored.log_prob for scored in asked.tokens()]

    elsewhere = Datastore(path)
    elsewhere.forget(["d0", "d3"])
    forgotten = log_probs()
    compact(elsewhere)
    assert log_probs() == pytest.approx(forgotten, abs=1e-5)
    worker.close()


def test_fixed_and_distance_weights_share_a_batch(path: Path) -> None:
    """An override makes λ fixed, even if it repeats the parameters that are there."""
    model = KNNLM(fresh_lm(), Datastore(path), **PARAMETERS)
    by_distance = BucketedLambda(torch.tensor([1.0]), torch.tensor([0.9, 0.05]))
    retrievers = (replace(model.retrievers[0], by_distance=by_distance),)
    model.mixer = replace(model.mixer, retrievers=retrievers)

    def log_probs(together: bool) -> list[list[float | None]]:
        overrides = [Overrides(), Overrides(k=PARAMETERS["k"])]
        asked = [ask(model.lm, TEXTS[2], one, log_probs=0) for one in overrides]
        work(model, *asked, together=together)
        return [[scored.log_prob for scored in one.tokens()] for one in asked]

    for shared, alone in zip(log_probs(together=True), log_probs(together=False), strict=True):
        assert shared == pytest.approx(alone, abs=1e-5)


@pytest.mark.usefixtures("eager_drafts")
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "samples": 2, "sources": 2}])
def test_drafts_change_no_word(model: KNNLM, options: dict[str, Any]) -> None:
    """Rows of one batch accept as much as each can, and drop out at different times."""

    def completed(*, drafts: bool) -> tuple[list[Asked], Metrics]:
        asked = [ask(model.lm, text, max_tokens=30 + n, **options) for n, text in enumerate(TEXTS)]
        metrics = Metrics()
        run(Worker(model, metrics, drafts), asked)
        return asked, metrics

    (drafted, metrics), (plain, without) = completed(drafts=True), completed(drafts=False)
    for one, other in zip(drafted, plain, strict=True):
        assert (one.texts, one.reasons) == (other.texts, other.reasons)
        for ours, theirs in zip(one.tokens(), other.tokens(), strict=True):
            assert (ours.token, ours.text, ours.offset) == (
                theirs.token,
                theirs.text,
                theirs.offset,
            )
            if ours.explanation is not None and theirs.explanation is not None:
                rows = [[s.row for s in e.sources] for e in (ours.explanation, theirs.explanation)]
                assert rows[0] == rows[1]
    assert metrics.accepted_tokens._value.get() > 5
    assert without.drafted_tokens._value.get() == 0


@pytest.mark.usefixtures("eager_drafts")
def test_samples_with_drafts_have_the_mixtures_distribution(model: KNNLM) -> None:
    """A drafted token and the one after it, drawn 800 times, against the mixture itself."""
    samples = 800
    asked = ask(
        model.lm,
        PROSE[:60],
        Overrides(lmbda=0.95),
        max_tokens=3,
        samples=samples,
        temperature=1.0,
        seed=7,
    )
    metrics = Metrics()
    work(model, asked, metrics=metrics)
    assert metrics.accepted_tokens._value.get() > 30
    texts = [[scored.token for scored in asked.tokens(number)] for number in range(samples)]
    likelier = KNNLM(model.lm, model.retrievers[0].store, **PARAMETERS | {"lmbda": 0.95})
    for length in (1, 2):
        prefix, _ = Counter(tuple(one[:length]) for one in texts).most_common(1)[0]
        drawn = Counter(
            one[length] for one in texts if tuple(one[:length]) == prefix and len(one) > length
        )
        text = torch.tensor([[*asked.job.prompt, *prefix]])
        expected = likelier.log_probs(text)[0, -1].double().exp()
        count = sum(drawn.values())
        assert count > 50
        for token, times in drawn.most_common(5):
            p = float(expected[token])
            assert abs(times - count * p) < 4 * (count * p * (1 - p)) ** 0.5 + 1
        assert float(expected[[*drawn]].sum()) > 0.5


def test_a_failure_hits_its_own_request_alone(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [ask(model.lm, text) for text in TEXTS]
    bad = asked[2].job

    def choose(self: Sample, *rest: Any) -> bool:
        if self.job is bad and self.tokens == 4:
            raise RuntimeError("no memory left")
        return bool(original(self, *rest))

    original = Sample._choose
    monkeypatch.setattr(Sample, "_choose", choose)
    worker = Worker(model, Metrics())
    for one in asked:
        worker.begin(one.job)
    while worker.jobs:
        worker.turn()
    worker.close()
    assert isinstance(asked[2].events[-1], Failed)
    for number, one in enumerate(asked):
        if number != 2:
            assert one.texts == [model.generate(TEXTS[number], max_new_tokens=12).text]


def test_what_is_no_number_is_one_samples_own(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any rows of any steps are NaN; the others go on as if they were alone."""
    wanted = [model.generate(text, max_new_tokens=12).text for text in SHORTEST_FIRST]
    original = Decoder.advance
    chosen = random.Random(0)
    for _ in range(6):
        asked = [ask(model.lm, text) for text in SHORTEST_FIRST]
        step_number, bad = chosen.randrange(6), set(chosen.sample(range(len(SHORTEST_FIRST)), 2))
        calls = itertools.count()

        def advance(self: Decoder, tokens: Any, batch: Any) -> Any:
            step, cached = original(self, tokens, batch)
            if next(calls) == step_number:  # noqa: B023
                step.log_probs[[*bad]] = torch.nan  # noqa: B023
            return step, cached

        monkeypatch.setattr(Decoder, "advance", advance)
        run(Worker(model, Metrics(), drafts=False), asked)
        monkeypatch.setattr(Decoder, "advance", original)
        assert {n for n, one in enumerate(asked) if isinstance(one.events[-1], Failed)} == bad
        for number in set(range(len(SHORTEST_FIRST))) - bad:
            assert asked[number].texts == [wanted[number]]


def test_a_search_that_fails_is_one_samples_own(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched together they fail, and one by one only the one that is the cause."""
    wanted = [model.generate(text, max_new_tokens=12).text for text in SHORTEST_FIRST]
    asked = [ask(model.lm, text) for text in SHORTEST_FIRST]
    bad_keys: list[torch.Tensor] = []
    original = knnlm.apps.engine.steps.mix_step
    calls = itertools.count()

    def mix(mixer: Any, step: Any) -> Any:
        if len(step.keys) == len(SHORTEST_FIRST) and next(calls) == 3:
            bad_keys.append(step.keys[1])
        if any(key.equal(bad) for key in step.keys for bad in bad_keys):
            raise RuntimeError("no memory left")
        return original(mixer, step)

    monkeypatch.setattr(knnlm.apps.engine.worker, "mix_step", mix)
    run(Worker(model, Metrics(), drafts=False), asked)
    assert bad_keys
    for number, one in enumerate(asked):
        if number == 1:
            assert isinstance(one.events[-1], Failed)
        else:
            assert one.texts == [wanted[number]]


def test_a_short_prompt_is_read_beside_long_ones(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knnlm.apps.engine.worker, "_PROMPT_TOKENS", 8)
    long_ones = [ask(model.lm, PROSE[:200], max_tokens=1) for _ in range(4)]
    short = ask(model.lm, "The", max_tokens=1)
    worker = Worker(model, Metrics())
    for one in [*long_ones, short]:
        worker.begin(one.job)
    for _ in range(2):
        worker.turn()
    assert short.reasons
    assert not any(one.reasons for one in long_ones)
    run(worker, [])
    assert all(one.reasons for one in long_ones)


@pytest.mark.usefixtures("eager_drafts")
def test_running_samples_keep_their_state(tmp_path: Path) -> None:
    """What is begun goes on as if nothing was forgotten, compacted, appended or indexed."""
    path = tiny_store(tmp_path / "store")
    chosen = random.Random(0)
    model = KNNLM(fresh_lm(), Datastore(path), **PARAMETERS)
    expected = {}
    worker = Worker(model, Metrics())
    running: list[Asked] = []
    changes: list[Callable[[], Any]] = [
        lambda: Datastore(path).forget([chosen.choice(Datastore(path).documents()).name]),
        lambda: compact(Datastore(path)),
        lambda: build(path, fresh_lm(), [Document(f"{chosen.random()}", PROSE[:90])]),
        lambda: build_index(Datastore(path), chosen.choice(["ivf", "exact"]), k=9),
    ]
    for number in range(12):
        one = ask(model.lm, TEXTS[number % len(TEXTS)], sources=3, max_tokens=20)
        now = KNNLM(model.lm, Datastore(path), **PARAMETERS)
        expected[one.job] = now.generate(TEXTS[number % len(TEXTS)], max_new_tokens=20).text
        running.append(one)
        worker.begin(one.job)
        for _ in range(2):
            worker.turn()
        if number < 3 or len(Datastore(path)) > 200:
            chosen.choice(changes)()
    run(worker, [])
    for one in running:
        assert not any(isinstance(event, Failed) for event in one.events), one.events
        assert one.texts == [expected[one.job]]
