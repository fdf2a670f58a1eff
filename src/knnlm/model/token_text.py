"""Tokens → the text that each of them is in its context, and its bytes.

Knows tokenizers; knows no model. Whatever shows the text of tokens takes it from here: decoded
alone, a token may lose the space before it, and the parts of a character look alike.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_UNFINISHED = "\ufffd"  # what the bytes of a partial character are decoded as
_CONTEXT_TOKENS = 4
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

    def split(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """Return the text that each token adds; see `GrowingText`."""
        growing = GrowingText(self, before)
        for token in tokens:
            growing.push(token)
        growing.finish()
        return growing.pieces()

    def bytes_of(self, token: int, text: str | None = None) -> bytes:
        """Return a token's own bytes: those of its text, or a part of a character's.

        text: what the token adds to its text; None for a token within any text.
        """
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._find_bytes(token)
        return data if text is None or not _is_text(data) or self.is_open(token) else text.encode()

    def name(self, token: int, before: Sequence[int] | None = None) -> str:
        r"""Return a token's text, but `bytes:\xe4` for a part of a character, as OpenAI has it.

        before: None for a token within any text.
        """
        data = self.bytes_of(token)
        if not _is_text(data):
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return data.decode() if before is None else self.decode([token], before)

    def context(self, before: Sequence[int]) -> list[int]:
        """Return the last tokens of a text that decide how those after them are written."""
        tokens = list(before[-_CONTEXT_TOKENS:])
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
            ) or not self._joined([token, *self._some_text]).startswith(alone.rstrip(_UNFINISHED))
        return known

    def _joined(self, tokens: Sequence[int]) -> str:
        return detokenize(self._tokenizer, tokens) if tokens else ""

    def _is_whole(self, tokens: Sequence[int]) -> bool:
        return not self._joined(tokens).endswith(_UNFINISHED)

    def _find_bytes(self, token: int) -> bytes:
        text = self.decode([token], self._some_text)
        if _UNFINISHED in text:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            if match := _BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(match[1])
            data = bytes(_BYTES[character] for character in piece if character in _BYTES)
            if len(data) == len(piece) and data.decode(errors="replace") == text:
                return data
        return text.encode()


class GrowingText:
    """The text of tokens as they arrive, which goes on the text before them.

    `text` is the part that is certain: it never gets shorter, and ends in no partial character. A
    character belongs to the token that completes it. `offsets` says where in the text each token
    begins whose text is certain.
    """

    def __init__(self, texts: TokenTexts, before: Sequence[int] = ()) -> None:
        self._texts = texts
        self._context = texts.context(before)
        self._waiting: list[int] = []
        self.text = ""
        self.offsets: list[int] = []

    def push(self, token: int) -> None:
        """Add a token."""
        self._waiting.append(token)
        if len(self._waiting) < _MOST_OPEN and self._texts.is_open(token):
            return
        if not self.ahead().endswith(_UNFINISHED):
            self.finish()

    def ahead(self) -> str:
        """Return what the waiting tokens add to the text if none follow them."""
        return self._texts.decode(self._waiting, self._context)

    def finish(self) -> None:
        """Take the text of all tokens so far as certain."""
        if self._waiting:
            pieces = self._texts.cut([[token] for token in self._waiting], self._context)
            for piece in pieces:
                self.offsets.append(len(self.text))
                self.text += piece
            self._context, self._waiting = self._waiting, []

    def pieces(self) -> list[str]:
        """Return the text of each token that is certain; they add up to the text."""
        return [self.text[start:stop] for start, stop in pairwise([*self.offsets, len(self.text)])]


def _common(first: str, second: str) -> int:
    """Return the length of the longest common beginning of two texts."""
    if second.startswith(first):
        return len(first)
    return next(n for n, pair in enumerate(zip(first, second)) if pair[0] != pair[1])


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
