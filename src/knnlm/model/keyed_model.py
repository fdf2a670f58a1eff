"""A Hugging Face causal language model whose keys can be read: token ids to keys and logits.

Knows transformers and tensors. Knows no tokenizer, no datastore, no neighbor.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from knnlm.choices import Key, parse_choice
from knnlm.errors import UnsupportedModelError
from knnlm.model.key_places import KeyCapture, capture_keys, find_key_places

_WINDOW_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_SAMPLE_SIZE = 1024


@dataclass(frozen=True)
class Reading:
    """The result of one forward pass: each position's key, and its logits for the next token."""

    keys: Float[Tensor, "batch time dim"]
    logits: Float32[Tensor, "batch time vocab"]


class KeyedModel:
    """A HF decoder-only causal LM, and the place in it where keys are read.

    `key` chooses the hidden state that is the key, one of `Key`; in models without a
    feed-forward block (Mamba) `ffn_input` becomes `attention_input`, the mixer's input, and the
    attribute `key` has the choice in effect. `name` is by default the model's own name or path.

    Raises UnsupportedModelError.
    """

    def __init__(
        self, model: PreTrainedModel, *, key: str = "ffn_input", name: str | None = None
    ) -> None:
        parse_choice(Key, "key", key)
        self.model = model
        self.name: str = name or model.name_or_path or type(model).__name__
        self.max_window: int | None = _max_window(model.config.get_text_config())
        """How many positions the model can read at once; None if there is no limit."""
        check_decoder_only(model.config, self.name)
        probe = self._probe()
        with _evaluating(self.model):
            logits = self._causal_logits(probe)
            places = find_key_places(model, probe)
        self.key: str = places.resolve(key)
        """The key choice in effect, one of `Key`."""
        self._decoder: nn.Module = model.get_decoder()
        self._tap = places.taps[self.key]
        self.dimension: int = self.keys(probe).shape[-1]
        """The dimension of a key; in some models not the hidden size."""
        self.vocab_size: int = logits.shape[-1]
        """The last dimension of the logits, which may exceed the tokenizer's vocabulary."""

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs, keys and logits."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def keys(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        """Return the key of every position, without running the LM head.

        No mask is needed for rows padded on the right: a causal model's real positions never see
        the padding, whose keys are to be ignored. Raises UnsupportedModelError where keys are
        numbers and what the model makes of them is not.
        """
        with _evaluating(self.model), self.capture() as captured:
            states = self._decoder(input_ids=tokens.to(self.device), use_cache=False)[0]
            keys = captured.keys.to(self.device)
        if bool(keys.isfinite().all()):  # whoever reads the others can say of what text they are
            self.check_numbers(states)
        return keys

    def keys_and_logits(self, tokens: Int[Tensor, "batch time"]) -> Reading:
        """Return keys and logits of every position from one forward pass; padding as in `keys`."""
        with _evaluating(self.model), self.capture() as captured:
            logits = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
            return Reading(captured.keys.to(self.device), logits.float())

    def log_probs(
        self, logits: Float[Tensor, "*position vocab"]
    ) -> Float32[Tensor, "*position vocab"]:
        """Return log p_LM, the log-softmax of the model's logits; raises UnsupportedModelError.

        Whatever reads several positions at once computes it here, so that NaN is never taken for
        a prediction.
        """
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        self.check_numbers(log_probs[..., 0])  # NaN anywhere is NaN in the whole row
        return log_probs

    def check_numbers(self, numbers: Tensor, *, finite: bool = False) -> None:
        """Refuse NaN among what the model has computed; raises UnsupportedModelError.

        finite: refuse infinities too, as in keys.
        """
        if bool(numbers.isnan().any()) or (finite and bool(numbers.isinf().any())):
            wrong = "NaN or infinity" if finite else "NaN"
            raise UnsupportedModelError(
                f"model {self.name!r} must give numbers, but gives {wrong} in {self.dtype}: load "
                "it in float32, or check its weights"
            )

    def capture(
        self, on_keys: Callable[[Tensor], None] | None = None
    ) -> AbstractContextManager[KeyCapture]:
        """Record the keys of any forward passes of `model` inside the `with` block.

        After each pass `.keys` has its (batch, time, dim), also in `generate`, where all but the
        first pass read one new position. on_keys: called with them before the model's head.
        """
        return capture_keys(self._decoder, self._tap, on_keys)

    @cached_property
    def weights_fingerprint(self) -> str:
        """SHA-256 over a sample of every weight tensor.

        A bfloat16 or float16 checkpoint has the same fingerprint in every precision it is loaded
        in, and a float32 checkpoint in float32 and bfloat16. Fine-tuning changes it.
        """
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise UnsupportedModelError(
                    f"the weights {name} must be in memory to take the model's fingerprint, but "
                    "are offloaded to disk; load the model without offloading"
                )
            flat = parameter.detach().flatten()
            # An odd stride does not stay in one column of a matrix.
            sample = flat[:: -(-len(flat) // _SAMPLE_SIZE) | 1]
            # Rounded to what all three precisions can hold.
            rounded = sample.to(torch.bfloat16).to(torch.float16).cpu().numpy()
            digest.update(json.dumps([name, list(parameter.shape)]).encode())
            digest.update(rounded.astype("<f2").tobytes())
        return digest.hexdigest()

    def _probe(self) -> Int[Tensor, "2 time"]:
        """Return two rows of a few tokens that differ in the last one."""
        vocab_size: int = self.model.config.get_text_config().vocab_size
        tokens = torch.arange(min(8, self.max_window or 8)).repeat(2, 1)
        tokens[1, -1] += 1
        return (tokens % vocab_size).to(self.device)

    def _causal_logits(self, probe: Int[Tensor, "2 time"]) -> Float[Tensor, "2 time vocab"]:
        """Return the logits of the probe, having checked that they depend on the past only."""
        logits: Tensor | None = getattr(self.model(input_ids=probe), "logits", None)
        if logits is None or logits.dim() != 3:
            raise UnsupportedModelError(
                f"model {self.name!r} must have a language-modeling head, but is a "
                f"{type(self.model).__name__}; load it with AutoModelForCausalLM"
            )
        one, other = logits[:, :-1].float()
        tolerance = 4 * torch.finfo(logits.dtype).eps * float(one.abs().max())
        if float((one - other).abs().max()) > tolerance:
            raise UnsupportedModelError(
                f"model {self.name!r} must be a causal language model, but a position's logits "
                "depend on later tokens, as in masked language models; choose a decoder-only model"
            )
        return logits


def check_decoder_only(config: Any, name: str) -> None:
    """Refuse an encoder-decoder; raises UnsupportedModelError."""
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"model {name!r} must be a decoder-only language model, but is an encoder-decoder "
            f"({config.model_type}); choose a causal language model"
        )


def _max_window(config: Any) -> int | None:
    if getattr(config, "alibi", False):
        return None
    limits = (getattr(config, name, None) for name in _WINDOW_NAMES)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run without dropout and gradients, then restore the model's training mode."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()
