"""The mixture of a model and a datastore, against slow arithmetic in float64 and against the LM."""

from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_gpt2, tiny_llama
from families import FAMILIES
from jaxtyping import Float
from stores import distinct_documents, slow_knn_probs, stored_keys
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from knnlm.attachment.attachment import attach
from knnlm.datastore.append import append_documents
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreMismatchError, DatastoreNotFoundError, InvalidArgumentError
from knnlm.evaluation.scoring import ScoreRequest, mixed_log_probs, score_windows
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.knn_lm import KNNLM
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import cut_documents
from knnlm.retrieval.mixer import open_mixer, override_mixer
from knnlm.retrieval.retriever import Retriever, choose_parameters
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing

K = 12
SIZES: dict[str, Any] = {"window": 48, "context": 16}


@pytest.fixture(scope="session")
def store_path(tiny_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("knn_lm") / "store"
    append_documents(path, tiny_lm, distinct_documents(3), shard_rows=100, **SIZES)
    return path


@pytest.fixture
def store(store_path: Path) -> Datastore:
    return Datastore(store_path)


def own_store(path: Path, lm: LanguageModel, documents: int = 2) -> Datastore:
    return append_documents(path, lm, distinct_documents(documents), **SIZES)


def tokens_of(lm: LanguageModel, *texts: str) -> Tensor:
    """The texts as rows that begin with the start token, padded on the right."""
    rows = [[lm.start_token, *tokens.tolist()] for tokens in lm.encode(list(texts))]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def lm_log_probs_of(lm: LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(lm.model(tokens).logits.float(), dim=-1)


TEXT = "The datastore is a memory of the nearest places."


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_at_both_ends_of_lmbda(tmp_path: Path, family: str) -> None:
    lm = LanguageModel(FAMILIES[family](), byte_tokenizer(), name=family)
    store = own_store(tmp_path / "s", lm)
    tokens = tokens_of(lm, TEXT)
    plain = KNNLM(lm, store, k=K, lmbda=0.0).log_probs(tokens)
    assert torch.equal(plain, lm_log_probs_of(lm, tokens)), "the LM's own, to the bit"

    temperature = 5.0
    knn = KNNLM(lm, store, k=K, lmbda=1.0, temperature=temperature).log_probs(tokens)
    expected = slow_knn_probs(lm, store, tokens, K, temperature)
    assert not bool(knn.isnan().any())
    torch.testing.assert_close(knn.exp().double(), expected, atol=2e-4, rtol=2e-4)
    assert torch.equal(knn.isneginf(), expected == 0.0)


@pytest.mark.parametrize("lmbda", [0.0, 0.01, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 30.0])
def test_equals_the_slow_mixture(
    tiny_lm: LanguageModel, store: Datastore, lmbda: float, temperature: float
) -> None:
    tokens = tokens_of(tiny_lm, TEXT, "Another text, of another length altogether; and more of it.")
    model = KNNLM(tiny_lm, store, k=K, lmbda=lmbda, temperature=temperature)
    probs = model.log_probs(tokens).exp()
    assert probs.dtype == torch.float32
    ones = torch.ones(tokens.shape)
    torch.testing.assert_close(probs.sum(dim=-1), ones, atol=1e-5, rtol=0)
    slow = lmbda * slow_knn_probs(tiny_lm, store, tokens, K, temperature)
    slow += (1 - lmbda) * lm_log_probs_of(tiny_lm, tokens).double().exp()
    torch.testing.assert_close(probs.double(), slow, atol=1e-4, rtol=1e-3)


def test_a_text_does_not_depend_on_its_neighbors_in_the_batch(
    tiny_lm: LanguageModel, store: Datastore
) -> None:
    model = KNNLM(tiny_lm, store, k=K, lmbda=0.6, temperature=20.0)
    together = model.log_probs(tokens_of(tiny_lm, TEXT, TEXT[:9], PROSE))
    for row, text in enumerate((TEXT, TEXT[:9], PROSE)):
        alone = model.log_probs(tokens_of(tiny_lm, text))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("boundary", ["document", "stream"])
def test_sparse_scores_equal_the_dense_ones(
    tiny_lm: LanguageModel, store: Datastore, boundary: str
) -> None:
    model = KNNLM(tiny_lm, store, k=K, lmbda=0.4, temperature=10.0)
    documents = [Document("a", TEXT), Document("b", PROSE), Document("c", "x")]
    windows = list(cut_documents(tiny_lm, documents, Windowing(30, 10, boundary)))
    (scores,) = score_windows(tiny_lm, windows, ScoreRequest.for_mixer(model.mixer, "document"))
    sparse = torch.split(mixed_log_probs(scores, model.mixer), [window.new for window in windows])
    assert len(windows) > 5
    for window, of_window in zip(windows, sparse, strict=True):
        dense = model.log_probs(torch.from_numpy(window.inputs)[None])[0, window.context :]
        targets = torch.from_numpy(window.targets).long()
        expected = dense.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(of_window, expected, atol=1e-5, rtol=1e-5)


def test_fewer_entries_than_k(tmp_path: Path, llama_lm: LanguageModel) -> None:
    own_store(tmp_path / "s", llama_lm, documents=3)
    store = Datastore(tmp_path / "s")
    model = KNNLM(llama_lm, store, k=len(store), lmbda=0.5, temperature=10.0)
    first = store.documents()[0]
    store.forget(["d1", "d2"])
    assert model.retrievers[0].parameters.k > len(store) == first.stop - first.start
    tokens = tokens_of(llama_lm, TEXT)
    expected = 0.5 * slow_knn_probs(llama_lm, store, tokens, 10**6, 10.0)
    expected += 0.5 * lm_log_probs_of(llama_lm, tokens).double().exp()
    torch.testing.assert_close(
        model.log_probs(tokens).exp().double(), expected, atol=1e-5, rtol=1e-3
    )


def test_an_empty_datastore_leaves_the_lm_as_it_is(tmp_path: Path, llama_lm: LanguageModel) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    store.forget(["*"])
    model = KNNLM(llama_lm, store, lmbda=1.0)
    tokens = tokens_of(llama_lm, TEXT)
    assert torch.equal(model.log_probs(tokens), lm_log_probs_of(llama_lm, tokens))
    report = model.perplexity([Document("t", TEXT)])
    assert report.knn == report.lm
    assert model.generate(TEXT, max_new_tokens=3).tokens
    with refusal(InvalidArgumentError, "k must be at most the number of entries, 0, got 5"):
        KNNLM(llama_lm, store, k=5)
    compact(store)
    assert store.rows == 0
    assert torch.equal(model.log_probs(tokens), lm_log_probs_of(llama_lm, tokens))
    assert model.perplexity([Document("t", TEXT)]).knn == report.lm


class _NeverSearched:
    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        raise AssertionError("must not be searched")


def test_without_weight_nothing_is_searched(tiny_lm: LanguageModel, store: Datastore) -> None:
    tokens = tokens_of(tiny_lm, TEXT)
    model = KNNLM(tiny_lm, store, lmbda=0.0, index=_NeverSearched())
    assert torch.equal(model.log_probs(tokens), lm_log_probs_of(tiny_lm, tokens))
    assert model.generate(TEXT, max_new_tokens=2).tokens
    with pytest.raises(AssertionError, match="must not be searched"):
        KNNLM(tiny_lm, store, lmbda=0.01, index=_NeverSearched()).log_probs(tokens)


def test_absent_neighbors_vote_for_nothing(store: Datastore) -> None:
    rows = torch.tensor([[3, -1], [-1, -1]])
    distances = torch.tensor([[1.0, torch.inf], [torch.inf, torch.inf]])
    value = store.values[3].item()
    retriever = Retriever(store, ExactIndex(store), Parameters())
    # row −1 must not be read as row 0, nor as the last one
    for target in (value, store.values[0].item(), store.values[-1].item()):
        votes = retriever.tokens(Neighbors(distances, rows)) == target
        assert votes.tolist() == [[target == value, False], [False, False]]


def test_forgotten_documents_have_no_vote(tmp_path: Path, llama_lm: LanguageModel) -> None:
    secret = Document("secret", "The nearest zebra quivers.")
    store = append_documents(tmp_path / "s", llama_lm, [*distinct_documents(1), secret], **SIZES)
    model = KNNLM(llama_lm, store, k=1, lmbda=1.0)
    tokens = tokens_of(llama_lm, "The nearest zebra quivers.")
    followed = tokens[0, 2:]  # the start token has the same key in every document

    def remembered() -> int:
        return int((model.log_probs(tokens)[0, 1:-1].argmax(dim=1) == followed).sum())

    assert remembered() == len(followed), "it knows its own text by heart"
    store.forget(["secret"])
    assert remembered() < len(followed) / 2
    kept = stored_keys(store)[store.alive]
    assert len(kept) == len(store)
    expected = slow_knn_probs(llama_lm, store, tokens, 1, 1.0)
    torch.testing.assert_close(model.log_probs(tokens).exp().double(), expected, atol=1e-5, rtol=0)


def test_several_datastores_equal_the_slow_mixture(
    tiny_lm: LanguageModel, store: Datastore, tmp_path: Path
) -> None:
    other = append_documents(tmp_path / "other", tiny_lm, [Document("o", PROSE[100:])], **SIZES)
    tokens = tokens_of(tiny_lm, TEXT, PROSE[50:90])
    model = KNNLM(tiny_lm, [store, other], k=[K, 5], lmbda=[0.3, 0.5], temperature=[10.0, 30.0])
    expected = 0.2 * lm_log_probs_of(tiny_lm, tokens).double().exp()
    expected += 0.3 * slow_knn_probs(tiny_lm, store, tokens, K, 10.0)
    expected += 0.5 * slow_knn_probs(tiny_lm, other, tokens, 5, 30.0)
    torch.testing.assert_close(model.log_probs(tokens).exp().double(), expected, atol=1e-5, rtol=0)

    windows = list(cut_documents(tiny_lm, [Document("a", TEXT)], Windowing(30, 10)))
    (scores,) = score_windows(tiny_lm, windows, ScoreRequest.for_mixer(model.mixer, "document"))
    row = tokens_of(tiny_lm, TEXT)
    dense = model.log_probs(row[:, : windows[0].positions])[0]
    new = torch.from_numpy(windows[0].targets).long()
    torch.testing.assert_close(
        mixed_log_probs(scores, model.mixer)[: len(new)],
        dense.gather(1, new[:, None])[:, 0],
        atol=1e-4,
        rtol=1e-4,
    )


def test_several_datastores_one_of_them_without_weight_or_entries(
    llama_lm: LanguageModel, tmp_path: Path
) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    other = own_store(tmp_path / "o", llama_lm, documents=1)
    tokens = tokens_of(llama_lm, TEXT)
    alone = KNNLM(llama_lm, store, k=K, lmbda=0.4).log_probs(tokens)
    both = KNNLM(llama_lm, [store, other], k=K, lmbda=[0.4, 0.0])
    assert torch.equal(both.log_probs(tokens), alone)
    other.forget(["*"])
    both = KNNLM(llama_lm, [store, other], k=[K, None], lmbda=[0.4, 0.6])
    assert torch.equal(both.log_probs(tokens), alone), "an empty datastore leaves its λ to the LM"


def test_refusals_of_several_datastores(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    other = own_store(tmp_path / "o", llama_lm)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"lmbda": 0.6}, "(λ) of several datastores must add up to at most 1, got 0.6 + 0.6 = 1.2"),
        ({"lmbda": [0.5, 0.6]}, "must add up to at most 1, got 0.5 + 0.6 = 1.1: give each a smal"),
        ({"k": [1, 2, 3]}, "k must be one value, or one for each of the 2 datastores, got 3"),
        ({"temperature": []}, "temperature must be one value, or one for each of the 2 datasto"),
    ]
    for given, message in refusals:
        with refusal(InvalidArgumentError, message):
            KNNLM(llama_lm, [store, other], **given)
    with refusal(InvalidArgumentError, "store must be a datastore or several, got none"):
        KNNLM(llama_lm, [])


# parameters and refusals


def test_parameters_come_from_the_caller_the_tuning_or_the_paper(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    assert KNNLM(llama_lm, store).retrievers[0].parameters == Parameters(len(store), 0.25, 1.0)
    store.save_parameters(Parameters(9, 0.7, 40.0), {})
    assert KNNLM(llama_lm, store).retrievers[0].parameters == Parameters(9, 0.7, 40.0)
    (retriever,) = KNNLM(llama_lm, store, k=3, lmbda=0.0).retrievers
    assert retriever.parameters == Parameters(3, 0.0, 40.0)
    store.forget(["d1"])
    store.save_parameters(Parameters(10**6, 0.7, 40.0), {})
    assert KNNLM(llama_lm, store).retrievers[0].parameters.k == len(store)


def test_bad_parameters_are_refused(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    n = len(store)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "k must be at least 1, got 0: ask for a neighbor"),
        (
            {"k": n + 1},
            f"k must be at most the number of entries, {n}, got {n + 1}: ask for fewer",
        ),
        ({"lmbda": -0.1}, "lmbda (λ) must lie in [0, 1], got -0.1: 0 is the language model alone"),
        ({"lmbda": 1.1}, "lmbda (λ) must lie in [0, 1], got 1.1"),
        ({"lmbda": float("nan")}, "lmbda (λ) must lie in [0, 1], got nan"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
    ]
    for given, message in refusals:
        with refusal(InvalidArgumentError, message):
            KNNLM(llama_lm, store, **given)


def test_another_model_is_refused(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    other = LanguageModel(tiny_llama(seed=1), byte_tokenizer(), name="other")
    with refusal(DatastoreMismatchError, "was built with tiny (weights ", "not with other (weigh"):
        KNNLM(other, store)
    gpt2 = LanguageModel(tiny_gpt2(), byte_tokenizer(300), name="gpt2")
    with refusal(DatastoreMismatchError, "was built with tiny (tokenizer ", "not with gpt2"):
        KNNLM(gpt2, store)
    wide = tiny_llama()
    wide.resize_token_embeddings(512)
    wider = LanguageModel(wide, byte_tokenizer(), name="wider")
    with refusal(DatastoreMismatchError, "(vocabulary size 384), not with wider", "size 512)"):
        KNNLM(wider, store)


# generation

PROMPTS = ["The nearest", "A datastore is", ""]


def manual_greedy(model: KNNLM, prompt: str, max_new_tokens: int) -> list[int]:
    tokens = tokens_of(model.lm, prompt)
    length = tokens.shape[1]
    for _ in range(max_new_tokens):
        new = model.log_probs(tokens)[0, -1].argmax()
        tokens = torch.cat([tokens, new.reshape(1, 1)], dim=1)
        if int(new) == model.lm.tokenizer.eos_token_id:
            break
    return [int(token) for token in tokens[0, length:]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_reading_everything_again_for_every_token(
    tiny_lm: LanguageModel, store: Datastore, prompt: str
) -> None:
    model = KNNLM(tiny_lm, store, k=K, lmbda=0.6, temperature=10.0)
    generation = model.generate(prompt, max_new_tokens=20)
    assert generation.tokens == manual_greedy(model, prompt, 20)
    assert generation.prompt == prompt
    assert generation.text == tiny_lm.decode(generation.tokens)
    alone = KNNLM(tiny_lm, store, lmbda=0.0).generate(prompt, max_new_tokens=20)
    assert generation.tokens != alone.tokens, "the datastore must matter here"


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_without_weight_it_is_the_models_own_generate(
    tiny_lm: LanguageModel, store: Datastore, options: dict[str, Any]
) -> None:
    tokens = tokens_of(tiny_lm, TEXT)
    torch.manual_seed(5)
    own = tiny_lm.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        pad_token_id=0,
        **options,
    )
    model = KNNLM(tiny_lm, store, lmbda=0.0)
    generation = model.generate(TEXT, max_new_tokens=16, seed=5, **options)
    assert generation.tokens == own[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("lmbda", [0.5, 0.0])
def test_sampling_repeats_with_a_seed_only(
    llama_lm: LanguageModel, tmp_path: Path, lmbda: float
) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    model = KNNLM(llama_lm, store, k=K, lmbda=lmbda, temperature=50.0)

    def sample(seed: int | None) -> list[int]:
        return model.generate(TEXT, max_new_tokens=12, seed=seed, do_sample=True).tokens

    state = torch.get_rng_state()
    first = sample(3)
    assert torch.equal(torch.get_rng_state(), state), "torch's own random numbers go on as before"
    torch.rand(17)
    assert sample(3) == first
    assert sample(4) != first
    assert sample(None) != sample(None), "without a seed, every sample is another"


def test_sampling_follows_the_mixture(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    model = KNNLM(llama_lm, store, k=K, lmbda=1.0, temperature=10.0)
    probs = model.log_probs(tokens_of(llama_lm, TEXT))[0, -1].exp()
    drawn = [
        model.generate(TEXT, max_new_tokens=1, seed=seed, do_sample=True, top_k=0).tokens[0]
        for seed in range(200)
    ]
    assert set(drawn) <= set(torch.nonzero(probs)[:, 0].tolist())
    shares = torch.bincount(torch.tensor(drawn), minlength=len(probs)) / len(drawn)
    assert float((shares - probs).abs().max()) < 0.12  # three standard deviations


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=str
)
def test_other_ways_of_generating_run_on_the_mixture(
    tiny_lm: LanguageModel, store: Datastore, options: dict[str, Any]
) -> None:
    model = KNNLM(tiny_lm, store, k=K, lmbda=0.6, temperature=10.0)
    generation = model.generate(PROSE[:60], max_new_tokens=12, **options)
    greedy = manual_greedy(model, PROSE[:60], 12)
    if "num_beams" not in options:
        assert generation.tokens == greedy
        return

    def log_prob(tokens: list[int]) -> float:
        prompt = tokens_of(tiny_lm, PROSE[:60])
        everything = torch.cat([prompt, torch.tensor([tokens])], dim=1)
        log_probs = model.log_probs(everything)[0, prompt.shape[1] - 1 : -1]
        return float(log_probs.gather(1, torch.tensor(tokens)[:, None]).sum())

    assert len(generation.tokens) == 12
    assert log_prob(generation.tokens) >= log_prob(greedy) - 1e-4


def test_options_act_on_the_mixture_not_on_the_lm(tiny_lm: LanguageModel, store: Datastore) -> None:
    model = KNNLM(tiny_lm, store, k=K, lmbda=1.0, temperature=10.0)
    first = model.generate(PROMPTS[0], max_new_tokens=8).tokens
    other = model.generate(PROMPTS[0], max_new_tokens=8, suppress_tokens=first).tokens
    assert not set(first) & set(other)


def test_a_model_in_training_generates_without_dropout(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    lm = LanguageModel(GPT2LMHeadModel(config).eval(), byte_tokenizer(), name="tiny")
    model = KNNLM(lm, own_store(tmp_path / "s", lm), k=K)
    expected = model.generate("The", max_new_tokens=10).tokens
    lm.model.train()
    assert model.generate("The", max_new_tokens=10).tokens == expected
    assert lm.model.training, "left as it was"


def test_generation_leaves_the_model_as_it_was(tiny_lm: LanguageModel, store: Datastore) -> None:
    tokens = tokens_of(tiny_lm, TEXT)
    before = lm_log_probs_of(tiny_lm, tokens)
    model = KNNLM(tiny_lm, store, k=K, lmbda=1.0)
    model.generate(TEXT, max_new_tokens=2)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(TEXT, nonsense=True)
    assert torch.equal(lm_log_probs_of(tiny_lm, tokens), before)
    assert not tiny_lm.model._forward_hooks


def test_the_end_of_text_ends_it(llama_lm: LanguageModel, tmp_path: Path) -> None:
    end = llama_lm.tokenizer.eos_token
    document = Document("d", f"The nearest zebra.{end}")
    store = append_documents(tmp_path / "s", llama_lm, [document], control_tokens=True, **SIZES)
    model = KNNLM(llama_lm, store, k=1, lmbda=1.0)
    generation = model.generate("The nearest zeb", max_new_tokens=50)
    assert generation.text == "ra."
    assert generation.tokens[-1] == llama_lm.tokenizer.eos_token_id


def test_a_prompt_that_does_not_fit_is_refused(llama_lm: LanguageModel, tmp_path: Path) -> None:
    model = KNNLM(llama_lm, own_store(tmp_path / "s", llama_lm), k=1)
    long = "x" * 250
    length = tokens_of(llama_lm, long).shape[1]
    assert len(model.generate(long, max_new_tokens=256 - length).tokens) == 256 - length
    with refusal(
        InvalidArgumentError,
        f"prompt ({length} tokens) and max_new_tokens ({257 - length}) must fit the model's 256 "
        "positions; shorten one of them",
    ):
        model.generate(long, max_new_tokens=257 - length)
    with refusal(InvalidArgumentError, "max_new_tokens must be at least 1, got 0"):
        model.generate("x", max_new_tokens=0)


def test_any_end_token_of_the_model_ends_it_and_is_left_out(
    llama_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KNNLM(llama_lm, own_store(tmp_path / "s", llama_lm), k=K, lmbda=0.6)
    free = model.generate(TEXT, max_new_tokens=8)
    end = free.tokens[3]
    monkeypatch.setattr(llama_lm.model.generation_config, "eos_token_id", [end, 1])
    ended = model.generate(TEXT, max_new_tokens=8)
    assert ended.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert ended.text == llama_lm.decode(ended.tokens[:-1])


# names in place of objects


def test_datastores_and_models_may_be_named_by_their_folders(
    llama_lm: LanguageModel, tmp_path: Path
) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    llama_lm.save(tmp_path / "model")
    tokens = tokens_of(llama_lm, TEXT)
    expected = KNNLM(llama_lm, [store, store], k=K, lmbda=[0.3, 0.2]).log_probs(tokens)
    named = KNNLM(tmp_path / "model", [str(tmp_path / "s"), store], k=K, lmbda=[0.3, 0.2])
    torch.testing.assert_close(named.log_probs(tokens), expected, atol=1e-5, rtol=1e-5)
    assert named.lm.key == store.settings.key
    assert choose_parameters(tmp_path / "s", k=3) == choose_parameters(store, k=3)
    with refusal(DatastoreNotFoundError, "nowhere"):
        KNNLM(llama_lm, tmp_path / "nowhere")


def test_wrong_types_are_refused_in_one_line(
    llama_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = own_store(tmp_path / "s", llama_lm)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose errors come first
    wrong: Any
    for wrong in (3, None, [store, 3]):
        with refusal(InvalidArgumentError, "store must be a datastore, its folder's path, or a se"):
            KNNLM(llama_lm, wrong)
    for wrong, kind in ((llama_lm.model, "LlamaForCausalLM"), (None, "NoneType")):
        with refusal(InvalidArgumentError, "lm must be a LanguageModel, or", f"got {kind}: wrap"):
            KNNLM(wrong, store)
    for wrong in (llama_lm, "model"):
        with refusal(InvalidArgumentError, "model must be a transformers PreTrainedModel, got "):
            attach(wrong, store)


def test_unknown_options_are_refused(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = own_store(tmp_path / "s", llama_lm)
    given: dict[str, Any] = {"lambda_": 0.3}
    mixer = KNNLM(llama_lm, store).mixer
    for call in (
        lambda: KNNLM(llama_lm, store, **given),
        lambda: attach(llama_lm.model, store, **given),
        lambda: open_mixer(llama_lm, store, **given),
        lambda: choose_parameters(store, **given),
        lambda: override_mixer(mixer, **given),
    ):
        with pytest.raises(TypeError, match="lambda_"):
            call()
