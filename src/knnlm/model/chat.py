"""Conversations → tokens, as a tokenizer's chat template writes them. What people say is text.

Knows tokenizers and their templates; knows no model.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from knnlm.errors import InvalidArgumentError, UnsupportedModelError
from knnlm.model.encoding import (
    Encoder,
    check_text,
    encode_as_is,
    private_names,
    with_other_names,
)

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
"""What somebody says in a conversation: its `role`, one of ROLES, and its `content`."""


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
        rendered = self._render(messages, to_answer)
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


def check_messages(messages: Sequence[Any]) -> None:
    """Raise InvalidArgumentError for what is no conversation."""
    if not messages:
        raise InvalidArgumentError("messages must hold at least one, got none: add what is asked")
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise InvalidArgumentError(
                f"{place} must be like {{'role': 'user', 'content': 'Hello'}}, got "
                f"{type(message).__name__}"
            )
        if (role := message.get("role")) not in ROLES:
            raise InvalidArgumentError(
                f"{place}: the role must be one of {', '.join(ROLES)}, got {role!r}"
            )
        if not isinstance(content := message.get("content"), str):
            raise InvalidArgumentError(
                f"{place}: the content must be a text, got {type(content).__name__}"
            )
        check_text(f"{place}: the content", content)


def _replaced(text: str, names: Mapping[str, str]) -> str:
    """Return a text in which names are replaced by others; of two that begin alike, the longer."""
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: names[match[0]], text)
