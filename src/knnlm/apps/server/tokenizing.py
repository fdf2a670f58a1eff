"""Texts → tokens for many requests at once: no text holds up the others for long.

Knows tokenizers; knows no model and no request.
"""

import asyncio
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from knnlm.model.chat import ChatTemplate
from knnlm.model.encoding import Encoder
from knnlm.model.token_text import detokenize
from knnlm.text.conversations import Message

Given = TypeVar("Given")
Value = TypeVar("Value")
_PIECE = 1 << 14  # characters or tokens: some milliseconds of work


class _OwnEncoder:
    """An encoder, which serves one thread at a time, and those who wait for it in order."""

    def __init__(self, encoder: Encoder) -> None:
        self._chat = ChatTemplate(copy.deepcopy(encoder))
        self._turn = asyncio.Lock()

    async def run(self, function: Callable[[ChatTemplate, Given], Value], given: Given) -> Value:
        """Call a function in a thread that has the encoder, and its chat template, to itself."""
        # who waits here takes no thread, and a client that leaves gives its turn up
        async with self._turn:
            return await run_in_threadpool(function, self._chat, given)


class Tokenizing:
    """Tokenizes and detokenizes for one event loop; the model thread uses the original encoder.

    Short texts and long ones have an encoder each, and long texts take turns. control_tokens: see
    `Encoder.encode`, of all texts.
    """

    def __init__(self, encoder: Encoder, control_tokens: bool = False) -> None:
        self._short, self._long = _OwnEncoder(encoder), _OwnEncoder(encoder)
        self._control_tokens = control_tokens

    async def encode(self, text: str, most: int) -> list[int] | None:
        """Return the tokens of a text; may return None instead if they are more than `most`.

        A long text is first counted in pieces, which costs little more than `most` tokens do.
        """
        if len(text) <= _PIECE:
            return await self._short.run(self._tokens, text)
        if await self._is_too_long([text], most):
            return None
        return await self._long.run(self._tokens, text)

    async def encode_chat(self, messages: Sequence[Message], most: int) -> list[int] | None:
        """Do the same for a conversation that is to be answered; see `ChatTemplate.encode`."""
        contents = [message["content"] for message in messages]
        if sum(map(len, contents)) + len(contents) <= _PIECE:
            return await self._short.run(ChatTemplate.encode, messages)
        if len(messages) > most or await self._is_too_long(contents, most):
            return None
        return await self._long.run(ChatTemplate.encode, messages)

    async def turn_ends(self) -> frozenset[int]:
        """Return the tokens that end an answer; see `ChatTemplate.turn_ends`."""
        return await self._short.run(_turn_ends, None)

    async def _is_too_long(self, texts: Iterable[str], most: int) -> bool:
        """Count the tokens of long texts in pieces, as far as need be."""
        counted = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                counted += len(await self._long.run(self._tokens, text[start : start + _PIECE]))
                # the cuts between the pieces add a token or two each: far from as many again
                if counted > 2 * most:
                    return True
        return False

    def _tokens(self, chat: ChatTemplate, text: str) -> list[int]:
        return chat.encoder.encode([text], self._control_tokens)[0]

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens unchanged, special tokens and spaces included."""
        own = self._short if len(tokens) <= _PIECE else self._long
        return await own.run(_decode, tokens)


def _decode(chat: ChatTemplate, tokens: Sequence[int]) -> str:
    return detokenize(chat.encoder.tokenizer, tokens)


def _turn_ends(chat: ChatTemplate, _: None) -> frozenset[int]:
    return chat.turn_ends
