"""Text → tokens. Whatever a text says is text: its `</s>` ends nothing, unless that is asked for.

Knows tokenizers; knows no model.
"""

import copy
import json
from collections.abc import Collection
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
        self._controls = {
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if (added.special or token in end_tokens or token in tokenizer.all_special_ids)
            and token != tokenizer.unk_token_id  # it also stands for what the vocabulary lacks
        }
        self._for_text = tokenizer
        names = [text for name in self._controls.values() for text in (name, f"a{name} {name} a")]
        found = _encode(tokenizer, names, control_tokens=False) if names else []
        if tokenizer.is_fast and not self._controls.keys().isdisjoint(chain.from_iterable(found)):
            # the vocabulary itself has them, as in Unigram models: there they need other names
            self._for_text = copy.copy(tokenizer)
            self._for_text._tokenizer = _rename(tokenizer.backend_tokenizer, self._controls)

    def encode(self, texts: list[str], control_tokens: bool = False) -> list[list[int]]:
        """Return the tokens of each text.

        control_tokens: whether `</s>` and the like in a text are control tokens instead of text.
        Raises InvalidArgumentError for a text that UTF-8 cannot hold.
        """
        for text in texts:
            check_text("text", text)
        return _encode(self.tokenizer if control_tokens else self._for_text, texts, control_tokens)


def check_text(argument: str, text: str) -> None:
    """Raise InvalidArgumentError, naming the argument, for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{argument} must be text in UTF-8, but character {error.start} is "
            f"{text[error.start]!a}, got {text[max(0, error.start - 20) : error.end]!a}: correct it"
        ) from error


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], control_tokens: bool
) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=not control_tokens,
        verbose=False,
    )["input_ids"]
    return tokens


def _rename(tokenizer: Tokenizer, names: dict[int, str]) -> Tokenizer:
    """Return a copy in which the tokens `names` have names that no text has."""
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    renamed = {name: f"\U0010ffff{token}\U0010ffff" for token, name in names.items()}
    for added in described["added_tokens"]:
        added["content"] = renamed.get(added["content"], added["content"])
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): token for name, token in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if renamed.keys().isdisjoint([*pair, "".join(pair)])
        ]
    return Tokenizer.from_str(json.dumps(described))
