"""Text while it grows, against the text of all tokens at once."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from conftest import PROSE, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from knnlm.apps.engine.text_stream import TextStream
from knnlm.model.token_text import TokenTexts

TOKENIZER = byte_tokenizer()


def decode(tokens: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(
        list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def encode(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return tokens


def grown(tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """Return what is certain after every token and at the end."""
    stream = TextStream(TokenTexts(TOKENIZER), encode("before"), stop)
    seen = []
    for token in tokens:
        stream.push(token)
        seen.append(stream.text)
        if stream.stopped:
            break
    stream.finish()
    return [*seen, stream.text], stream


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_the_text_of_all_of_them(seed: int) -> None:
    chosen = random.Random(seed)
    tokens = [chosen.randrange(384) for _ in range(60)]
    seen, stream = grown(tokens)
    assert seen[-1] == decode(tokens)
    for earlier, later in pairwise(seen):
        assert later.startswith(earlier)
    for number, offset in enumerate(stream.offsets):
        assert (
            decode(tokens[:number]).rstrip("\ufffd").startswith(seen[-1][:offset].rstrip("\ufffd"))
        )


@pytest.mark.parametrize(
    "text", ["naïve café — π", "日本語のテキスト", "🙂🙃👩‍👩‍👧", "a\u0301 x\ufffd y"]
)
def test_no_half_characters(text: str) -> None:
    tokens = encode(text)
    assert len(tokens) > len(text), "characters of several tokens"
    seen, _ = grown(tokens)
    assert seen[-1] == text
    for part in seen:
        assert text.startswith(part)
    genuine = text.count("\ufffd")
    assert all(part.count("\ufffd") <= genuine for part in seen)


def reference(text: str, stop: Sequence[str]) -> str:
    """Read letter by letter: the stop sequence that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        lengths = [len(one) for one in stop if text[:end].endswith(one)]
        if lengths:
            return text[: end - max(lengths)]
    return text


@pytest.mark.parametrize(
    "stop",
    [["state"], ["en state are"], ["\n"], [". What followed"], ["zzz"], ["memory", "neighbors of"],
     ["hidden st", "dden state"], ["vote. A", "ote"]],
)  # fmt: skip
def test_stop_sequences(stop: list[str]) -> None:
    tokens = encode(PROSE)
    seen, stream = grown(tokens, stop)
    wanted = reference(PROSE, stop)
    assert seen[-1] == wanted
    assert stream.stopped == (wanted != PROSE)
    for part in seen:
        assert wanted.startswith(part), "nothing of the stop sequence was ever shown"


@pytest.mark.parametrize("seed", range(200))
def test_stop_sequences_of_few_letters(seed: int) -> None:
    """Overlaps, repeats and near misses; every letter is a token."""
    chosen = random.Random(seed)
    text = "".join(chosen.choice("ab") for _ in range(30))
    stop = ["".join(chosen.choice("ab") for _ in range(chosen.randint(1, 6))) for _ in range(2)]
    tokens = [token for letter in text for token in encode(letter)]
    seen, _ = grown(tokens, stop)
    assert seen[-1] == reference(text, stop)
    for part in seen:
        assert seen[-1].startswith(part)


def test_tokenizers_that_write_a_first_word_differently() -> None:
    """SentencePiece: a word's space is lost where the word comes first."""
    words = {"▁one": 0, "▁two": 1, "▁three": 2, "<unk>": 3}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.normalizer = normalizers.Replace(" ", "▁")
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)

    def decode_words(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    assert decode_words([0, 1]) == "one two"
    assert decode_words([1]) == "two"
    stream = TextStream(TokenTexts(tokenizer), [0])
    stream.push(1)
    assert stream.text == " two"
    stream.push(2)
    assert stream.text == " two three"


def test_a_prompt_that_ends_within_a_character() -> None:
    tokens = encode("x日")
    assert len(tokens) == 4
    stream = TextStream(TokenTexts(TOKENIZER), tokens[:2])
    for token in tokens[2:]:
        stream.push(token)
    stream.finish()
    assert stream.text == decode(tokens[2:]), "its other half belongs to nobody"
