"""The continuous cache of an attached model: it follows the sequences that the model reads.

A sequence is identified by the model's own cache (`past_key_values`): when that is rewound,
repeated or reordered, so is the continuous cache.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.errors import UnsupportedModelError
from knnlm.mixture.continuous_cache import CacheView, ContinuousCache
from knnlm.retrieval.mixer import Mixer


class SequenceCaches:
    """A continuous cache for each batch of sequences that the model is reading."""

    def __init__(self, mixer: Mixer, name: str) -> None:
        self._mixer = mixer
        self._name = name
        self._caches: WeakKeyDictionary[Any, ContinuousCache] = WeakKeyDictionary()

    def read(
        self,
        given: dict[str, Any],
        output: Any,
        keys: Float[Tensor, "batch time dim"],
    ) -> CacheView:
        """Take in the positions that a forward pass read; return their view of the cache.

        given: the pass's arguments. Raises UnsupportedModelError if they do not tell the sequence.
        """
        inputs = given.get("input_ids")
        if inputs is None:
            raise UnsupportedModelError(
                f"the continuous cache must see token ids, but {self._name} was given "
                "inputs_embeds: pass input_ids, or attach without a cache"
            )
        time = inputs.shape[1]
        past = getattr(output, "past_key_values", given.get("past_key_values"))
        start = 0  # positions that were read before this pass
        if past is not None:
            start = int(past.get_seq_length()) - time
        elif getattr(output, "cache_params", None) is not None:
            raise UnsupportedModelError(
                f"the continuous cache must know how far a sequence was read, and the state of "
                f"{self._name} does not tell: pass use_cache=False, or attach without a cache"
            )
        cache = self._cache_at(past, start, keys)
        mask = given.get("attention_mask")
        real = None
        if mask is not None and mask.dim() == 2:
            real = mask[:, start : start + time].to(keys.device, torch.bool)
        return cache.read(inputs.to(keys.device), keys, real)

    def _cache_at(
        self, past: Any, start: int, keys: Float[Tensor, "batch time dim"]
    ) -> ContinuousCache:
        """Return the cache for the sequences in `past`, rewound to the position `start`."""
        known = None if past is None else self._caches.get(past)
        if start == 0 or known is None:
            cache = self._mixer.new_cache(keys, start)
            if past is not None:
                self._caches[past] = cache
                if known is None:
                    self._follow(past)
            return cache
        if known.batch != len(keys):
            raise UnsupportedModelError(
                f"the continuous cache followed {known.batch} sequences of {self._name}, got "
                f"{len(keys)}: use another way to generate, or attach without a cache"
            )
        known.rewind(known.position - start)
        return known

    def _follow(self, past: Any) -> None:
        """Reorder a continuous cache whenever a beam search reorders the model's."""
        reorder_model, caches = past.reorder_cache, self._caches

        def reorder(beam_idx: Tensor) -> None:
            reorder_model(beam_idx)
            caches[past].reorder(beam_idx)

        past.reorder_cache = reorder
