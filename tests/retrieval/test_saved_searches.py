"""Saved searches: pointers against a slow walk, skipping, and both against searching always."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, refusal
from stores import distinct_documents, stored_keys
from torch import Tensor

import knnlm.tuning.fitting
from knnlm.attachment.attachment import attach
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError, UnsupportedModelError
from knnlm.index.protocol import Neighbors
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.pointers import Pointers
from knnlm.retrieval.saved_searches import SavingRule, Walks, choose_saving
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing
from knnlm.tuning.tune import tune

GIVEN: dict[str, Any] = {"k": 24, "lmbda": 0.4, "temperature": 20.0}
HELD_OUT = [Document("held", PROSE[60:700] + "Something else."), Document("out", "A memory is.")]
ALWAYS = 10**6  # more pointers than there can be


@pytest.fixture(scope="module")
def store_path(llama_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "store"
    build(path, llama_lm, distinct_documents(4), window=48, context=16)
    return path


def slow_walk(model: KNNLM, tokens: list[int], least: int) -> tuple[Tensor, int]:
    """Return log p of each next token, and how many searches it took, entry by entry."""
    (retriever,) = model.retrievers
    store, parameters = retriever.store, retriever.parameters
    keys, values = stored_keys(store).double(), store.values.tolist()
    ends = {d.stop - 1 for d in store.documents()}
    inputs = torch.tensor([tokens[:-1]])
    queries = model.lm.keys(inputs)[0].double()
    lm = model.lm.log_probs(model.lm.keys_and_logits(inputs).logits)[0].double()
    reached: list[int] = []
    log_probs, made = [], 0
    for position, target in enumerate(tokens[1:]):
        squared = (keys - queries[position]).square().sum(dim=1)
        if len(reached) < least:
            made += 1
            reached = squared.topk(parameters.k, largest=False).indices.tolist()
        voters = sorted(reached, key=lambda row: float(squared[row]))[: parameters.k]
        weights = torch.softmax(-squared[voters] / parameters.temperature, dim=0)
        agreeing = torch.tensor([values[row] == target for row in voters])
        knn = float(weights[agreeing].sum())
        lmbda = parameters.lmbda
        mixed = lmbda * knn + (1 - lmbda) * float(lm[position, target].exp())
        log_probs.append(torch.tensor(mixed, dtype=torch.float64).log())
        reached = [row + 1 for row in reached if values[row] == target and row not in ends]
    return torch.stack(log_probs), made


@pytest.mark.parametrize("least", [1, 3, ALWAYS])
def test_pointers_follow_a_text_as_a_slow_walk_does(
    llama_lm: LanguageModel, store_path: Path, least: int
) -> None:
    model = KNNLM(llama_lm, store_path, **GIVEN, pointers=least)
    text = PROSE[20:260]
    tokens = [llama_lm.start_token, *model.encode(text)]
    expected, made = slow_walk(model, tokens, least)
    report = model.perplexity([Document("one", text)], windowing=Windowing(256, 64))
    assert report.searches is not None
    assert report.searches.made == made
    assert report.searches.saved == pytest.approx(1 - made / (len(tokens) - 1))
    assert (made == len(tokens) - 1) == (least == ALWAYS)
    assert report.knn.nats_per_token == pytest.approx(-float(expected.mean()), rel=1e-5)

    # token by token inside the model: the same walk, and a mixture that sums to 1
    with attach(llama_lm.model, store_path, **GIVEN, pointers=least) as attachment:
        past, log_probs = None, []
        for token in tokens[:-1]:
            output = llama_lm.model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            log_probs.append(output.logits[0, -1])
    dense = torch.stack(log_probs).double()
    torch.testing.assert_close(
        dense.exp().sum(dim=1), torch.ones(len(dense), dtype=torch.float64), atol=1e-5, rtol=0
    )
    found = dense.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert attachment.searches_saved == pytest.approx(report.searches.saved)


@pytest.mark.parametrize("boundary", ["document", "stream"])
def test_where_every_token_is_searched_for_nothing_changes(
    llama_lm: LanguageModel, store_path: Path, boundary: str
) -> None:
    windowing = Windowing(48, 16, boundary)
    plain = KNNLM(llama_lm, store_path, **GIVEN).perplexity(HELD_OUT, windowing=windowing)
    always = KNNLM(llama_lm, store_path, **GIVEN, pointers=ALWAYS)
    report = always.perplexity(HELD_OUT, windowing=windowing)
    assert plain.searches is None
    assert report.searches is not None
    assert report.searches.saved == 0.0
    assert report.knn == plain.knn
    assert report.tokens_hurt == plain.tokens_hurt


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_generation_that_always_searches_is_the_plain_one(
    llama_lm: LanguageModel, store_path: Path, options: dict[str, Any]
) -> None:
    plain = KNNLM(llama_lm, store_path, **GIVEN).generate(PROSE[:40], max_new_tokens=12, **options)
    saving = KNNLM(llama_lm, store_path, **GIVEN, pointers=ALWAYS)
    always = saving.generate(PROSE[:40], max_new_tokens=12, **options)
    assert always == plain
    few = KNNLM(llama_lm, store_path, **GIVEN, pointers=1).generate(
        PROSE[:40], max_new_tokens=12, **options
    )
    assert few.searches_saved > 0.0 or "prompt_lookup_num_tokens" in options


def search_rows(mixer: Mixer, queries: Tensor, some: Tensor) -> list[Neighbors]:
    return mixer.find(queries[some])


def test_sequences_of_a_batch_walk_apart(llama_lm: LanguageModel, store_path: Path) -> None:
    mixer = KNNLM(llama_lm, store_path, **GIVEN).mixer
    rule = SavingRule(pointers=1)
    rows = [[llama_lm.start_token, *llama_lm.encode([text])[0].tolist()][:12] for text in (
        PROSE[:80], PROSE[90:200]
    )]  # fmt: skip
    keys = llama_lm.keys(torch.tensor(rows)).float()
    matters = torch.ones(2, dtype=torch.bool)

    def walk(sequences: list[int], swap_at: int | None = None) -> list[Neighbors]:
        walks, order, found = Walks(mixer, rule, len(sequences)), list(sequences), []
        for time in range(12):
            if time == swap_at:
                walks.reorder([1, 0])
                order.reverse()
            queries = keys[order, time]
            tokens = None if time == 0 else [rows[number][time] for number in order]
            search = partial(search_rows, mixer, queries)
            (now,) = walks.step(tokens, queries, matters[order], search)
            back = [order.index(number) for number in sorted(order)]
            found.append(Neighbors(now.squared_distances[back], now.rows[back]))
        return found

    together, swapped = walk([0, 1]), walk([0, 1], swap_at=5)
    for number in (0, 1):
        for alone, both, other in zip(walk([number]), together, swapped, strict=True):
            assert torch.equal(alone.rows[0], both.rows[number])
            assert torch.equal(alone.rows[0], other.rows[number])


def test_pointers_stay_in_their_document_and_out_of_forgotten_ones(
    llama_lm: LanguageModel, tmp_path: Path
) -> None:
    build(tmp_path / "s", llama_lm, distinct_documents(4), window=48, context=16)
    store = Datastore(tmp_path / "s")
    (retriever,) = KNNLM(llama_lm, store, **GIVEN).retrievers
    key = torch.zeros(llama_lm.dimension)

    def reached(rows: list[int], token: int) -> list[int]:
        pointers = Pointers(retriever)
        pointers.start(torch.tensor(rows))
        pointers.follow(token)
        found = pointers.reach(key)
        assert found.rows.shape == (1, GIVEN["k"])
        assert torch.equal(found.rows >= 0, found.squared_distances.isfinite())
        return sorted(found.rows[found.present].tolist())

    documents = {d.name: d for d in store.documents()}
    ends = [d.stop - 1 for d in documents.values()]
    for end in ends:
        assert reached([end], int(store.values[end])) == []
        assert reached([end - 1], int(store.values[end - 1])) == [end]
        assert reached([end - 1, -1], int(store.values[end - 1]) + 1) == []
    store.forget(["d1"])
    forgotten = documents["d1"].start
    assert reached([forgotten], int(store.values[forgotten])) == []
    first = documents["d2"].start
    assert reached([first], int(store.values[first])) == [first + 1]


def test_pointers_from_before_a_change_are_gone(llama_lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "s"
    build(path, llama_lm, distinct_documents(4), window=48, context=16)
    store = Datastore(path)
    (retriever,) = KNNLM(llama_lm, store, **GIVEN).retrievers
    pointers = Pointers(retriever)

    def start() -> int:
        found = retriever.search(llama_lm.keys(torch.tensor([[llama_lm.start_token]]))[0])
        pointers.start(found.rows[0])
        return int(store.values[found.rows[0, 0]])

    def commit(change: str) -> None:
        if change == "append":
            build(path, llama_lm, [Document("new", PROSE[:90])], window=48, context=16)
        elif change == "forget":
            Datastore(path).forget(["d0"])
        else:
            compact(Datastore(path))

    for change in ("append", "forget", "compact"):
        token = start()
        commit(change)  # unseen: the snapshot is what pointers are of
        pointers.follow(token)
        assert len(pointers) > 0
        token = start()
        assert store.refresh()
        pointers.follow(token)
        assert len(pointers) == 0
        token = start()  # and the new state can be walked
        pointers.follow(token)
        assert bool(store.alive[pointers.reach(torch.zeros(llama_lm.dimension)).rows[0, 0]])


@pytest.fixture(scope="module")
def tuned_path(llama_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("skip") / "store"
    store = build(path, llama_lm, distinct_documents(3), window=48, context=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knnlm.tuning.fitting, "LEAST_TOKENS", 64)
        tune(KNNLM(llama_lm, store), HELD_OUT, max_k=50).save(store)
    return path


@pytest.mark.parametrize("weights", ["fixed", None])
def test_skipping_leaves_the_language_model_alone(
    llama_lm: LanguageModel, tuned_path: Path, weights: str | None
) -> None:
    def report(skip: float) -> Any:
        return KNNLM(llama_lm, tuned_path, weights=weights, skip=skip).perplexity(HELD_OUT)

    plain, none, half, most = report(0.0), report(1e-9), report(0.5), report(1.0)
    assert plain.searches is None
    assert none.knn.nats_per_token == pytest.approx(plain.knn.nats_per_token, abs=0.05)
    assert half.searches.saved == pytest.approx(0.5, abs=0.1)
    assert most.searches.made <= 1
    assert most.knn.nats_per_token == pytest.approx(plain.lm.nats_per_token, abs=0.05)
    both = KNNLM(llama_lm, tuned_path, weights=weights, skip=0.5, pointers=1).perplexity(HELD_OUT)
    assert both.searches is not None
    assert both.searches.saved > half.searches.saved


def test_what_cannot_be_saved_is_refused(
    llama_lm: LanguageModel, store_path: Path, tuned_path: Path
) -> None:
    with refusal(InvalidArgumentError, "skip must have been tuned", "run knnlm tune"):
        KNNLM(llama_lm, store_path, skip=0.5)
    with refusal(InvalidArgumentError, "skip must lie in [0, 1]", "got 1.5"):
        KNNLM(llama_lm, tuned_path, skip=1.5)
    with refusal(InvalidArgumentError, "pointers must be", "got 0"):
        KNNLM(llama_lm, store_path, pointers=0)
    assert choose_saving([Datastore(tuned_path)]) is None
    model = KNNLM(llama_lm, store_path, **GIVEN, pointers=2)
    with refusal(UnsupportedModelError, "pointers must follow", "search always"):
        model.generate("A memory", max_new_tokens=3, use_cache=False)
