"""What models depend on is found, and they are read so that it does not matter."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_gpt2, tiny_llama
from families import FAMILIES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import knnlm
from knnlm.errors import UnsupportedModelError
from knnlm.model.decoding import Decoder
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import read_keys, read_scores
from knnlm.text.windows import Window

LIMIT = 24


def long_rope(kind: str, limit: int = LIMIT) -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 7.0, 10.0],
        "original_max_position_embeddings": limit,
        "factor": 256 / limit,
    }
    config = AutoConfig.for_model(
        kind,
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=limit,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        rope_parameters=rope,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def changed(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """Return a model with something added to the first layer's output."""
    layers = model.model.layers
    layers[0].register_forward_hook(lambda _, __, output: change(output))
    return model


def noise(states: Tensor) -> Tensor:
    return states + torch.randn_like(states)


def whole_batch(states: Tensor) -> Tensor:
    return states * (1 + 0.1 * len(states))


def piece_length(states: Tensor) -> Tensor:
    return states + (1.0 if states.shape[1] < 3 else 0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "bloom", "falcon"])
def test_attention_may_be_read_in_any_way(family: str) -> None:
    lm = LanguageModel(FAMILIES[family](), byte_tokenizer())
    rules = lm.cache_rules
    assert lm.batch_rules.batches
    assert (rules.cache, rules.pieces, rules.shared) == ("past_key_values", True, True)
    assert lm.batch_rules.frequency_limit is None


def test_a_recurrent_state_cannot_be_padded() -> None:
    rules = LanguageModel(FAMILIES["mamba"](), byte_tokenizer()).cache_rules
    assert (rules.cache, rules.shared) == ("cache_params", False)


def test_rules_are_found_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    rules = LanguageModel(model, byte_tokenizer()).cache_rules
    monkeypatch.setattr("knnlm.model.keyed_model.find_cache_rules", None)
    assert LanguageModel(model, byte_tokenizer()).cache_rules is rules


def test_a_model_that_sees_its_batch_is_read_text_by_text() -> None:
    lm = LanguageModel(changed(tiny_llama(), whole_batch), byte_tokenizer())
    assert not lm.batch_rules.batches
    tokens = torch.randint(2, 384, (3, 9))
    alone = [lm.keys_and_logits(row[None]) for row in tokens]
    together = lm.keys_and_logits(tokens)
    assert torch.equal(together.keys, torch.cat([one.keys for one in alone]))
    assert torch.equal(together.logits, torch.cat([one.logits for one in alone]))
    assert torch.equal(lm.keys(tokens), together.keys)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    with refusal(UnsupportedModelError, "model 'odd' must give a text the same keys", "random"):
        LanguageModel(changed(tiny_llama(), noise), byte_tokenizer(), name="odd")


def test_a_cache_that_changes_the_answer_is_not_used(tmp_path: Path) -> None:
    lm = LanguageModel(changed(tiny_llama(), piece_length), byte_tokenizer())
    assert lm.cache_rules.is_unreliable
    store = knnlm.build(tmp_path / "s", lm, [knnlm.Document("a", PROSE)])
    model = knnlm.KNNLM(lm, store, k=4, lmbda=0.5)
    assert model.generate("The nearest", max_new_tokens=8).tokens == reread(model, "The nearest", 8)
    tokens = torch.tensor([[5, 6, 7]])
    with (
        knnlm.attach(lm.model, store, k=4, lmbda=0.5),
        refusal(UnsupportedModelError, "as a whole", "use_cache=False"),
    ):
        lm.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)


def reread(model: knnlm.KNNLM, prompt: str, new: int) -> list[int]:
    tokens = [model.lm.start_token, *model.lm.encode([prompt])[0].tolist()]
    length = len(tokens)
    while len(tokens) < length + new and not {tokens[-1]} & model.lm.end_tokens:
        tokens.append(int(model.log_probs(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[length:]


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_a_long_texts_frequencies_leave_short_ones_alone(kind: str) -> None:
    lm = LanguageModel(long_rope(kind), byte_tokenizer())
    assert lm.batch_rules.frequency_limit == LIMIT
    rng = random.Random(kind)
    for _ in range(10):
        lengths = [rng.randint(1, 2 * LIMIT) for _ in range(rng.randint(1, 9))]
        rows = [torch.tensor([rng.randrange(2, 384) for _ in range(n + 1)]) for n in lengths]
        windows = [Window(row.int().numpy(), 0, ()) for row in rows]
        for number, keys in read_keys(lm, windows):
            torch.testing.assert_close(keys, lm.keys(rows[number][None, :-1])[0])
        for scores in read_scores(lm, windows):
            row = rows[scores.number]
            with torch.no_grad():
                logits = lm.model(input_ids=row[None, :-1]).logits[0]
            own = torch.log_softmax(logits, dim=-1).gather(1, row[1:, None])[:, 0]
            torch.testing.assert_close(scores.log_probs, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_server_reads_like_one_pass_on_both_sides_of_the_limit(kind: str) -> None:
    lm = LanguageModel(long_rope(kind), byte_tokenizer())
    rng = random.Random(kind)
    with lm.capture() as captured:
        decoder = Decoder(lm, captured)
        for length in [1, LIMIT - 2, LIMIT - 1, LIMIT, LIMIT + 1, rng.randint(1, 2 * LIMIT)]:
            tokens = [rng.randrange(2, 384) for _ in range(length + 4)]
            step, cached = decoder.read(torch.tensor(tokens[:length]), None, length)
            for stop in range(length, len(tokens)):
                with torch.no_grad():
                    whole = lm.model(input_ids=torch.tensor([tokens[:stop]])).logits[0]
                expected = torch.log_softmax(whole, dim=-1)[-len(step.log_probs) :]
                torch.testing.assert_close(step.log_probs, expected, atol=1e-4, rtol=1e-4)
                step, cached = decoder.advance([[tokens[stop]]], cached)
        assert decoder.shares_batches(LIMIT)
        assert not decoder.shares_batches(LIMIT + 1)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_generating_past_the_limit_is_rereading(kind: str, tmp_path: Path) -> None:
    lm = LanguageModel(long_rope(kind), byte_tokenizer())
    store = knnlm.build(tmp_path / "s", lm, [knnlm.Document("a", PROSE)], window=64)
    model = knnlm.KNNLM(lm, store, k=4, lmbda=0.5)
    for prompt in ("The", PROSE[:60], PROSE[:90], PROSE[:200]):
        assert model.generate(prompt, max_new_tokens=8).tokens == reread(model, prompt, 8)


def test_an_attached_model_does_not_grow_past_the_limit_with_a_stale_cache(tmp_path: Path) -> None:
    lm = LanguageModel(long_rope("llama"), byte_tokenizer())
    store = knnlm.build(tmp_path / "s", lm, [knnlm.Document("a", PROSE)], window=64)
    tokens = torch.tensor([[0, *lm.encode([PROSE])[0].tolist()][: LIMIT - 2]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    with knnlm.attach(lm.model, store, k=4, lmbda=0.5):
        with refusal(UnsupportedModelError, f"a text of {LIMIT + 1} positions", "use_cache=False"):
            lm.model.generate(tokens, attention_mask=mask, **options)
        lm.model.generate(tokens, attention_mask=mask, use_cache=False, **options)


def test_a_gpt2s_short_windows_are_probed_too() -> None:
    for positions in (2, 3, 4):
        config = tiny_gpt2().config
        config.n_positions = positions
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        lm = LanguageModel(model, byte_tokenizer())
        assert lm.batch_rules.batches
        assert lm.cache_rules.cache == "past_key_values"
