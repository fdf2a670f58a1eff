"""Tiny tokenizers of every family: how they split, mark spaces, fall back to bytes and decode."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

PROSE = (
    "A library keeps books; a reader borrows them. The keeper writes the date on a card, and the "
    "card goes into a box until the book comes back. When two readers want one book, the second "
    "waits: naïve café, 日本語 🙂.\n"
)
CONTROL = ("<unk>", "<s>", "</s>", "<|end|>", "<filename>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _wrap(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = ["<|end|>", "<filename>"]
    options = {"clean_up_tokenization_spaces": False, "extra_special_tokens": extra} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen: bytes as characters of their own, merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*CONTROL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return _wrap(tokenizer)


def byte_level_with_added() -> PreTrainedTokenizerFast:
    """Added tokens that carry spaces, take those around them, or are ordinary words."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        ["  \n", " of the", "<think>", AddedToken("<tool>", lstrip=True, rstrip=True)]
    )
    return tokenizer


def _byte_fallback(
    decoder: Any, change: Callable[[dict[str, Any]], None]
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[*CONTROL, *_BYTES], show_progress=False, limit_alphabet=40
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    tokenizer.decoder = decoder
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if not token["content"].startswith("<0x")
    ]
    change(described)
    return _wrap(Tokenizer.from_str(json.dumps(described)))


def llama_2() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral 7B, TinyLlama, Phi-3: a space put before a text, and taken away again."""

    def change(described: dict[str, Any]) -> None:
        described["pre_tokenizer"] = None
        described["normalizer"] = normalizers_json(
            normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
        )

    strip = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _byte_fallback(strip, change)


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: spaces marked, none put before a text."""

    def change(described: dict[str, Any]) -> None:
        described["pre_tokenizer"] = None
        described["normalizer"] = normalizers_json(normalizers.Replace(" ", "\u2581"))

    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _byte_fallback(decoder, change)


def metaspace() -> PreTrainedTokenizerFast:
    """Metaspace as pre-tokenizer and decoder, with bytes as a fallback."""
    decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    return _byte_fallback(decoder, lambda described: None)


def unigram() -> PreTrainedTokenizerFast:
    """T5, XGLM: pieces with scores, control tokens among them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[*CONTROL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    return _wrap(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: words and their continuations; spaces are lost, and put in again."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=[*CONTROL], show_progress=False
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    return _wrap(tokenizer, clean_up_tokenization_spaces=True)


def word_ends() -> PreTrainedTokenizerFast:
    """GPT-1, XLM: pieces that say where a word ends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=[*CONTROL], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    return _wrap(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """Whole words between white space, control tokens among them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=[*CONTROL], show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    return _wrap(tokenizer)


def normalizers_json(*steps: normalizers.Normalizer) -> dict[str, Any]:
    """Return a sequence of normalizers as tokenizer.json has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    described: dict[str, Any] = json.loads(tokenizer.to_str())["normalizer"]
    return described


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    family.__name__: family
    for family in [
        byte_level,
        byte_level_with_added,
        llama_2,
        gemma,
        metaspace,
        unigram,
        word_piece,
        word_ends,
        words,
    ]
}
