"""Whatever a text says is text, for every tokenizer; control tokens only if they are meant."""

import copy
import random

import pytest
from conftest import refusal
from tokenizer_families import CONTROL, FAMILIES, PROSE
from transformers import PreTrainedTokenizerFast

from knnlm.errors import InvalidArgumentError
from knnlm.model.encoding import Encoder

MEANT = CONTROL[1:]  # <unk> also stands for what the vocabulary lacks


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


def plain(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens


def texts_with(name: str, seed: int) -> list[str]:
    chosen = random.Random(seed)
    words = [*PROSE.split(" "), "", " ", "\n", "é", "<", ">", "日"]
    around = [[chosen.choice(words) for _ in range(4)] for _ in range(20)]
    texts = [f"{a}{b}{name}{c}{d}" for a, b, c, d in around]
    return [name, name * 2, f" {name} ", f"x {name} y", f"{name} {name}", PROSE + name, *texts]


def test_control_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    controls = {token: name for name, token in tokenizer.get_vocab().items() if name in MEANT}
    assert len(controls) == len(MEANT)
    for seed, (token, name) in enumerate(controls.items()):
        for text in texts_with(name, seed):
            (found,) = encoder.encode([text])
            assert not controls.keys() & set(found), text
        assert [token] in encoder.encode([name, f" {name}"], control_tokens=True)


def test_meant_control_tokens_are_those_of_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = Encoder(tokenizer)
    texts = [text for name in MEANT for text in texts_with(name, 0)]
    assert encoder.encode(texts, control_tokens=True) == plain(tokenizer, texts)


def test_all_other_text_has_the_tokenizers_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    texts = [PROSE, "", " ", "a of the  \nb", "<think>x</think> <tool> y", "日本語 🙂 \ufffd\u0301"]
    assert encoder.encode(texts) == plain(tokenizer, texts)
    assert copy.deepcopy(encoder).encode(texts) == plain(tokenizer, texts)


def test_byte_level_text_with_control_tokens_comes_back() -> None:
    for name in ("byte_level", "llama_2", "gemma"):
        tokenizer = FAMILIES[name]()
        encoder = Encoder(tokenizer)
        for text in [text for control in CONTROL for text in texts_with(control, 1)]:
            assert tokenizer.decode(encoder.encode([text])[0]) == text


@pytest.mark.parametrize("family", ["byte_level", "unigram"])
def test_an_added_token_that_ends_texts_is_a_control_token(family: str) -> None:
    tokenizer = FAMILIES[family]()
    tokenizer.add_tokens(["<turn>", "<word>"])
    turn, word = tokenizer.convert_tokens_to_ids(["<turn>", "<word>"])
    text = "a book<turn> goes <word>"
    assert {turn, word} <= set(Encoder(tokenizer).encode([text])[0])
    found = set(Encoder(tokenizer, {turn}).encode([text])[0])
    assert word in found
    assert turn not in found
    assert turn in Encoder(tokenizer, {turn}).encode([text], control_tokens=True)[0]


def test_text_that_utf_8_cannot_hold_is_refused() -> None:
    with refusal(InvalidArgumentError, "text must be text in UTF-8", "character 1"):
        Encoder(FAMILIES["byte_level"]()).encode(["ok", "a\ud800"])
