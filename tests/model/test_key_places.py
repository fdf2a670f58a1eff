"""Keys against captures at literal module paths, on every family."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from families import FAMILIES, VOCAB_SIZE
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knnlm.choices import Key
from knnlm.errors import InvalidArgumentError, UnsupportedModelError
from knnlm.model.language_model import LanguageModel


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a two-layer model are; None where there is no such module."""

    layer: str
    ffn: str | None
    ffn_norm: str | None
    attention: str
    attention_norm: str | None
    final_norm: str
    head: str | None = "lm_head"  # None where the logits are scaled or capped after the head


LLAMA = Anatomy(
    layer="model.layers.1",
    ffn="model.layers.1.mlp",
    ffn_norm="model.layers.1.post_attention_layernorm",
    attention="model.layers.1.self_attn",
    attention_norm="model.layers.1.input_layernorm",
    final_norm="model.norm",
)
GEMMA = replace(LLAMA, ffn_norm="model.layers.1.pre_feedforward_layernorm", head=None)
BLOOM = Anatomy(
    layer="transformer.h.1",
    ffn="transformer.h.1.mlp",
    ffn_norm="transformer.h.1.post_attention_layernorm",
    attention="transformer.h.1.self_attention",
    attention_norm="transformer.h.1.input_layernorm",
    final_norm="transformer.ln_f",
)
ANATOMIES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "mixtral": LLAMA,
    "stablelm": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "bloom": BLOOM,
    "gpt2": Anatomy(
        layer="transformer.h.1",
        ffn="transformer.h.1.mlp",
        ffn_norm="transformer.h.1.ln_2",
        attention="transformer.h.1.attn",
        attention_norm="transformer.h.1.ln_1",
        final_norm="transformer.ln_f",
    ),
    "gptj": Anatomy(
        layer="transformer.h.1",
        ffn="transformer.h.1.mlp",
        ffn_norm="transformer.h.1.ln_1",
        attention="transformer.h.1.attn",
        attention_norm="transformer.h.1.ln_1",
        final_norm="transformer.ln_f",
    ),
    "gpt_neox": Anatomy(
        layer="gpt_neox.layers.1",
        ffn="gpt_neox.layers.1.mlp",
        ffn_norm="gpt_neox.layers.1.post_attention_layernorm",
        attention="gpt_neox.layers.1.attention",
        attention_norm="gpt_neox.layers.1.input_layernorm",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "opt": Anatomy(
        layer="model.decoder.layers.1",
        ffn="model.decoder.layers.1.fc1",
        ffn_norm="model.decoder.layers.1.final_layer_norm",
        attention="model.decoder.layers.1.self_attn",
        attention_norm="model.decoder.layers.1.self_attn_layer_norm",
        final_norm="model.decoder.final_layer_norm",
    ),
    "opt_post_norm": Anatomy(
        layer="model.decoder.layers.1",
        ffn="model.decoder.layers.1.fc1",
        ffn_norm="model.decoder.layers.1.self_attn_layer_norm",
        attention="model.decoder.layers.1.self_attn",
        attention_norm=None,
        final_norm="model.decoder.project_out",
    ),
    "falcon": Anatomy(
        layer="transformer.h.1",
        ffn="transformer.h.1.mlp",
        ffn_norm="transformer.h.1.input_layernorm",
        attention="transformer.h.1.self_attention",
        attention_norm="transformer.h.1.input_layernorm",
        final_norm="transformer.ln_f",
    ),
    "falcon_two_norms": Anatomy(
        layer="transformer.h.1",
        ffn="transformer.h.1.mlp",
        ffn_norm="transformer.h.1.ln_mlp",
        attention="transformer.h.1.self_attention",
        attention_norm="transformer.h.1.ln_attn",
        final_norm="transformer.ln_f",
    ),
    "mamba": Anatomy(
        layer="backbone.layers.1",
        ffn=None,
        ffn_norm=None,
        attention="backbone.layers.1.mixer",
        attention_norm="backbone.layers.1.norm",
        final_norm="backbone.norm_f",
    ),
    "olmo2": replace(LLAMA, ffn_norm=None, attention_norm=None),
    "phi": Anatomy(
        layer="model.layers.1",
        ffn="model.layers.1.mlp",
        ffn_norm="model.layers.1.input_layernorm",
        attention="model.layers.1.self_attn",
        attention_norm="model.layers.1.input_layernorm",
        final_norm="model.final_layernorm",
    ),
    "cohere": replace(LLAMA, ffn_norm="model.layers.1.input_layernorm", head=None),
}

TOKENS = torch.randint(2, VOCAB_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Anatomy]:
    return FAMILIES[request.param](), ANATOMIES[request.param]


@contextmanager
def recorded_input(module: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    yield inputs
    handle.remove()


def input_of(model: PreTrainedModel, path: str) -> Tensor:
    with recorded_input(model.get_submodule(path)) as inputs, torch.inference_mode():
        model(input_ids=TOKENS)
    (only,) = inputs
    return only.reshape(*TOKENS.shape, -1)


def apply(model: PreTrainedModel, path: str, hidden_states: Tensor) -> Tensor:
    with torch.inference_mode():
        output = model.get_submodule(path)(hidden_states)
    assert isinstance(output, Tensor)
    return output


def keys_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, key: str) -> Tensor:
    return LanguageModel(model, tokenizer, key=key).keys(TOKENS)


Family = tuple[PreTrainedModel, Anatomy]


@pytest.mark.parametrize("key", list(Key))
def test_keys_are_finite_and_have_one_vector_per_position(
    family: Family, tokenizer: PreTrainedTokenizerFast, key: str
) -> None:
    model, anatomy = family
    if key == "ffn_input_before_norm" and anatomy.ffn is None:
        pytest.skip("has no feed-forward block")
    lm = LanguageModel(model, tokenizer, key=key)
    keys = lm.keys(TOKENS)
    assert keys.shape == (*TOKENS.shape, lm.dimension)
    assert keys.isfinite().all()
    assert not keys.requires_grad
    assert torch.equal(lm.keys_and_logits(TOKENS).keys, keys)


def test_the_blocks_inputs_are_those_at_the_literal_paths(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, anatomy = family
    expected = input_of(model, anatomy.ffn or anatomy.attention)
    assert torch.equal(keys_of(model, tokenizer, "ffn_input"), expected)
    expected = input_of(model, anatomy.attention)
    assert torch.equal(keys_of(model, tokenizer, "attention_input"), expected)


def test_norms_lead_from_the_keys_before_to_the_keys_after(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, anatomy = family
    for block, norm in (("attention", anatomy.attention_norm), ("ffn", anatomy.ffn_norm)):
        if block == "ffn" and anatomy.ffn is None:
            continue
        after = keys_of(model, tokenizer, f"{block}_input")
        before = keys_of(model, tokenizer, f"{block}_input_before_norm")
        if norm is None:
            assert torch.equal(before, after)
        else:
            assert not torch.equal(before, after)
            torch.testing.assert_close(apply(model, norm, before), after)


def test_the_layers_input_and_output_are_the_residual_stream(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, anatomy = family
    before = keys_of(model, tokenizer, "attention_input_before_norm")
    assert torch.equal(before, input_of(model, anatomy.layer))
    output = keys_of(model, tokenizer, "output")
    after = keys_of(model, tokenizer, "output_after_norm")
    with torch.inference_mode():
        hidden_states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(after, hidden_states[-1])
    torch.testing.assert_close(apply(model, anatomy.final_norm, output), after)


def test_the_lm_head_leads_from_the_last_key_to_the_logits(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, anatomy = family
    if anatomy.head is None:
        pytest.skip("scales or caps its logits")
    reading = LanguageModel(model, tokenizer, key="output_after_norm").keys_and_logits(TOKENS)
    torch.testing.assert_close(apply(model, anatomy.head, reading.keys), reading.logits)


def test_padding_on_the_right_changes_no_key(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = LanguageModel(family[0], tokenizer)
    padded = TOKENS.clone()
    padded[1, 4:] = 0
    alone = lm.keys_and_logits(TOKENS[1:2, :4])
    batched = lm.keys_and_logits(padded)
    torch.testing.assert_close(batched.keys[1, :4], alone.keys[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batched.logits[1, :4], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_models_have_bfloat16_keys_and_float32_logits(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, anatomy = family
    name = next(name for name in ANATOMIES if ANATOMIES[name] is anatomy)
    exact = LanguageModel(model, tokenizer).keys(TOKENS)
    lm = LanguageModel(FAMILIES[name]().to(torch.bfloat16), tokenizer)
    reading = lm.keys_and_logits(TOKENS)
    assert lm.dtype == reading.keys.dtype == torch.bfloat16
    assert reading.logits.dtype == torch.float32
    assert reading.keys.shape == exact.shape
    assert torch.equal(reading.keys, lm.keys(TOKENS))


def test_capture_follows_generate_step_by_step(
    family: Family, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = LanguageModel(family[0], tokenizer)
    with lm.capture() as captured:
        generated = lm.model.generate(
            TOKENS[:1],
            attention_mask=torch.ones_like(TOKENS[:1]),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        stepwise = captured.keys
    assert stepwise.shape == (1, 1, lm.dimension)
    whole = lm.keys(generated[:, :-1])
    torch.testing.assert_close(stepwise[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


def hook_count(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_stays_behind_even_after_a_failure(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = hook_count(tiny_model)
    lm = LanguageModel(tiny_model, tokenizer)
    lm.keys(TOKENS)
    with pytest.raises(IndexError):
        lm.keys(TOKENS + VOCAB_SIZE)
    assert hook_count(tiny_model) == before


def test_two_language_models_over_one_model_do_not_disturb_each_other(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    one = LanguageModel(tiny_model, tokenizer, key="ffn_input")
    other = LanguageModel(tiny_model, tokenizer, key="output")
    expected_one, expected_other = one.keys(TOKENS), other.keys(TOKENS)
    with one.capture() as outer, other.capture() as inner:
        tiny_model(input_ids=TOKENS)
        torch.testing.assert_close(outer.keys, expected_one)
        torch.testing.assert_close(inner.keys, expected_other)
        assert not outer.keys.requires_grad


def test_a_pass_in_another_thread_leaves_this_threads_keys_alone(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = LanguageModel(tiny_model, tokenizer)
    expected = lm.keys(TOKENS)
    with lm.capture() as captured, torch.inference_mode():
        tiny_model(input_ids=TOKENS)
        thread = threading.Thread(target=lambda: lm.keys(TOKENS[:1, :2]))
        thread.start()
        thread.join()
        assert torch.equal(captured.keys, expected)


def test_a_model_in_training_mode_is_read_without_dropout_and_stays_in_training_mode(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = LanguageModel(tiny_gpt2(), tokenizer).keys(TOKENS)
    model = tiny_gpt2().train()  # GPT-2 drops out by default
    assert torch.equal(LanguageModel(model, tokenizer).keys(TOKENS), expected)
    assert model.training


def test_mambas_default_key_is_its_mixers_input(tokenizer: PreTrainedTokenizerFast) -> None:
    assert LanguageModel(FAMILIES["mamba"](), tokenizer).key == "attention_input"


def test_a_key_that_the_model_lacks_is_refused_with_the_choices_it_has(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"no feed-forward block; choose one of attention_input, .*, output_after_norm$",
    ):
        LanguageModel(FAMILIES["mamba"](), tokenizer, key="ffn_input_before_norm")


def test_an_unreadable_layer_is_refused_and_names_what_was_not_found(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_llama()

    class Unheard(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.hidden = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.hidden(*args, **kwargs)

    model.model.layers[-1] = Unheard(model.model.layers[-1])
    with pytest.raises(UnsupportedModelError, match=r"none of mlp, .*choose one of output, output"):
        LanguageModel(model, tokenizer)

    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match=r"no list of .*choose one of output_after_"):
        LanguageModel(model, tokenizer)
    assert LanguageModel(model, tokenizer, key="output_after_norm").dimension == 32


def test_an_unknown_key_is_refused(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^key must be one of ffn_input, .*got 'middle'"
    ):
        LanguageModel(tiny_model, tokenizer, key="middle")


def test_keys_before_any_pass_are_refused(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with (
        LanguageModel(tiny_model, tokenizer).capture() as captured,
        pytest.raises(UnsupportedModelError, match="no key was captured"),
    ):
        _ = captured.keys
