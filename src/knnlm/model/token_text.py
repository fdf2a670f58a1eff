"""Tokens → the text that each of them is in its context, and its bytes.

Knows tokenizers; knows no model. Whatever shows the text of tokens takes it from here: decoded
alone, a token may lose the space before it, and the parts of a character look alike.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

UNFINISHED = "\ufffd"
"""What the bytes of a partial character are decoded as."""
CONTEXT_TOKENS = 4
"""How many of the tokens before it decide how a token is written."""
_MOST_OPEN = 64  # tokens whose text waits for what follows them
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def detokenize(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of tokens unchanged, special tokens and spaces included."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


class TokenTexts:
    """The texts of a tokenizer's tokens.

    `before` is always the tokens that precede, of which the last few count; without any, the text
    begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._open: dict[int, bool] = {}
        # stands for any text where it does not matter which
        some_text = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._some_text: list[int] = some_text if self._is_whole(some_text) else []

    def decode(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        """Return the text that tokens add to the text before them."""
        context = self.context(before)
        return self._joined([*context, *tokens])[len(self._joined(context)) :]

    def cut(self, runs: Iterable[Sequence[int]], before: Sequence[int] = ()) -> list[str]:
        """Return the texts of consecutive runs of tokens, which add up to the text of all.

        A character belongs to the run that completes it.
        """
        tokens = self.context(before)
        grown = [self._joined(tokens)]
        for run in runs:
            tokens += run
            grown.append(self._joined(tokens))
        ends = [len(grown[0]), *(_common(part, grown[-1]) for part in grown[1:])]
        for number in range(1, len(ends)):
            ends[number] = max(ends[number - 1 : number + 1])
        return [grown[-1][start:stop] for start, stop in pairwise(ends)]

    def split(self, tokens: Sequence[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Yield the text that each token adds; see `GrowingText`."""
        growing = GrowingText(self, before)
        for token in tokens:
            yield from growing.push(token)
        yield from growing.finish()

    def bytes_of(self, token: int, text: str | None = None) -> bytes:
        """Return a token's own bytes: those of its text, or a part of a character's.

        text: what the token adds to its text; None for a token within any text.
        """
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._find_bytes(token)
        return data if text is None or not _is_text(data) or self.is_open(token) else text.encode()

    def name(self, token: int, text: str) -> str:
        r"""Return what a token adds to a text, but `bytes:\xe4` for a part of a character."""
        data = self.bytes_of(token)
        return text if _is_text(data) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def names(self, tokens: Iterable[int], before: Sequence[int] | None = None) -> list[str]:
        """Return the name of each of several tokens that might follow.

        before: None for any text.
        """
        context = self._some_text if before is None else self.context(before)
        start = len(self._joined(context))
        return [self.name(token, self._joined([*context, token])[start:]) for token in tokens]

    def context(self, before: Sequence[int]) -> list[int]:
        """Return the last tokens of a text that decide how those after them are written."""
        tokens = list(before[-CONTEXT_TOKENS:])
        while tokens and not self._is_whole(tokens):
            tokens.pop()
        return tokens

    def is_open(self, token: int) -> bool:
        """Return whether the text of a token may change with those that follow it."""
        known = self._open.get(token)
        if known is None:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            alone = self._joined([token])
            known = self._open[token] = (
                bool(_BYTE_PIECE.fullmatch(piece or "")) and alone != piece
            ) or not self._joined([token, *self._some_text]).startswith(alone.rstrip(UNFINISHED))
        return known

    def _joined(self, tokens: Sequence[int]) -> str:
        return detokenize(self._tokenizer, tokens) if tokens else ""

    def _is_whole(self, tokens: Sequence[int]) -> bool:
        return not self._joined(tokens).endswith(UNFINISHED)

    def _find_bytes(self, token: int) -> bytes:
        text = self.decode([token], self._some_text)
        if UNFINISHED in text:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            if match := _BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(match[1])
            data = bytes(_BYTES[character] for character in piece if character in _BYTES)
            if len(data) == len(piece) and data.decode(errors="replace") == text:
                return data
        return text.encode()


class GrowingText:
    """The text of tokens as they arrive, which continues the text of the tokens before them.

    A token's text is given once it is certain. A character belongs to the token that completes it.
    """

    def __init__(self, texts: TokenTexts, before: Sequence[int] = ()) -> None:
        self._texts = texts
        self._context = texts.context(before)
        self._waiting: list[int] = []

    def push(self, token: int) -> list[str]:
        """Add a token; return the texts of the tokens, this one the last, that are certain now."""
        self._waiting.append(token)
        if len(self._waiting) < _MOST_OPEN and self._texts.is_open(token):
            return []
        return self._settle(is_last=False)

    def ahead(self) -> str:
        """Return what the tokens without a certain text add to it if no others follow."""
        return self._texts.decode(self._waiting, self._context) if self._waiting else ""

    def finish(self) -> list[str]:
        """Return the texts of the tokens whose text was not certain: there are no others."""
        return self._settle(is_last=True) if self._waiting else []

    def _settle(self, is_last: bool) -> list[str]:
        texts = self._texts.cut([[token] for token in self._waiting], self._context)
        if not is_last and "".join(texts).endswith(UNFINISHED):
            return []
        self._context, self._waiting = [*self._context, *self._waiting][-CONTEXT_TOKENS:], []
        return texts


def _common(first: str, second: str) -> int:
    """Return the length of the longest common beginning of two texts."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), len(second))


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
