"""Evaluation against a slow reference: one forward pass and one brute-force search a token."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import PROSE, refusal
from jaxtyping import Float
from stores import distinct_documents, stored_keys
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import knnlm.evaluation.scoring
import knnlm.model.reading
import knnlm.retrieval.mixer
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.perplexity import Measure, PerplexityReport, evaluate
from knnlm.index.protocol import Neighbors
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.mixture.parameters import Parameters
from knnlm.model.keyed_model import Reading
from knnlm.model.language_model import LanguageModel
from knnlm.progress import Advance
from knnlm.text.documents import Document
from knnlm.text.sources import read_documents
from knnlm.text.windows import Windowing

TEXTS = [
    Document("a", "The datastore has felt like a retriever."),
    Document("none", ""),
    Document("b", PROSE[100:] + "One\tmore  line,\nand a half"),
    Document("c", "x"),
    Document("d", "What followed is a guess."),
]
WITH_TEXT = [document for document in TEXTS if document.text]
PARAMETERS = Parameters(k=9, lmbda=0.4, temperature=20.0)
WINDOWINGS = [
    Windowing(256, 64),
    Windowing(16, 0),
    Windowing(20, 7),
    Windowing(1, 0),
    Windowing(64, 0, "stream"),
    Windowing(20, 7, "stream"),
    Windowing(24, 23, "stream"),
]


@pytest.fixture(scope="session")
def store_path(tiny_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "store"
    build(path, tiny_lm, distinct_documents(3), window=48, context=16)
    return path


@pytest.fixture
def model(tiny_lm: LanguageModel, store_path: Path) -> KNNLM:
    p = PARAMETERS
    return KNNLM(tiny_lm, Datastore(store_path), k=p.k, lmbda=p.lmbda, temperature=p.temperature)


class Score(NamedTuple):
    document: Document
    token: int
    lm: float
    knn: float


def sequences(lm: LanguageModel, boundary: str) -> Iterator[list[tuple[Document, int]]]:
    """What is read from left to right, token by token, with the document of each."""
    encoded = lm.encode([str(document.text) for document in WITH_TEXT])
    whole = [
        [(document, lm.start_token), *((document, token) for token in tokens.tolist())]
        for document, tokens in zip(WITH_TEXT, encoded, strict=True)
    ]
    yield from [[pair for part in whole for pair in part]] if boundary == "stream" else whole


def first_read(position: int, windowing: Windowing) -> int:
    """The first token that the window sees in which a position is new."""
    window, context = windowing.window, windowing.context
    step = window - context
    if windowing.boundary == "stream":
        return max(0, position // step * step - context)
    return 0 if position < window else window + (position - window) // step * step - context


def slow_scores(model: KNNLM, windowing: Windowing) -> list[Score]:
    lm, store, parameters = model.lm, model.retrievers[0].store, model.retrievers[0].parameters
    keys = stored_keys(store).double()
    scores = []
    for sequence in sequences(lm, windowing.boundary):
        tokens = torch.tensor([token for _, token in sequence])
        for position in range(len(tokens) - 1):
            start = first_read(position, windowing)
            reading = lm.keys_and_logits(tokens[None, start : position + 1])
            target = int(tokens[position + 1])
            lm_prob = torch.softmax(reading.logits[0, -1].double(), dim=-1)[target]
            squared = (keys - reading.keys[0, -1].double()).square().sum(dim=1)
            nearest, rows = squared.topk(parameters.k, largest=False)
            weights = torch.softmax(-nearest / parameters.temperature, dim=0)
            knn_prob = weights[store.values[rows] == target].sum()
            mixed = parameters.lmbda * knn_prob + (1 - parameters.lmbda) * lm_prob
            scores.append(
                Score(sequence[position + 1][0], target, lm_prob.log().item(), mixed.log().item())
            )
    return scores


def assert_report(
    report: PerplexityReport, scores: Sequence[Score], words: int, size_bytes: int
) -> None:
    tokens = len(scores)
    assert (report.tokens, report.words, report.size_bytes) == (tokens, words, size_bytes)
    assert report.documents == len({score.document.name for score in scores})
    for measure, nats in [
        (report.lm, -sum(score.lm for score in scores)),
        (report.knn, -sum(score.knn for score in scores)),
    ]:
        assert measure.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
        assert measure.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert measure.word_perplexity == pytest.approx(math.exp(nats / max(words, 1)), rel=1e-3)
        assert measure.bits_per_byte == pytest.approx(
            nats / math.log(2) / max(size_bytes, 1), rel=1e-5
        )
    assert report.tokens_helped == sum(score.knn > score.lm for score in scores)
    assert report.tokens_hurt == sum(score.knn < score.lm for score in scores)


@pytest.mark.parametrize("windowing", WINDOWINGS, ids=str)
def test_equals_the_slow_reference(model: KNNLM, windowing: Windowing) -> None:
    report = model.perplexity(TEXTS, windowing=windowing)
    scores = slow_scores(model, windowing)
    texts = [str(document.text) for document in TEXTS]
    assert_report(report, scores, sum(len(text.split()) for text in texts), sum(map(len, texts)))
    assert 0 < report.tokens_helped < report.tokens, "the datastore must matter here"
    assert report.tokens_helped + report.tokens_hurt == report.tokens
    assert report.parameters == (PARAMETERS,)


@pytest.mark.parametrize(
    "windowing", [Windowing(20, 7), Windowing(20, 7, "stream")], ids=["document", "stream"]
)
def test_max_tokens_cuts_exactly(model: KNNLM, windowing: Windowing) -> None:
    scores = slow_scores(model, windowing)
    # from the first token on: in a stream also just after a document's start token
    for max_tokens in [*range(1, 17), *range(len(scores) - 14, len(scores) + 1), 10**6]:
        report = model.perplexity(TEXTS, windowing=windowing, max_tokens=max_tokens)
        cut = scores[:max_tokens]
        words = size_bytes = 0
        for document in {score.document.name: score.document for score in cut}.values():
            tokens = [score.token for score in cut if score.document is document]
            text = model.lm.decode(tokens).removeprefix("<s>")
            words, size_bytes = words + len(text.split()), size_bytes + len(text.encode())
        assert_report(report, cut, words, size_bytes)


def test_every_token_is_scored_once(model: KNNLM) -> None:
    documents = distinct_documents(7)
    tokens = sum(map(len, model.lm.encode([str(document.text) for document in documents])))
    for windowing in (Windowing(33, 5), Windowing(256, 0)):
        assert model.perplexity(documents, windowing=windowing).tokens == tokens
    for context in (0, 11):
        report = model.perplexity(documents, windowing=Windowing(40, context, "stream"))
        assert report.tokens == tokens + 6, "and the start token of every document but the first"


@pytest.mark.parametrize("windowing", [Windowing(20, 7), Windowing(20, 7, "stream")], ids=str)
@pytest.mark.parametrize("queries", [1, 30])
def test_chunked_equals_unchunked(
    model: KNNLM, windowing: Windowing, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.perplexity(TEXTS, windowing=windowing)
    monkeypatch.setattr(knnlm.evaluation.scoring, "QUERIES_AT_ONCE", queries)
    monkeypatch.setattr(knnlm.model.reading, "_SOFTMAX_ROWS", 3)
    monkeypatch.setattr(knnlm.model.reading, "_LOGITS_BYTES", 50 * 4 * model.lm.vocab_size)
    chunked = model.perplexity(TEXTS, windowing=windowing)
    assert chunked.knn.nats_per_token == pytest.approx(whole.knn.nats_per_token, rel=1e-6)
    assert chunked.lm.nats_per_token == pytest.approx(whole.lm.nats_per_token, rel=1e-6)
    for name in ("documents", "tokens", "words", "size_bytes", "tokens_helped", "tokens_hurt"):
        assert getattr(chunked, name) == getattr(whole, name)


def test_the_datastores_windows_are_the_default(model: KNNLM) -> None:
    stored = model.perplexity(TEXTS, windowing=Windowing(48, 16))
    assert model.perplexity(TEXTS).knn == stored.knn
    assert model.perplexity(TEXTS, windowing=Windowing(9, 0)).knn != stored.knn


class _Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the most rows that any tensor over the vocabulary had, unless told to look away."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab_size = vocab_size
        self.rows = 0
        self.looking = True

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        self.looking = False
        try:
            yield
        finally:
            self.looking = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                self.looking
                and isinstance(tensor, Tensor)
                and tensor.shape[-1:] == (self.vocab_size,)
            ):
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return result


def test_no_distribution_over_the_vocabulary_but_the_lms(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("evaluation must not build p_kNN over the vocabulary")

    monkeypatch.setattr(knnlm.retrieval.mixer, "interpolate_vocabulary", refuse)
    with pytest.raises(AssertionError, match="must not build"):
        model.log_probs(torch.tensor([[0, 5]]))

    monkeypatch.setattr(knnlm.model.reading, "_SOFTMAX_ROWS", 16)
    widest = _Widest(model.lm.vocab_size)
    read = LanguageModel.keys_and_logits

    def reading(lm: LanguageModel, tokens: Tensor) -> Reading:
        with widest.looking_away():
            return read(lm, tokens)

    monkeypatch.setattr(LanguageModel, "keys_and_logits", reading)
    documents = distinct_documents(9)
    with widest:
        report = model.perplexity(documents)
        # 16 rows in the softmax; the windows' logits pass by as views of at most 48 rows
        assert 16 <= widest.rows <= 48 < report.tokens / 10
        torch.empty(49, model.lm.vocab_size)
        assert widest.rows == 49, "the mode must see what it is there to see"


class _NeverSearched:
    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        raise AssertionError("must not be searched")


def test_without_weight_nothing_is_searched_and_both_are_equal(
    tiny_lm: LanguageModel, store_path: Path
) -> None:
    store = Datastore(store_path)
    report = KNNLM(tiny_lm, store, lmbda=0.0, index=_NeverSearched()).perplexity(TEXTS)
    assert report.knn == report.lm
    assert report.tokens_helped == report.tokens_hurt == 0
    assert report.seconds.search < 0.01
    with pytest.raises(AssertionError, match="must not be searched"):
        KNNLM(tiny_lm, store, lmbda=0.1, index=_NeverSearched()).perplexity(TEXTS)


def test_a_token_without_any_vote_has_no_probability(
    tiny_lm: LanguageModel, store_path: Path
) -> None:
    report = KNNLM(tiny_lm, Datastore(store_path), k=1, lmbda=1.0).perplexity(TEXTS)
    assert replace(report.knn, perplexity_error=None) == Measure(*[math.inf] * 4)
    assert report.lm.perplexity < math.inf


def test_measures() -> None:
    measure = Measure.of(total_nats=70.0, tokens=50, words=20, size_bytes=100)
    assert measure.nats_per_token == pytest.approx(1.4)
    assert measure.perplexity == pytest.approx(math.exp(1.4))
    assert measure.word_perplexity == pytest.approx(math.exp(3.5))
    assert measure.bits_per_byte == pytest.approx(0.7 / math.log(2))
    assert Measure.of(1e6, 1, 0, 0).perplexity == math.inf


def test_a_report_has_the_fields_of_eval_json(model: KNNLM) -> None:
    report = model.perplexity(TEXTS)
    fields: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert fields["tokens"] == report.tokens
    for side in ("lm", "knn"):
        for name in ("perplexity", "nats_per_token", "word_perplexity", "bits_per_byte"):
            assert fields[side][name] == getattr(getattr(report, side), name)
    assert fields["parameters"] == {"k": 9, "lmbda": 0.4, "temperature": 20.0}
    assert set(fields["seconds"]) == {"lm", "search", "total"}
    assert fields["seconds"]["total"] >= fields["seconds"]["lm"] > 0
    assert fields["tokens_helped"] == report.tokens_helped
    assert fields["tokens_hurt"] == report.tokens_hurt


def test_files_are_counted_in_words_and_bytes(model: KNNLM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Où sont les neiges d’antan ?\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Ici.", encoding="utf-8")
    report = model.perplexity(read_documents(tmp_path))
    assert (report.documents, report.words) == (2, 7)
    assert report.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_an_uncut_text_is_counted_as_it_is_not_as_it_is_decoded(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("must not be decoded")

    monkeypatch.setattr(LanguageModel, "decode", refuse)
    documents = distinct_documents(2)  # of several windows
    for boundary in ("document", "stream"):
        report = model.perplexity(documents, windowing=Windowing(20, 7, boundary))
        assert report.size_bytes == sum(document.size_bytes for document in documents)


class _Recorded:
    def __init__(self) -> None:
        self.done = 0.0
        self.totals: list[float | None] = []

    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        self.totals.append(total)

        def advance(amount: float, total: float | None = None, note: str | None = None) -> None:
            self.done += amount
            self.totals.append(total)

        yield advance


def test_progress_counts_tokens(model: KNNLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knnlm.evaluation.scoring, "QUERIES_AT_ONCE", 100)
    progress = _Recorded()
    report = model.perplexity(distinct_documents(5), progress=progress)
    assert progress.done == report.tokens
    assert progress.totals[0] is None
    assert progress.totals[-1] == pytest.approx(report.tokens)
    progress = _Recorded()
    assert model.perplexity(iter(distinct_documents(5)), progress=progress).tokens == report.tokens
    assert progress.totals[-1] is None, "of a generator nobody knows the size"
    progress = _Recorded()
    model.perplexity(distinct_documents(5), max_tokens=150, progress=progress)
    assert (progress.totals[0], progress.totals[-1], progress.done) == (150, 150, 150)


def test_refusals(model: KNNLM) -> None:
    with refusal(InvalidArgumentError, "the text to evaluate must have a token, got none"):
        model.perplexity([Document("empty", "")])
    with refusal(InvalidArgumentError, "the text to evaluate must have a token, got none"):
        model.perplexity([])
    with refusal(InvalidArgumentError, "max_tokens must be at least 1, got 0"):
        model.perplexity(TEXTS, max_tokens=0)
    with refusal(InvalidArgumentError, "window must be at most 256 for tiny, got 257"):
        evaluate(model.lm, model.mixer, TEXTS, Windowing(257, 0))
