"""Every kind of tokenizer, end to end: library, engine, explanations and the explorer agree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import tiny_llama
from tokenizer_families import FAMILIES, PROSE

from knnlm.apps.engine.jobs import Completion, Event, Grown, Overrides, PromptRead, ScoredToken
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.engine.worker import Worker
from knnlm.apps.explorer.analysis import analyze, read_passages
from knnlm.evaluation.explain import explain
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel
from knnlm.model.token_text import detokenize
from knnlm.text.documents import Document

PROMPT = "A library keeps"
FAITHFUL = ("byte_level", "byte_level_with_added", "llama_2", "gemma", "metaspace")


def language_model(family: str) -> LanguageModel:
    tokenizer = FAMILIES[family]()
    model = tiny_llama(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LanguageModel(model, tokenizer, name="tiny")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> KNNLM:
    lm = language_model(family)
    store = build(
        tmp_path_factory.mktemp("tokens") / "s", lm, [Document("a", PROSE * 3)], window=64
    )
    return KNNLM(lm, store, k=4, lmbda=0.5)


class Answer(NamedTuple):
    prompt: tuple[ScoredToken, ...]
    pieces: list[Grown]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[ScoredToken]:
        return [token for piece in self.pieces for token in piece.tokens]


def complete(model: KNNLM, prompt: list[int], hidden: int = 1, **options: Any) -> Answer:
    """Let the engine complete a prompt."""
    events: list[Event] = []
    options = {"max_tokens": 30, "log_probs": 3, "score_prompt": True} | options
    worker = Worker(model, Metrics())
    worker.begin(Completion(events.append, Overrides(), prompt, hidden, **options))
    while worker.jobs:
        worker.turn()
    worker.close()
    read, *grown = events
    assert isinstance(read, PromptRead)
    pieces = [event for event in grown if isinstance(event, Grown)]
    assert len(pieces) == len(grown)
    return Answer(read.tokens, pieces)


def sampled(seed: int) -> SamplingOptions:
    return SamplingOptions(temperature=1.5, seed=seed)


def random_answers(model: KNNLM, **options: Any) -> Iterator[Answer]:
    """Yield completions of all sorts of tokens."""
    prompt = [model.lm.start_token, *model.encode(PROMPT)]
    for seed in range(6):
        yield complete(model, prompt, sampling=sampled(seed), **options)


def test_generated_text_continues_the_prompt(model: KNNLM, family: str) -> None:
    tokens = model.encode(PROMPT)
    ways: list[dict[str, Any]] = [{}, *({"do_sample": True, "seed": seed} for seed in range(6))]
    for options in ways:
        generation = model.generate(PROMPT, max_new_tokens=20, **options)
        kept = [token for token in generation.tokens if token not in model.lm.end_tokens]
        whole = detokenize(model.lm.tokenizer, [*tokens, *kept])
        assert model.lm.decode(tokens) + generation.text == whole
        if family in FAITHFUL:
            assert PROMPT + generation.text == whole


def test_the_engine_writes_what_the_library_writes(model: KNNLM) -> None:
    prompt = [model.lm.start_token, *model.encode(PROMPT)]
    answer = complete(model, prompt, sampling=SamplingOptions(temperature=0.0))
    assert answer.text == model.generate(PROMPT, max_new_tokens=30).text


def test_scored_tokens_add_up_to_the_text(model: KNNLM) -> None:
    ids = model.encode(PROMPT)
    for answer in random_answers(model):
        tokens = [scored.token for scored in answer.tokens]
        whole = detokenize(model.lm.tokenizer, [*ids, *tokens])
        assert "".join(scored.text for scored in answer.prompt) == model.lm.decode(ids)
        assert "".join(scored.text for scored in answer.tokens) == answer.text
        assert model.lm.decode(ids) + answer.text == whole
        text = ""
        for scored in answer.tokens:
            assert scored.offset == len(text)
            text += scored.text


def test_stop_sequences_end_the_text_and_its_tokens(model: KNNLM) -> None:
    stopped = 0
    for answer, free in zip(random_answers(model, stop=("e",)), random_answers(model), strict=True):
        assert answer.text == free.text.partition("e")[0]
        assert "".join(scored.text for scored in answer.tokens) == answer.text
        stopped += "e" in free.text
    assert stopped > 0


def test_the_likeliest_tokens_stay_apart(model: KNNLM) -> None:
    parts = 0
    for answer in random_answers(model, log_probs=5):
        scored = [*answer.prompt, *answer.tokens]
        ids = [model.lm.start_token, *(token.token for token in scored)]
        log_probs = model.log_probs(torch.tensor([ids]))[0, :-1]
        for token, distribution in zip(scored, log_probs, strict=True):
            assert token.top is not None
            best = distribution.topk(5)
            assert len(token.top) == 5 + (token.token not in best.indices.tolist())
            assert token.top[0].log_prob == pytest.approx(float(best.values[0]), abs=1e-4)
            parts += sum(likely.name.startswith("bytes:") for likely in token.top)
    vocabulary = model.lm.token_texts.names(range(model.lm.vocab_size))
    assert (parts > 0) == (sum(name.startswith("bytes:") for name in vocabulary) > 100)


def test_explanations_add_up_to_the_text(model: KNNLM, family: str) -> None:
    generation = model.generate(PROMPT, max_new_tokens=20, do_sample=True, seed=3)
    explained = explain(model, PROMPT, generated=generation.tokens, sources=4)
    ids = [*model.encode(PROMPT), *generation.tokens]
    assert "".join(one.text for one in explained) == detokenize(model.lm.tokenizer, ids)
    document = model.lm.decode(model.encode(PROSE * 3))
    if family in FAITHFUL:
        assert document == PROSE * 3
    for one in explained:
        for source in one.sources:
            assert source.before + source.value + source.after in document
            if source.before and not source.before.endswith("\ufffd"):
                assert document.count(source.before + source.value) > 0


def test_a_sources_credit_is_its_passage(model: KNNLM) -> None:
    answer = next(random_answers(model, sources=4, log_probs=None))
    document = model.lm.decode(model.encode(PROSE * 3))
    for scored in answer.tokens:
        assert scored.explanation is not None
        assert scored.explanation.text == scored.text
        assert scored.explanation.token == scored.token
        for source in scored.explanation.sources:
            assert source.before + source.value + source.after in document


def test_the_explorer_shows_the_text(model: KNNLM) -> None:
    text = PROMPT + " naïve 日本 🙂 ж books"
    analysis = analyze(model, text)
    plain = analysis.to_dict()
    ids = analysis.tokens.tolist()
    assert "".join(plain["pieces"]) == detokenize(model.lm.tokenizer, ids)
    halves = [name for name in plain["vocabulary"].values() if "\ufffd" in name]
    assert halves == []
    document = model.lm.decode(model.encode(PROSE * 3))
    rows = list(range(0, model.retrievers[0].store.rows, 7))
    (passages,) = read_passages(model.lm, model.retrievers, [rows])
    for passage in passages.values():
        assert passage["before"] + passage["value"] + passage["after"] in document


@pytest.mark.parametrize("family", ["llama_2", "byte_level"])
def test_token_ids_that_end_within_a_character(tmp_path: Path, family: str) -> None:
    lm = language_model(family)
    model = KNNLM(lm, build(tmp_path / "s", lm, [Document("a", PROSE)], window=64), k=4)
    (tokens,) = lm.encode(["a ж b"])
    for cut in range(1, len(tokens)):
        ids = tokens[:cut].tolist()
        answer = complete(model, ids, hidden=0, max_tokens=4)
        assert "".join(scored.text for scored in answer.prompt) == lm.decode(ids)
        assert "".join(scored.text for scored in answer.tokens) == answer.text
