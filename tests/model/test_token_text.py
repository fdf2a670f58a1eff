"""The text of tokens in their context, against the text of all of them, for every tokenizer."""

import random
from collections.abc import Iterator

import pytest
from tokenizer_families import CONTROL, FAMILIES, PROSE
from transformers import PreTrainedTokenizerFast

from knnlm.model.encoding import Encoder
from knnlm.model.token_text import GrowingText, TokenTexts, detokenize

LETTERS = "ab Tz.,\n\t'é£ßжñ日本語한🙂👩‍🚀\u0301\ufffd"


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


def random_runs(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Yield runs of any tokens: parts of characters that never end, control tokens, anything."""
    chosen = random.Random(seed)
    for _ in range(60):
        size = chosen.randint(1, 30)
        yield [chosen.randrange(len(tokenizer)) for _ in range(size)]


def random_texts(seed: int) -> Iterator[str]:
    chosen = random.Random(seed)
    words = PROSE.split(" ")
    for _ in range(60):
        parts = [chosen.choice([*words, *LETTERS, *CONTROL, " "]) for _ in range(12)]
        yield chosen.choice(["", " "]).join(parts)


def texts_of(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    yield from random_runs(tokenizer, seed)
    encoder = Encoder(tokenizer)
    yield from (tokens for tokens in encoder.encode(list(random_texts(seed))) if tokens)


@pytest.mark.parametrize("seed", range(2))
def test_the_texts_of_tokens_add_up(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    texts = TokenTexts(tokenizer)
    chosen = random.Random(seed)
    for tokens in texts_of(tokenizer, seed):
        whole = detokenize(tokenizer, tokens)
        pieces = list(texts.split(tokens))
        assert len(pieces) == len(tokens)
        assert "".join(pieces) == whole
        first, second = sorted(chosen.choices(range(len(tokens) + 1), k=2))
        runs = [tokens[:first], tokens[first:second], tokens[second:]]
        assert "".join(texts.cut(runs)) == whole
        assert len(texts.cut(runs)) == 3


@pytest.mark.parametrize("seed", range(2))
def test_a_continuation_continues_exactly(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    texts = TokenTexts(tokenizer)
    chosen = random.Random(seed)
    continued = 0
    for tokens in texts_of(tokenizer, seed):
        cut = chosen.randint(0, len(tokens))
        before, after = tokens[:cut], tokens[cut:]
        whole, prompt = detokenize(tokenizer, tokens), texts.decode(before)
        if prompt.endswith("\ufffd") or not whole.startswith(prompt):
            continue  # the cut is within a character
        continued += 1
        assert prompt + texts.decode(after, before) == whole
        assert prompt + "".join(texts.split(after, before)) == whole
    assert continued > 20


@pytest.mark.parametrize("seed", range(2))
def test_growing_text_is_certain(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    texts = TokenTexts(tokenizer)
    for tokens in texts_of(tokenizer, seed):
        growing = GrowingText(texts)
        whole, seen, known = detokenize(tokenizer, tokens), "", 0
        for number, token in enumerate(tokens):
            pieces = growing.push(token)
            known += len(pieces)
            seen += "".join(pieces)
            assert whole.startswith(seen)
            assert not pieces or known == number + 1
            assert seen + growing.ahead() == detokenize(tokenizer, tokens[: number + 1])
        assert seen + "".join(growing.finish()) == whole


def test_text_comes_back_with_its_bytes() -> None:
    """Of tokenizers that hold any text, its bytes are those of its tokens."""
    for name in ("byte_level", "byte_level_with_added", "llama_2", "gemma"):
        tokenizer = FAMILIES[name]()
        texts, encoder = TokenTexts(tokenizer), Encoder(tokenizer)
        for text in random_texts(0):
            (tokens,) = encoder.encode([text])
            if name == "byte_level_with_added" and "<tool>" in text:
                continue
            assert texts.decode(tokens) == text
            pieces = list(texts.split(tokens))
            parts = [texts.bytes_of(*pair) for pair in zip(tokens, pieces, strict=True)]
            assert b"".join(parts) == text.encode()


def test_parts_of_characters_have_names_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = TokenTexts(tokenizer)
    encoder = Encoder(tokenizer)
    halves = [token for token in range(len(tokenizer)) if texts.names([token])[0][:6] == "bytes:"]
    names = texts.names(halves)
    assert len(set(names)) == len(halves)
    fallback = any(piece in tokenizer.get_vocab() for piece in ("<0xD0>", "Ð"))
    assert (len(halves) > 100) == fallback
    if fallback:
        (tokens,) = encoder.encode(["aж"])
        parts = [texts.bytes_of(token) for token in tokens]
        assert b"".join(parts).strip() == "aж".encode()
        for token, data in zip(tokens[-2:], parts[-2:], strict=True):
            assert texts.names([token], tokens[:1]) == [
                "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            ]


def test_a_first_word_has_no_space_and_the_others_have() -> None:
    tokenizer = FAMILIES["llama_2"]()
    texts = TokenTexts(tokenizer)
    (tokens,) = Encoder(tokenizer).encode(["book book"])
    assert tokens[0] == tokens[1]
    assert list(texts.split(tokens)) == ["book", " book"]
    assert texts.names(tokens[:1], []) == ["book"]
    assert texts.names(tokens[:1], tokens) == texts.names(tokens[:1]) == [" book"]
    assert texts.bytes_of(tokens[0]) == b" book"
    assert texts.bytes_of(tokens[0], "book") == b"book"
