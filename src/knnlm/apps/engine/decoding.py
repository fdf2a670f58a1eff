"""The model's forward passes for many sequences: prompts one by one, then all of them together.

Knows the model, its cache and token ids. Knows no datastore, no job and no text.
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
    """Some positions that the model has read: their keys, and log p_LM of each next token."""

    keys: Float[Tensor, "position dim"]
    log_probs: Float[Tensor, "position vocab"]


@dataclass(slots=True)
class CachedSequences:
    """Sequences that the model has read, as its cache holds them: padded on the left.

    mask: 1 where there is a token. cache: the model's own; of an unknown type where sequences
    cannot share a batch, and the tokens themselves where the model has none.
    """

    mask: Int[Tensor, "sequence time"]
    cache: Any


class Decoder:
    """Runs one model, whose keys `captured` records, for one thread.

    With models that only have attention, sequences of any lengths share one batch. With others
    (Mamba and its hybrids) they are read one by one, because their states do not allow padding.
    Models without a cache that is handed over (RWKV, RecurrentGemma, GPT-1) read all again.
    """

    def __init__(self, lm: LanguageModel, captured: KeyCapture) -> None:
        self._lm = lm
        self._captured = captured
        accepted = inspect.signature(lm.model.forward).parameters
        self._use_cache = {"use_cache": True} if "use_cache" in accepted else {}
        with torch.inference_mode():  # some accept a cache and return none
            start = torch.tensor([[lm.start_token]], device=lm.device)
            output = lm.model(input_ids=start, **self._use_cache)
        names = [name for name in ("cache_params", "past_key_values") if name in output]
        self._cache_name = names[0] if names else None
        self._takes_positions = "position_ids" in accepted
        self._can_skip_logits = "logits_to_keep" in accepted
        layers = DynamicCache(config=lm.model.config).layers
        self.shares_batches = self._cache_name == "past_key_values" and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
        )
        """Whether `join` can batch sequences, and `read` can continue one by several tokens."""

    def read(
        self, tokens: Int[Tensor, " time"], before: CachedSequences | None, keep: int
    ) -> tuple[Step, CachedSequences]:
        """Read the next tokens of one prompt; return the last `keep` positions."""
        read = 0 if before is None else before.mask.shape[1]
        mask = torch.ones(1, read + len(tokens), dtype=torch.int64)
        cache = None if before is None else before.cache
        if cache is None and self.shares_batches:
            # full layers even if the model's attention slides: they can be padded and joined
            cache = DynamicCache()
        keys, logits, cache = self._forward(tokens[None], mask, cache, keep)
        step = Step(keys[0, -keep:], torch.log_softmax(logits[0, -keep:], dim=-1))
        return step, CachedSequences(mask, cache)

    def advance(
        self, tokens: Sequence[int], batch: CachedSequences
    ) -> tuple[Step, CachedSequences]:
        """Read one more token of every sequence."""
        column = torch.tensor(tokens, dtype=torch.int64)[:, None]
        mask = torch.cat([batch.mask, torch.ones_like(column)], dim=1)
        keys, logits, cache = self._forward(column, mask, batch.cache, 1)
        step = Step(keys[:, -1], torch.log_softmax(logits[:, -1], dim=-1))
        return step, CachedSequences(mask, cache)

    def _forward(
        self,
        tokens: Int[Tensor, "sequence new"],
        mask: Int[Tensor, "sequence time"],
        cache: Any,
        keep: int,
    ) -> tuple[Float[Tensor, "sequence new dim"], Float[Tensor, "sequence kept vocab"], Any]:
        device = self._lm.device
        new = tokens.shape[1]
        if self._cache_name is not None:
            options: dict[str, Any] = {self._cache_name: cache, **self._use_cache}
        else:
            options = dict.fromkeys(self._use_cache, False)
            tokens = tokens if cache is None else torch.cat([cache, tokens], dim=1)
        if self.shares_batches:  # sequences that are read one by one have no padding
            options["attention_mask"] = mask.to(device)
        if self._takes_positions:
            positions = mask.cumsum(dim=1)[:, -tokens.shape[1] :] - 1
            options["position_ids"] = positions.to(device)
        if self._can_skip_logits:
            options["logits_to_keep"] = keep
        with torch.inference_mode():
            output = self._lm.model(input_ids=tokens.to(device), **options)
        keys = self._captured.keys.to(device).float()[:, -new:]
        cache = tokens if self._cache_name is None else getattr(output, self._cache_name)
        return keys, output.logits.float(), cache

    def join(self, parts: Sequence[CachedSequences]) -> CachedSequences:
        """Join several batches into one; needs `shares_batches`."""
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
        return CachedSequences(torch.cat(masks), joined)

    def select(self, batch: CachedSequences, sequences: Sequence[int]) -> CachedSequences:
        """Select some sequences (or one several times); drop columns that are padding in all.

        Needs `shares_batches`. (`Cache.batch_select_indices` works in place and keeps every column:
        then a batch never gets shorter than the longest sequence it ever had.)
        """
        chosen = list(sequences)
        mask = batch.mask[chosen]
        first = int(mask.argmax(dim=1).min())
        selected = DynamicCache()
        for number, layer in enumerate(batch.cache.layers):
            keys, values = layer.keys[chosen], layer.values[chosen]
            selected.update(keys[..., first:, :], values[..., first:, :], number)
        return CachedSequences(mask[:, first:], selected)


def _padded(states: Float[Tensor, "sequence head time dim"], time: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, time - states.shape[-2], 0))
