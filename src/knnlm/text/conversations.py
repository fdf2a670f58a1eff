"""Conversations: lists of messages, as a text that a document can hold.

Knows text but no tokens and no templates.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.text.documents import check_utf8

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
"""What somebody says in a conversation: its `role`, one of ROLES, and its `content`."""


def check_messages(messages: Any, place: str = "messages") -> None:
    """Raise InvalidArgumentError for what is no conversation; place: where it is."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidArgumentError(
            f"{place} must be a list of messages, got {type(messages).__name__}"
        )
    if not messages:
        raise InvalidArgumentError(f"{place} must hold at least one, got none: add what is asked")
    for number, message in enumerate(messages):
        own = f"{place}[{number}]"
        if not isinstance(message, Mapping):
            raise InvalidArgumentError(
                f"{own} must be like {{'role': 'user', 'content': 'Hello'}}, got "
                f"{type(message).__name__}"
            )
        if (role := message.get("role")) not in ROLES:
            raise InvalidArgumentError(
                f"{own}: the role must be one of {', '.join(ROLES)}, got {role!r}"
            )
        if not isinstance(content := message.get("content"), str):
            raise InvalidArgumentError(
                f"{own}: the content must be a text, got {type(content).__name__}"
            )
        try:
            check_utf8(f"{own}: the content", content)
        except InvalidTextError as error:
            raise InvalidArgumentError(str(error)) from error


def conversation_to_text(messages: Sequence[Message]) -> str:
    """Return messages as JSON; whatever else they hold is left out."""
    plain = [{"role": one["role"], "content": one["content"]} for one in messages]
    return json.dumps(plain, ensure_ascii=False)


def text_to_conversation(text: str) -> list[Message]:
    """Return the messages of a text that `conversation_to_text` has made."""
    messages: list[Message] = json.loads(text)
    return messages
