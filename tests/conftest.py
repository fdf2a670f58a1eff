"""Tiny random models and a tiny tokenizer, built here: no test downloads anything."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from knnlm.model.language_model import LanguageModel
from knnlm.retrieval import draft_lengths
from knnlm.text.documents import Document

# more threads only get in each other's way on models this small
torch.set_num_threads(1)

PROSE = (
    "The nearest neighbors of a hidden state are the places where the model has felt like this "
    "before. What followed there is a guess at what follows here; the closer the place, the "
    "heavier its vote. A datastore is a memory: one entry for every token of the text, its key the "
    "hidden state that preceded it and its value the token itself.\n"
)


def byte_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with BOS and EOS, trained on a paragraph: it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(
    seed: int = 0, vocab_size: int = 384, bos_token_id: int = 0, eos_token_id: int = 1
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=384,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def eager_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is guessed is read, whether it pays or not."""
    monkeypatch.setattr(draft_lengths, "_LEAST_GAIN", 0.0)
    monkeypatch.setattr(draft_lengths.PassCosts, "knows", lambda *_: True)
    monkeypatch.setattr(draft_lengths.PassCosts, "of", lambda *_: 1.0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def refusal(error: type[Exception], *parts: str) -> Any:
    """Expect one line that holds the parts in this order."""
    return pytest.raises(error, match="^" + ".*".join(["", *map(re.escape, parts), ""]) + r"\Z")


def documents_of(count: int) -> list[Document]:
    """Return documents d0, d1, … of one to three paragraphs."""
    return [Document(f"d{number}", PROSE * (1 + number % 3)) for number in range(count)]


@pytest.fixture(scope="session")
def llama_lm() -> LanguageModel:
    return LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny")


@pytest.fixture(scope="session", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def tiny_lm(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(request.param(), byte_tokenizer(), name="tiny")


@pytest.fixture(scope="session", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    build: Callable[[], PreTrainedModel] = request.param
    return build()
