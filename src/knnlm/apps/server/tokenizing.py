"""Texts → tokens for many requests at once: no text holds up the others for long.

Knows tokenizers; knows no model and no request.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from transformers import PreTrainedTokenizerBase

from knnlm.model.language_model import detokenize, tokenize

Given = TypeVar("Given")
Value = TypeVar("Value")
_PIECE = 1 << 14  # characters or tokens: some milliseconds of work


class _OwnTokenizer:
    """A tokenizer, which serves one thread at a time, and those who wait for it in order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._turn = asyncio.Lock()

    async def run(
        self, function: Callable[[PreTrainedTokenizerBase, Given], Value], given: Given
    ) -> Value:
        """Call a function in a thread that has the tokenizer to itself."""
        # who waits here takes no thread, and a client that leaves gives its turn up
        async with self._turn:
            return await run_in_threadpool(function, self._tokenizer, given)


class Tokenizing:
    """Tokenizes and detokenizes for one event loop; the model thread uses the original tokenizer.

    Short texts and long ones have a tokenizer each, and long texts take turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._short, self._long = _OwnTokenizer(tokenizer), _OwnTokenizer(tokenizer)

    async def encode(self, text: str, most: int) -> list[int] | None:
        """Return the tokens of a text; may return None instead if they are more than `most`.

        A long text is first counted in pieces, which costs little more than `most` tokens do.
        """
        if len(text) <= _PIECE:
            return await self._short.run(_encode, text)
        counted = 0
        for start in range(0, len(text), _PIECE):
            counted += len(await self._long.run(_encode, text[start : start + _PIECE]))
            # the cuts between the pieces add a token or two each: far from as many again
            if counted > 2 * most:
                return None
        return await self._long.run(_encode, text)

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens unchanged, special tokens and spaces included."""
        own = self._short if len(tokens) <= _PIECE else self._long
        return await own.run(detokenize, tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenize(tokenizer, [text])[0]
