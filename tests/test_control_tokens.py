"""Control tokens in texts, and the model's generation config: the same at every entrance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, refusal, tiny_llama
from serving import serving
from transformers import LlamaForCausalLM

from knnlm.attachment.attachment import attach
from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreMismatchError
from knnlm.evaluation.explain import explain
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document
from knnlm.text.windows import choose_windowing

CONTROL = "<|end|>"
TEXT = f"The price was <s>nine</s> seven{CONTROL} coins.\n"


def language_model() -> LanguageModel:
    """Return a tiny model with one more control token; its vocabulary has room for it."""
    tokenizer = byte_tokenizer(vocab_size=380)
    tokenizer.add_special_tokens({"extra_special_tokens": [CONTROL]})
    return LanguageModel(tiny_llama(), tokenizer, name="tiny")


def controls_in(lm: LanguageModel, tokens: Any) -> int:
    return sum(int(token) in lm.tokenizer.all_special_ids for token in tokens)


def test_a_documents_control_tokens_are_text(tmp_path: Path) -> None:
    lm = language_model()
    store = build(tmp_path / "s", lm, [Document("page.html", TEXT * 20)])
    assert controls_in(lm, store.values) == 0
    assert lm.decode(store.values) == TEXT * 20
    model = KNNLM(lm, store, k=1, lmbda=1.0)
    written = model.generate("The price was", max_new_tokens=40).text
    assert len(written) > 30
    assert (TEXT * 2).startswith("The price was" + written)


@pytest.mark.parametrize("control_tokens", [False, True])
def test_every_entrance_reads_text_as_the_datastore_does(
    tmp_path: Path, control_tokens: bool
) -> None:
    lm = language_model()
    build(tmp_path / "s", lm, [Document("a", TEXT * 3)], control_tokens=control_tokens)
    build(tmp_path / "s", lm, [Document("b", TEXT * 2)])
    store = Datastore(tmp_path / "s")
    expected = lm.encode([TEXT], control_tokens=control_tokens)[0].tolist()
    assert controls_in(lm, expected) == 3 * control_tokens
    assert store.values.tolist() == expected * 5
    assert store.settings.control_tokens == store.windowing.control_tokens == control_tokens
    model = KNNLM(lm, store, k=2, lmbda=0.5)
    assert model.encode(TEXT) == expected
    assert model.perplexity([Document("c", TEXT)]).tokens == len(expected)
    windowing = choose_windowing(256, "tiny", window=16, default=model.windowing)
    assert model.perplexity([Document("c", TEXT)], windowing=windowing).tokens == len(expected)
    assert [one.token for one in explain(model, TEXT)] == expected
    with serving(lambda: KNNLM(language_model(), Datastore(store.path), k=2)) as served:
        answer = served.complete(TEXT, max_tokens=1, echo=True, logprobs=0, temperature=0)
        assert answer.usage.prompt_tokens == len(expected)
        assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text
        with served.http() as client:
            found = client.post("/v1/explain", json={"text": TEXT}).json()["tokens"]
            analysis = client.post("/explorer/analysis", json={"text": TEXT}).json()
        assert [one["token"] for one in found] == expected
        assert "".join(analysis["pieces"]) == TEXT
        assert len(analysis["pieces"]) == len(expected)
    with refusal(DatastoreMismatchError, f"built with control_tokens {control_tokens}"):
        build(store.path, lm, [Document("d", TEXT)], control_tokens=not control_tokens)


OWN_SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2.0},
    {"bad_words_ids": [[token] for token in range(2, 300)]},
    {"suppress_tokens": list(range(2, 300)), "begin_suppress_tokens": [300, 301]},
    {"sequence_bias": [[[350], 50.0]]},
    {"forced_eos_token_id": 1, "forced_bos_token_id": 5},
    {"exponential_decay_length_penalty": (1, 50.0)},
    {"min_new_tokens": 12, "min_length": 30},
    {"num_beams": 3, "length_penalty": 0.1},
    {"do_sample": True, "temperature": 1.7, "top_k": 3, "top_p": 0.5, "min_p": 0.2},
    {"guidance_scale": 3.0},
    {"max_length": 3, "stop_strings": ["e"], "num_return_sequences": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> KNNLM:
    lm = language_model()
    store = build(tmp_path_factory.mktemp("greedy") / "s", lm, [Document("a", "yes yes no " * 30)])
    return KNNLM(lm, store, k=8, lmbda=0.999, temperature=10.0)


def likeliest(model: KNNLM, prompt: str, count: int) -> list[int]:
    ids = [model.lm.start_token, *model.encode(prompt)]
    found: list[int] = []
    while len(found) < count and not set(found) & model.lm.end_tokens:
        found.append(int(model.log_probs(torch.tensor([ids + found]))[0, -1].argmax()))
    return found


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: "+".join(own))
def test_the_likeliest_tokens_are_that_whatever_the_models_config_says(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    config = model.lm.model.generation_config
    for name, value in own.items():
        monkeypatch.setattr(config, name, value)
    assert model.generate("yes yes", max_new_tokens=12).tokens == likeliest(model, "yes yes", 12)
    assert model.lm.model.generation_config is config
    assert all(getattr(config, name) == value for name, value in own.items())


def test_options_that_are_given_count(model: KNNLM) -> None:
    assert isinstance(model.lm.model, LlamaForCausalLM)
    options: dict[str, Any] = {"no_repeat_ngram_size": 1, "max_new_tokens": 12}
    ids = torch.tensor([[model.lm.start_token, *model.encode("yes yes")]])
    store = model.retrievers[0].store
    with attach(model.lm.model, store, k=8, lmbda=0.999, temperature=10.0):
        output = model.lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
        )
    wanted = output[0, ids.shape[1] :].tolist()
    assert model.generate("yes yes", **options).tokens == wanted
    assert wanted != likeliest(model, "yes yes", 12)


def test_an_error_gives_the_models_config_back(model: KNNLM) -> None:
    config = model.lm.model.generation_config
    with pytest.raises(ValueError, match="unheard_of"):
        model.generate("yes", max_new_tokens=2, unheard_of=1)
    assert model.lm.model.generation_config is config


@pytest.mark.parametrize("as_option", [False, True])
def test_any_end_token_ends_every_text(
    model: KNNLM, monkeypatch: pytest.MonkeyPatch, as_option: bool
) -> None:
    free = model.generate("yes", max_new_tokens=12).tokens
    end = free[2]
    options: dict[str, Any] = {}
    if as_option:
        options = {"eos_token_id": [end, 1]}
    else:
        monkeypatch.setattr(model.lm.model.generation_config, "eos_token_id", [377, end])
    stopped = model.generate("yes", max_new_tokens=12, **options)
    assert stopped.tokens == free[: free.index(end) + 1]
    assert stopped.text == model.lm.decode(stopped.tokens[:-1], before=model.encode("yes"))
