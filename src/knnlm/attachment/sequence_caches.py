"""The continuous cache of an attached model: it follows the sequences that the model reads.

A sequence is known by the model's own cache (`past_key_values`): what that forgets, repeats or puts
into another order is done to the continuous cache too.
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
    """A continuous cache for each batch of sequences that is being read."""

    def __init__(self, mixer: Mixer, name: str) -> None:
        self._mixer = mixer
        self._name = name
        self._caches: WeakKeyDictionary[Any, ContinuousCache] = WeakKeyDictionary()

    def recall(
        self,
        given: dict[str, Any],
        output: Any,
        keys: Float[Tensor, "batch time dim"],
    ) -> CacheView:
        """Take in what a forward pass has read; return what its positions remember.

        given: the pass's arguments. Raises UnsupportedModelError where it cannot be followed.
        """
        inputs = given.get("input_ids")
        if inputs is None:
            raise UnsupportedModelError(
                f"the continuous cache must see token ids, but {self._name} was given "
                "inputs_embeds: pass input_ids, or attach without a cache"
            )
        time = inputs.shape[1]
        past = getattr(output, "past_key_values", given.get("past_key_values"))
        read = 0
        if past is not None:
            read = int(past.get_seq_length()) - time
        elif getattr(output, "cache_params", None) is not None:
            raise UnsupportedModelError(
                f"the continuous cache must know how far a sequence was read, and the state of "
                f"{self._name} does not tell: pass use_cache=False, or attach without a cache"
            )
        cache = self._of(past, read, keys)
        mask = given.get("attention_mask")
        real = None
        if mask is not None and mask.dim() == 2:
            real = mask[:, read : read + time].to(keys.device, torch.bool)
        return cache.read(inputs.to(keys.device), keys, real)

    def _of(self, past: Any, read: int, keys: Float[Tensor, "batch time dim"]) -> ContinuousCache:
        """Return the cache of the sequences that `past` holds, rewound to what was read."""
        known = None if past is None else self._caches.get(past)
        if read == 0 or known is None:
            cache = self._mixer.new_cache(keys, read)
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
        known.rewind(known.position - read)
        return known

    def _follow(self, past: Any) -> None:
        """Reorder a continuous cache whenever a beam search reorders the model's."""
        reorder_model, caches = past.reorder_cache, self._caches

        def reorder(beam_idx: Tensor) -> None:
            reorder_model(beam_idx)
            caches[past].reorder(beam_idx)

        past.reorder_cache = reorder
