"""The model's forward passes for many completions at once: prompts one by one, then together.

Knows the model, its cache and token ids. Knows no datastore, no request and no text.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from knnlm.model.key_places import KeyCapture
from knnlm.model.language_model import LanguageModel


class Step(NamedTuple):
    """What the model says after some positions: their keys, and the log p_LM of what follows."""

    keys: Float[Tensor, "position dim"]
    log_probs: Float[Tensor, "position vocab"]


@dataclass(slots=True)
class Cached:
    """Rows of tokens that the model has read, as its cache holds them: padded on the left.

    mask: 1 where there is a token. cache: the model's own, of an unknown kind where rows cannot be
    put together.
    """

    mask: Int[Tensor, "row time"]
    cache: Any

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.mask)


class Decoder:
    """Runs one model, whose keys `captured` records, for one thread.

    Rows of models with nothing but attention share one batch, whatever their lengths; those of
    others (Mamba and its hybrids) are read one by one, since their states know no padding.
    """

    def __init__(self, lm: LanguageModel, captured: KeyCapture) -> None:
        self._lm = lm
        self._captured = captured
        accepted = inspect.signature(lm.model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        self._takes_positions = "position_ids" in accepted
        self._can_skip_logits = "logits_to_keep" in accepted
        layers = DynamicCache(config=lm.model.config).layers
        self.shares_batches = self._cache_name == "past_key_values" and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
        )
        """Whether `join` can put rows together, and `read` go on with several tokens at once."""

    def read(
        self, tokens: Int[Tensor, " time"], before: Cached | None, keep: int
    ) -> tuple[Step, Cached]:
        """Read the next tokens of one prompt; return the last `keep` positions."""
        read = 0 if before is None else before.mask.shape[1]
        mask = torch.ones(1, read + len(tokens), dtype=torch.int64)
        cache = None if before is None else before.cache
        if cache is None and self.shares_batches:
            # full layers, also where the model's attention slides: those can be padded and joined
            cache = DynamicCache()
        keys, logits, cache = self._forward(tokens[None], mask, cache, keep)
        step = Step(keys[0, -keep:], torch.log_softmax(logits[0, -keep:], dim=-1))
        return step, Cached(mask, cache)

    def advance(self, tokens: Sequence[int], batch: Cached) -> tuple[Step, Cached]:
        """Read one more token of every row."""
        column = torch.tensor(tokens, dtype=torch.int64)[:, None]
        mask = torch.cat([batch.mask, torch.ones_like(column)], dim=1)
        keys, logits, cache = self._forward(column, mask, batch.cache, 1)
        step = Step(keys[:, -1], torch.log_softmax(logits[:, -1], dim=-1))
        return step, Cached(mask, cache)

    def _forward(
        self, tokens: Int[Tensor, "row new"], mask: Int[Tensor, "row time"], cache: Any, keep: int
    ) -> tuple[Float[Tensor, "row new dim"], Float[Tensor, "row kept vocab"], Any]:
        device = self._lm.device
        options: dict[str, Any] = {self._cache_name: cache}
        if self.shares_batches:  # rows read one by one have no padding to tell of
            options["attention_mask"] = mask.to(device)
        if self._takes_positions:
            positions = mask.cumsum(dim=1)[:, -tokens.shape[1] :] - 1
            options["position_ids"] = positions.to(device)
        if self._can_skip_logits:
            options["logits_to_keep"] = keep
        with torch.inference_mode():
            output = self._lm.model(input_ids=tokens.to(device), use_cache=True, **options)
        keys = self._captured.keys.to(device).float()
        return keys, output.logits.float(), getattr(output, self._cache_name)

    def join(self, parts: Sequence[Cached]) -> Cached:
        """Put rows of several batches into one; needs `shares_batches`."""
        longest = max(part.mask.shape[1] for part in parts)
        joined = DynamicCache()
        for number in range(len(parts[0].cache.layers)):
            layers = [part.cache.layers[number] for part in parts]
            joined.update(
                torch.cat([_padded(layer.keys, longest) for layer in layers]),
                torch.cat([_padded(layer.values, longest) for layer in layers]),
                number,
            )
        masks = [
            torch.nn.functional.pad(part.mask, (longest - part.mask.shape[1], 0)) for part in parts
        ]
        return Cached(torch.cat(masks), joined)

    def keep(self, batch: Cached, rows: Sequence[int]) -> Cached:
        """Keep some rows (or one of them several times), and no column that is padding in all.

        Needs `shares_batches`.
        """
        mask = batch.mask[list(rows)]
        first = int(mask.argmax(dim=1).min())
        kept = DynamicCache()
        for number, layer in enumerate(batch.cache.layers):
            keys, values = layer.keys[list(rows)], layer.values[list(rows)]
            kept.update(keys[..., first:, :], values[..., first:, :], number)
        return Cached(mask[:, first:], kept)


def _padded(states: Float[Tensor, "row head time dim"], time: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, time - states.shape[-2], 0))
