"""What the page is given: the library's own numbers, passages that may be shown, and no more."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROSE, refusal
from serving import PARAMETERS, Served, fresh_lm, opening, serving, tiny_store
from torch import Tensor

import knnlm.tuning.fitting
from knnlm.apps.explorer.analysis import LEAST_K, analyze, analyze_and_explain, read_passages
from knnlm.apps.explorer.page import PAGE_PATHS, standalone_page
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.keyed_model import Reading
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document
from knnlm.tuning.tune import tune

TEXT = "A datastore is a retriever: ☃ 語 one entry for every token of the text."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("explorer") / "store")


@pytest.fixture(scope="module")
def model(path: Path) -> KNNLM:
    return opening(path)


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(lambda: opening(path)) as running:
        yield running


def unpacked(text: str, dtype: str, width: int | None = None) -> np.ndarray[Any, Any]:
    values = np.frombuffer(base64.b64decode(text), dtype)
    return values if width is None else values.reshape(-1, width)


def test_it_holds_what_explanations_hold(model: KNNLM) -> None:
    analysis = analyze(model, TEXT)
    explanations = model.explain(TEXT, sources=5)
    assert analysis.tokens.tolist() == [explanation.token for explanation in explanations]
    for name in ("lm_log_probs", "log_probs"):
        expected = torch.tensor([getattr(e, name[:-1]) for e in explanations])
        torch.testing.assert_close(getattr(analysis, name), expected, atol=1e-5, rtol=1e-5)
    (found,) = analysis.neighbors
    for number, explanation in enumerate(explanations):
        distances = [source.squared_distance for source in explanation.sources]  # rows may tie
        assert found.squared_distances[number, :5].tolist() == pytest.approx(distances, abs=1e-3)
    assert found.rows.shape[1] == LEAST_K > model.retrievers[0].parameters.k


def test_a_page_and_explanations_from_one_reading(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = model.generate(TEXT, max_new_tokens=5).tokens
    page = standalone_page(analyze(model, TEXT, generated))
    expected = model.explain(TEXT, generated=generated)
    readings = []
    read = LanguageModel.keys_and_logits

    def counted(lm: LanguageModel, tokens: Tensor) -> Reading:
        readings.append(tokens.shape)
        return read(lm, tokens)

    monkeypatch.setattr(LanguageModel, "keys_and_logits", counted)
    analysis, explanations = analyze_and_explain(model, TEXT, generated)
    assert len(readings) == 1
    assert standalone_page(analysis) == page
    for explanation, other in zip(explanations, expected, strict=True):
        assert explanation.log_prob == pytest.approx(other.log_prob, abs=1e-5)
        assert len(explanation.sources) == len(other.sources)
        assert {c.document for c in explanation.credits} == {c.document for c in other.credits}


def test_plain_values_come_back(model: KNNLM) -> None:
    analysis = analyze(model, TEXT)
    plain = analysis.to_dict()
    assert "".join(plain["pieces"]) == TEXT
    assert unpacked(plain["tokens"], "<i4").tolist() == analysis.tokens.tolist()
    assert unpacked(plain["lm_log_probs"], "<f4").tolist() == analysis.lm_log_probs.tolist()
    (store,) = plain["datastores"]
    retriever, (found,) = model.retrievers[0], analysis.neighbors
    assert store["parameters"] == PARAMETERS
    np.testing.assert_array_equal(unpacked(store["rows"], "<i4", store["k"]), found.rows)
    np.testing.assert_array_equal(
        unpacked(store["squared_distances"], "<f4", store["k"]), found.squared_distances
    )
    values = unpacked(store["values"], "<i4", store["k"])
    np.testing.assert_array_equal(values, retriever.tokens(found))
    assert {int(token) for token in plain["vocabulary"]} >= set(values.flatten().tolist())
    named = {document["name"]: document for document in store["documents"]}
    for row in set(found.rows.flatten().tolist()):
        document = retriever.store.document_at(row)
        assert named[document.name]["start"] <= row < named[document.name]["stop"]
    size = len(plain["pieces"])
    top = unpacked(plain["lm_top_log_probs"], "<f4").reshape(size, -1)
    tokens = torch.tensor([[model.lm.start_token, *analysis.tokens.tolist()]])
    logits = model.lm.keys_and_logits(tokens).logits[0, :-1]
    best = torch.log_softmax(logits, dim=-1).topk(top.shape[1], dim=1)
    torch.testing.assert_close(torch.tensor(top), best.values, atol=1e-5, rtol=1e-5)


def test_generated_tokens_follow_the_text(model: KNNLM) -> None:
    written = model.generate(TEXT, max_new_tokens=4).tokens
    analysis = analyze(model, TEXT, written)
    assert analysis.tokens[analysis.generated_from :].tolist() == written
    assert analyze(model, TEXT).generated_from == len(analysis.tokens) - 4


def test_fewer_entries_than_are_asked_for(tmp_path: Path) -> None:
    store = build(tmp_path / "s", fresh_lm(), [Document("one", "Nine words.")], window=64)
    analysis = analyze(KNNLM(fresh_lm(), store), TEXT)
    assert analysis.neighbors[0].rows.shape[1] == len(store)
    store.forget(["*"])
    analysis = analyze(KNNLM(fresh_lm(), store), TEXT)
    assert not analysis.neighbors[0].present.any()
    assert analysis.log_probs.equal(analysis.lm_log_probs)
    values = unpacked(analysis.to_dict()["datastores"][0]["values"], "<i4")
    assert set(values.tolist()) == {-1}


def test_learned_weights_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knnlm.tuning.fitting, "LEAST_TOKENS", 64)
    lm = fresh_lm()
    # no text twice: of equally distant entries any may be the k-th
    store = build(tmp_path / "s", lm, [Document("one", PROSE)], window=48, context=16)
    tuning = tune(KNNLM(lm, store), [Document("held", PROSE[60:400])], max_k=40)
    tuning.save([store], ["held"])
    model = KNNLM(lm, Datastore(tmp_path / "s"))
    assert model.mixer.gate is not None
    plain = analyze(model, TEXT).to_dict()
    expected = [explanation.log_prob for explanation in model.explain(TEXT)]
    learned = unpacked(plain["tuned_log_probs"], "<f4")
    np.testing.assert_allclose(learned, expected, atol=1e-4)
    fixed = KNNLM(lm, Datastore(tmp_path / "s"), weights="fixed")
    assert analyze(fixed, TEXT).to_dict()["tuned_log_probs"] is None


def test_passages_of_forgotten_documents_are_withheld(tmp_path: Path) -> None:
    path = tiny_store(tmp_path / "store")
    with serving(lambda: opening(path)) as served, served.http() as client:
        numbering = client.post("/explorer/analysis", json={"text": TEXT}).json()["datastores"][0][
            "numbering"
        ]
        body = {"rows": [[0, 3]], "numbering": [numbering]}
        before = client.post("/explorer/passages", json=body).json()
        assert list(before[0]) == ["0", "3"]
        store = Datastore(path)
        store.forget(["d0"])
        assert client.post("/explorer/passages", json=body).json() == [{}]
        compact(store)
        answer = client.post("/explorer/passages", json=body)
        assert answer.status_code == 400
        assert "explain it again" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "body", "part"),
    [
        ("analysis", {"text": ""}, "text must have a token, got none"),
        ("analysis", {"text": "x " * 8200}, "text must have at most 8192 tokens here"),
        ("analysis", {"text": "x", "generated": [384]}, "token ids below 384, got 384"),
        ("analysis", {"text": "x", "generated": [-1]}, "generated"),
        ("analysis", {"text": "x", "k": 3}, "k is not a field of this request"),
        ("analysis", {"text": "x" * (1 << 19)}, "text"),
        ("analysis", {}, "text"),
        ("passages", {"rows": [[10**9]], "numbering": [0]}, "rows must be below"),
        ("passages", {"rows": [[-1]], "numbering": [0]}, "rows"),
        ("passages", {"rows": [[], []], "numbering": [0]}, "each of the 1 datastores, got 2"),
        ("passages", {"rows": [[0]], "numbering": [7]}, "was compacted"),
    ],
)
def test_refusals(served: Served, route: str, body: Any, part: str) -> None:
    with served.http() as client:
        answer = client.post(f"/explorer/{route}", json=body)
    assert answer.status_code == 400
    assert part in answer.json()["error"]["message"]


def test_a_text_without_tokens_and_rows_beyond_the_store(model: KNNLM) -> None:
    with refusal(InvalidArgumentError, "text must have a token, got none"):
        analyze(model, "")
    with refusal(InvalidArgumentError, "rows must be below"):
        read_passages(model.lm, model.retrievers, [[model.retrievers[0].store.rows]])


def test_only_the_empty_page_is_open_to_all(path: Path) -> None:
    with serving(lambda: opening(path), api_key="sesame") as served, served.http() as client:
        for page in sorted(PAGE_PATHS):
            assert client.get(page).status_code == 200
        assert client.get("/explorer/datastores").status_code == 401
        for route, body in [("analysis", {"text": "x"}), ("passages", {})]:
            assert client.post(f"/explorer/{route}", json=body).status_code == 401
        headers = {"Authorization": "Bearer sesame"}
        (store,) = client.get("/explorer/datastores", headers=headers).json()["datastores"]
        assert store["documents"] == len(store["largest_documents"]) == 5
        assert store["entries"] == sum(one["entries"] for one in store["largest_documents"])


def test_other_pages_can_neither_ask_nor_frame(served: Served) -> None:
    with served.http() as client:
        plain = {"Content-Type": "text/plain"}
        for route in ("analysis", "passages"):
            answer = client.post(f"/explorer/{route}", content=b"{}", headers=plain)
            assert answer.status_code == 415
        policy = client.get("/explorer").headers["content-security-policy"]
        for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
            assert rule in policy


def test_one_file_names_no_other(model: KNNLM) -> None:
    text = "</script><script>alert(1)</script> <!-- nearest"
    page = standalone_page(analyze(model, text))
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)<" not in page
    assert "src=" not in page
    assert "http" not in page.replace("http-equiv", "")
