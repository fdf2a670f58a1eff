"""Conversations → tokens, as a tokenizer's chat template writes them. What people say is text.

Knows tokenizers and their templates; knows no model.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from knnlm.errors import InvalidArgumentError, UnsupportedModelError
from knnlm.model.encoding import (
    Encoder,
    encode_as_is,
    private_names,
    with_other_names,
)
from knnlm.text.conversations import Message, check_messages


class SaidTokens(NamedTuple):
    """The tokens of a conversation; said: which of them a model is to say, ends of turns too."""

    tokens: Int32[np.ndarray, " token"]
    said: Bool[np.ndarray, " token"]


class ChatTemplate:
    """The chat template of a tokenizer, which turns conversations into tokens.

    The template's own `<|im_start|>` and the like are control tokens. In a message they are text,
    whatever it says, so that nobody can speak for another. (Where a template writes roles as
    ordinary text, such as `[INST]`, a message that says the same looks the same.)
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._controls = dict(encoder.controls)
        unknown = encoder.tokenizer.unk_token_id  # which often is an end token, too
        if unknown in encoder.tokenizer.added_tokens_decoder:
            self._controls[unknown] = encoder.tokenizer.unk_token

    def encode(self, messages: Sequence[Message], *, to_answer: bool = True) -> list[int]:
        """Return the tokens of a conversation, exactly those of its template.

        They begin with a start token only if the template does. to_answer: whether the assistant's
        turn is opened at the end. Raises InvalidArgumentError for messages that are none, and for
        those that the template refuses; UnsupportedModelError for a tokenizer without a template.
        """
        check_messages(messages)
        return self._tokens(self._render(messages, to_answer))

    def encode_answers(self, messages: Sequence[Message]) -> SaidTokens:
        """Return the tokens of a whole conversation, and which of them the assistant says.

        An answer begins where the template leaves the model to go on, and ends with the control
        token that ends its turn. Raises the errors of `encode`, and InvalidArgumentError for a
        template that writes an answer differently once the conversation goes on.
        """
        check_messages(messages)
        whole = self._render(messages, to_answer=False)
        tokens = self._tokens(whole)
        said = np.zeros(len(tokens), dtype=np.bool_)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            until, after = self._around(messages[: number + 1])
            if not (whole.startswith(until) and whole.startswith(after)):
                raise InvalidArgumentError(
                    "messages: the chat template writes earlier answers differently once a "
                    "conversation goes on: let each conversation end with its only answer"
                )
            start = _common(tokens, self._tokens(until))
            stop = _common(tokens, self._tokens(after))
            ends = (n + 1 for n in range(start, stop) if tokens[n] in self.turn_ends)
            said[start : next(ends, stop)] = True
        return SaidTokens(np.array(tokens, dtype=np.int32), said)

    def _around(self, messages: Sequence[Message]) -> tuple[str, str]:
        """Return the text of a conversation up to its last message, an answer, and with it."""
        before = messages[:-1]
        if not before:  # few templates can write nothing
            after = self._render(messages, to_answer=False)
            return after[: after.find(messages[-1]["content"].strip())], after
        return self._render(before, to_answer=True), self._render(messages, to_answer=False)

    def _tokens(self, rendered: str) -> list[int]:
        return encode_as_is(self._tokenizer, [rendered], control_tokens=True)[0]

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The control token with which the template ends an answer, if it does so with one."""
        answer = f"answer {secrets.token_hex(8)}"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        try:
            rendered = self._render(turns, to_answer=False)
        except InvalidArgumentError:
            return frozenset()
        after = rendered.rpartition(answer)[2]
        places = {
            after.find(self._private[name]): token
            for token, name in self._controls.items()
            if self._private[name] in after
        }
        return frozenset({places[min(places)]} if places else ())

    def _render(self, messages: Sequence[Message], to_answer: bool) -> str:
        """Return a conversation's text, in which the template's control tokens have other names.

        Within messages, names of control tokens are hidden from this by aliases, in whose place the
        template sees the rest of a message as it is: it may trim it, or look into it.
        """
        hidden = [
            {"role": message["role"], "content": _replaced(message["content"], self._aliases)}
            for message in messages
        ]
        tokenizer = self._tokenizer
        try:
            text: str = tokenizer.apply_chat_template(
                hidden, tokenize=False, add_generation_prompt=to_answer
            )
        except TemplateError as error:
            raise InvalidArgumentError(
                f"messages: the model's chat template refuses them: {str(error).strip()}"
            ) from error
        named = _replaced(text, self._private)
        return _replaced(named, {alias: name for name, alias in self._aliases.items()})

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose control tokens have private names."""
        tokenizer = self.encoder.tokenizer
        if not tokenizer.chat_template:
            raise UnsupportedModelError(
                "the model's tokenizer must have a chat template to read conversations, but has "
                "none: choose a model that was trained to chat, put its chat_template.jinja into "
                "the model's folder, or give running text instead of messages"
            )
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                "the model's tokenizer must be a fast one (tokenizer.json) to read conversations, "
                f"but is a {type(tokenizer).__name__}: give running text instead of messages"
            )
        return with_other_names(tokenizer, self._private)

    @cached_property
    def _private(self) -> dict[str, str]:
        return private_names(self._controls)

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return private_names(self._controls)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _replaced(text: str, names: Mapping[str, str]) -> str:
    """Return a text in which names are replaced by others; of two that begin alike, the longer."""
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: names[match[0]], text)
