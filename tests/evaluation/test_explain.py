"""Explanations: the numbers are the model's, and every source is where it is said to be."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import PROSE, refusal
from stores import stored_keys
from torch import Tensor

import knnlm.evaluation.scoring
from knnlm.datastore.append import append_documents
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import explain
from knnlm.evaluation.explanation import Explanation, sum_credits
from knnlm.knn_lm import KNNLM
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

# plain ASCII, so that every token is whole characters and passages can be found in the text
DOCUMENTS = [
    Document("first", "The nearest neighbors of a hidden state are near."),
    Document("second", PROSE[:230]),
    Document("third", "A retriever: one entry for every token. The nearest places vote."),
]
TEXTS = {document.name: str(document.text) for document in DOCUMENTS}
TEXT = "The nearest places are near."
K, TEMPERATURE = 10, 25.0


@pytest.fixture
def model(llama_lm: LanguageModel, tmp_path: Path) -> KNNLM:
    store = append_documents(
        tmp_path / "store", llama_lm, DOCUMENTS, window=256, context=0, shard_rows=30
    )
    return KNNLM(llama_lm, store, k=K, lmbda=0.4, temperature=TEMPERATURE)


@pytest.fixture
def tokens(llama_lm: LanguageModel) -> list[int]:
    return [int(token) for token in llama_lm.encode([TEXT])[0]]


def at_tokens(model: KNNLM, lmbda: float, tokens: list[int]) -> Tensor:
    other = KNNLM(model.lm, model.retrievers[0].store, k=K, lmbda=lmbda, temperature=TEMPERATURE)
    read = torch.tensor([[model.lm.start_token, *tokens[:-1]]])
    return other.log_probs(read)[0].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_probabilities_are_those_of_the_mixture(model: KNNLM, tokens: list[int]) -> None:
    explanations = explain(model, TEXT)
    assert [explanation.token for explanation in explanations] == tokens
    assert "".join(explanation.text for explanation in explanations) == TEXT

    def column(name: str) -> Tensor:
        return torch.tensor([float(getattr(explanation, name)) for explanation in explanations])

    for name, lmbda in [("lm_log_prob", 0.0), ("log_prob", 0.4)]:
        expected = at_tokens(model, lmbda, tokens)
        torch.testing.assert_close(column(name), expected, atol=1e-5, rtol=1e-5)
    knn_probs = at_tokens(model, 1.0, tokens).exp()
    torch.testing.assert_close(column("knn_prob"), knn_probs, atol=1e-5, rtol=1e-5)
    assert 0 < int((knn_probs > 0.3).sum()) < len(tokens), "some tokens helped, some not"
    gains = column("log_prob") - column("lm_log_prob")
    torch.testing.assert_close(column("gain"), gains, atol=1e-6, rtol=0)
    assert float(gains.min()) < 0 < float(gains.max())


def test_sources_are_the_nearest_entries(model: KNNLM, tokens: list[int]) -> None:
    explanations = explain(model, TEXT, sources=K)
    queries = model.lm.keys(torch.tensor([[model.lm.start_token, *tokens[:-1]]]))[0].double()
    keys = stored_keys(model.retrievers[0].store).double()
    for query, explanation in zip(queries, explanations, strict=True):
        squared = (keys - query).square().sum(dim=1)
        nearest = squared.topk(K, largest=False).values
        found = torch.tensor([source.squared_distance for source in explanation.sources])
        torch.testing.assert_close(found.double(), nearest, atol=1e-3, rtol=1e-4)
        rows = [source.row for source in explanation.sources]
        torch.testing.assert_close(squared[rows], nearest, atol=1e-3, rtol=1e-4)
        weights = torch.softmax(-nearest / TEMPERATURE, dim=0)
        shares = torch.tensor([source.weight for source in explanation.sources]).double()
        torch.testing.assert_close(shares, weights, atol=1e-4, rtol=1e-3)
        votes = sum(
            source.weight
            for source in explanation.sources
            if int(model.retrievers[0].store.values[source.row]) == explanation.token
        )
        assert explanation.knn_prob == pytest.approx(votes, abs=1e-5)


def test_sources_are_where_they_are_said_to_be(model: KNNLM) -> None:
    encoded = {name: model.lm.encode([text])[0].tolist() for name, text in TEXTS.items()}
    starts = dict(zip(encoded, [0, len(encoded["first"])], strict=False))
    starts["third"] = starts["second"] + len(encoded["second"])
    seen = set()
    for explanation in explain(model, TEXT, sources=K, before=5, after=2):
        for source in explanation.sources:
            text, document = TEXTS[source.document], encoded[source.document]
            assert source.row == starts[source.document] + source.position
            assert model.lm.encode([source.value])[0].tolist() == [document[source.position]]
            assert source.before + source.value + source.after in text
            first = max(0, source.position - 5)
            before = model.lm.decode(document[first : source.position])
            assert source.before == before
            assert source.after == model.lm.decode(
                document[source.position + 1 : source.position + 3]
            )
            assert text.startswith(model.lm.decode(document[:first]) + before + source.value)
            seen.add(source.document)
    assert seen == set(TEXTS), "documents of every shard speak"


def test_a_passage_stays_within_its_document(model: KNNLM) -> None:
    for explanation in explain(model, TEXT, sources=K, before=10**6, after=10**6):
        for source in explanation.sources:
            assert source.before + source.value + source.after == TEXTS[source.document]


def test_the_text_itself_is_its_own_best_source(llama_lm: LanguageModel, model: KNNLM) -> None:
    document = llama_lm.encode([TEXTS["third"]])[0].tolist()
    # the key of the start token is the same in every document
    for position, explanation in list(enumerate(explain(model, TEXTS["third"], sources=1)))[1:]:
        (source,) = explanation.sources
        assert (source.document, source.position) == ("third", position)
        assert source.squared_distance < 1e-2
        assert explanation.token == document[position]


def test_what_is_asked_for_is_what_is_named(model: KNNLM) -> None:
    assert {len(explanation.sources) for explanation in explain(model, TEXT)} == {3}
    assert {len(explanation.sources) for explanation in explain(model, TEXT, sources=0)} == {0}
    bare = explain(model, TEXT, sources=10**6, before=0, after=0)
    assert {len(explanation.sources) for explanation in bare} == {K}
    assert {source.before + source.after for e in bare for source in e.sources} == {""}


def test_forgotten_documents_are_never_named(model: KNNLM) -> None:
    model.retrievers[0].store.forget(["first", "third"])
    explanations = explain(model, TEXT, sources=K)
    assert {source.document for e in explanations for source in e.sources} == {"second"}


def test_fewer_entries_than_k_name_all_there_are(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = append_documents(tmp_path / "s", llama_lm, DOCUMENTS, window=256, context=0)
    model = KNNLM(llama_lm, store, k=len(store), lmbda=0.4)
    store.forget(["second", "third"])
    for explanation in explain(model, TEXT, sources=10**6):
        assert len(explanation.sources) == len(store)
        assert sum(source.weight for source in explanation.sources) == pytest.approx(1.0)


def test_long_texts_are_explained_piece_by_piece(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PROSE * 6  # more than a window
    whole = explain(model, text, sources=1)
    monkeypatch.setattr(knnlm.evaluation.scoring, "QUERIES_AT_ONCE", 10)
    parts = explain(model, text, sources=1)
    assert len(model.lm.encode([text])[0]) == len(parts) > 256

    def rounded(explanation: Explanation) -> tuple[int, float, float]:
        return explanation.token, round(explanation.log_prob, 3), round(explanation.knn_prob, 3)

    for one, other in zip(whole, parts, strict=True):
        assert rounded(one) == pytest.approx(rounded(other), abs=2e-3)


def test_the_sources_of_several_datastores(
    model: KNNLM, llama_lm: LanguageModel, tmp_path: Path
) -> None:
    other = append_documents(
        tmp_path / "other", llama_lm, [Document("o", TEXT + " Yes.")], window=256
    )
    (retriever,) = model.retrievers
    stores = [retriever.store, other]
    both = KNNLM(llama_lm, stores, k=[K, 3], lmbda=[0.4, 0.2], temperature=TEMPERATURE)
    alone = [
        explain(KNNLM(llama_lm, store, k=k, lmbda=0.5, temperature=TEMPERATURE), TEXT, sources=50)
        for store, k in zip(stores, [K, 3], strict=True)
    ]
    for number, explanation in enumerate(explain(both, TEXT, sources=50)):
        parts = [of_store[number] for of_store in alone]
        expected = (0.4 * parts[0].knn_prob + 0.2 * parts[1].knn_prob) / 0.6
        assert explanation.knn_prob == pytest.approx(expected, abs=1e-6)
        prob = 0.6 * expected + 0.4 * math.exp(explanation.lm_log_prob)
        assert math.exp(explanation.log_prob) == pytest.approx(prob, abs=1e-6)
        weights = {(s.store, s.row): s.weight for s in explanation.sources}
        expected_weights = {
            (source.store, source.row): source.weight * share
            for part, share in zip(parts, [0.4 / 0.6, 0.2 / 0.6], strict=True)
            for source in part.sources
        }
        assert weights == pytest.approx(expected_weights, abs=1e-6)
        assert list(weights.values()) == sorted(weights.values(), reverse=True)
        assert {source.store for source in explanation.sources} == {str(s.path) for s in stores}


def test_votes_are_the_neighbors_grouped_by_their_token(model: KNNLM) -> None:
    for explanation in explain(model, TEXT, sources=K):
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        for source in explanation.sources:
            sums[source.token] = sums.get(source.token, 0.0) + source.weight
            counts[source.token] = counts.get(source.token, 0) + 1
        assert {vote.token: vote.weight for vote in explanation.votes} == pytest.approx(sums)
        assert {vote.token: vote.neighbors for vote in explanation.votes} == counts
        weights = [vote.weight for vote in explanation.votes]
        assert weights == sorted(weights, reverse=True)
        for vote in explanation.votes:
            assert vote.text == model.lm.decode([vote.token])
        own = [vote.weight for vote in explanation.votes if vote.token == explanation.token]
        assert sum(own) == pytest.approx(explanation.knn_prob, abs=1e-6)


def test_few_votes_are_named_but_always_that_for_the_token_itself(model: KNNLM) -> None:
    whole = explain(model, PROSE[200:330], sources=K)
    beyond = 0
    for one, bare in zip(whole, explain(model, PROSE[200:330], sources=0), strict=True):
        assert list(one.votes[:5]) == list(bare.votes[:5])
        assert len(bare.votes) <= 6
        beyond += len(bare.votes) == 6
        if one.knn_prob > 0:
            assert one.token in {vote.token for vote in bare.votes}
    assert beyond > 0, "the case occurs"


def test_credits_are_the_parts_of_the_probability(model: KNNLM) -> None:
    explanations = explain(model, TEXT, sources=K)
    for explanation in explanations:
        p = math.exp(explanation.log_prob)
        expected: dict[str, float] = {}
        for source in explanation.sources:
            if source.token == explanation.token:
                part = 0.4 * source.weight / p
                expected[source.document] = expected.get(source.document, 0.0) + part
        assert {credit.document: credit.tokens for credit in explanation.credits} == pytest.approx(
            expected, abs=1e-5
        )
        from_lm = 0.6 * math.exp(explanation.lm_log_prob) / p
        assert sum(c.tokens for c in explanation.credits) + from_lm == pytest.approx(1.0, abs=1e-5)
    total = sum_credits(explanations)
    assert {credit.document for credit in total} == set(TEXTS)
    assert {credit.store for credit in total} == {str(model.retrievers[0].store.path)}
    for credit in total:
        parts = [c.tokens for e in explanations for c in e.credits if c.document == credit.document]
        assert credit.tokens == pytest.approx(sum(parts))
    assert list(total) == sorted(total, key=lambda credit: -credit.tokens)


def test_what_nobody_voted_for_has_no_credits(model: KNNLM) -> None:
    silent = KNNLM(model.lm, model.retrievers[0].store, k=1, lmbda=1.0)
    explanations = silent.explain(TEXT)
    assert {explanation.log_prob for explanation in explanations} == {0.0, -math.inf}
    for explanation in explanations:
        given = sum(credit.tokens for credit in explanation.credits)
        assert given == pytest.approx(explanation.knn_prob)
    fair = KNNLM(model.lm, model.retrievers[0].store, k=K, lmbda=0.0)
    assert not any(explanation.credits for explanation in fair.explain(TEXT))


def test_what_was_generated_is_explained_token_by_token(model: KNNLM) -> None:
    generation = model.generate(TEXT, max_new_tokens=6)
    whole = model.explain(TEXT, generated=generation.tokens, sources=1)
    before = model.explain(TEXT, sources=1)
    assert [one.token for one in whole[len(before) :]] == generation.tokens
    for one, other in zip(whole[: len(before)], before, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)
    tokens = torch.tensor([[model.lm.start_token, *[one.token for one in whole]]])
    best = model.log_probs(tokens)[0, -7:-1].argmax(dim=1)
    assert best.tolist() == generation.tokens, "greedy"


def test_as_plain_values(model: KNNLM) -> None:
    explanation = explain(model, TEXT)[3]
    plain = json.loads(json.dumps(explanation.to_dict()))
    assert plain["gain"] == explanation.gain
    assert plain["sources"][0]["document"] == explanation.sources[0].document
    assert set(plain["sources"][0]) == {
        "store",
        "row",
        "document",
        "position",
        "token",
        "weight",
        "squared_distance",
        "before",
        "value",
        "after",
    }


def test_refusals(model: KNNLM) -> None:
    with refusal(InvalidArgumentError, "the text to explain must have a token, got none"):
        explain(model, "")
    for name in ("sources", "before", "after"):
        with refusal(InvalidArgumentError, f"{name} must be at least 0, got -1"):
            explain(model, TEXT, **{name: -1})  # type: ignore[arg-type]
    model.retrievers[0].store.forget(["*"])
    with refusal(
        InvalidArgumentError, f"{model.retrievers[0].store.path} must have entries to explain with"
    ):
        explain(model, TEXT)
