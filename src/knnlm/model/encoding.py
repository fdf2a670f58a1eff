"""Text → tokens. Whatever a text says is text: its `</s>` ends nothing, unless that is asked for.

Knows tokenizers; knows no model.
"""

import copy
import json
import secrets
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from knnlm.errors import InvalidArgumentError


class Encoder:
    """Turns texts into tokens, adding no special tokens.

    Control tokens are a tokenizer's special tokens, and those of `end_tokens` that were added to
    its vocabulary. Other added tokens are ordinary vocabulary.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.controls = {
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if (added.special or token in end_tokens or token in tokenizer.all_special_ids)
            and token != tokenizer.unk_token_id  # it also stands for what the vocabulary lacks
        }
        """The control tokens' names, by token id."""
        self._for_text = tokenizer
        names = [text for name in self.controls.values() for text in (name, f"a{name} {name} a")]
        found = encode_as_is(tokenizer, names, control_tokens=False) if names else []
        if tokenizer.is_fast and not self.controls.keys().isdisjoint(chain.from_iterable(found)):
            # the vocabulary itself has them, as in Unigram models: there they need other names
            self._for_text = with_other_names(tokenizer, private_names(self.controls))

    def encode(self, texts: list[str], control_tokens: bool = False) -> list[list[int]]:
        """Return the tokens of each text.

        control_tokens: whether `</s>` and the like in a text are control tokens instead of text.
        Raises InvalidArgumentError for a text that UTF-8 cannot hold.
        """
        for text in texts:
            check_text("text", text)
        tokenizer = self.tokenizer if control_tokens else self._for_text
        return encode_as_is(tokenizer, texts, control_tokens)


def check_text(argument: str, text: str) -> None:
    """Raise InvalidArgumentError, naming the argument, for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{argument} must be text in UTF-8, but character {error.start} is "
            f"{text[error.start]!a}, got {text[max(0, error.start - 20) : error.end]!a}: correct it"
        ) from error


def encode_as_is(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], control_tokens: bool
) -> list[list[int]]:
    """Return a tokenizer's own tokens of each text, no special tokens added."""
    tokens: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=not control_tokens,
        verbose=False,
    )["input_ids"]
    return tokens


def private_names(controls: Mapping[int, str]) -> dict[str, str]:
    """Return another name for each control token, which no text has: it cannot be guessed."""
    nonce = secrets.token_hex(8)
    return {name: f"\U0010ffff{nonce}{token}\U0010ffff" for token, name in controls.items()}


def with_other_names(
    tokenizer: PreTrainedTokenizerBase, renamed: Mapping[str, str]
) -> PreTrainedTokenizerBase:
    """Return a copy of a fast tokenizer in which some tokens have other names."""
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for added in described["added_tokens"]:
        added["content"] = renamed.get(added["content"], added["content"])
    model = described["model"]
    if (unknown := model.get("unk_token")) is not None:
        model["unk_token"] = renamed.get(unknown, unknown)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): token for name, token in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if renamed.keys().isdisjoint([*pair, "".join(pair)])
        ]
    copied = copy.copy(tokenizer)
    copied._tokenizer = Tokenizer.from_str(json.dumps(described))
    return copied
