"""A Hugging Face causal language model whose keys can be read: token ids to keys and logits.

Knows transformers and tensors. Knows no tokenizer, no datastore, no neighbor.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from knnlm.choices import Key, parse_choice
from knnlm.errors import UnsupportedModelError
from knnlm.model.key_places import KeyCapture, capture_keys, find_decoder, find_key_places
from knnlm.model.reading_rules import (
    BatchRules,
    CacheRules,
    Pass,
    agree,
    find_cache_rules,
    find_frequency_limit,
    is_future_seen,
    probe_tokens,
    read_alone,
)
from knnlm.model.wrapped import has_adapter, is_compiled, original_name, unwrap

_CACHE_RULES: WeakKeyDictionary[PreTrainedModel, dict[str, CacheRules]] = WeakKeyDictionary()
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
    A model that torch.compile, DataParallel or PEFT has wrapped is taken out of its wrapper.

    Raises UnsupportedModelError, and InvalidArgumentError for what holds no model.
    """

    def __init__(
        self, model: nn.Module, *, key: str = "ffn_input", name: str | None = None
    ) -> None:
        parse_choice(Key, "key", key)
        self.is_compiled: bool = is_compiled(model)
        """Whether torch.compile was applied to it or to a part of it."""
        self.model: PreTrainedModel = unwrap(model)
        self.name: str = name or self.model.name_or_path or type(self.model).__name__
        self.max_window: int | None = _max_window(self.model.config.get_text_config())
        """How many positions the model can read at once; None if there is no limit."""
        check_decoder_only(self.model.config, self.name)
        vocab_size: int = self.model.config.get_text_config().vocab_size
        self._probe = probe_tokens(vocab_size, self.max_window).to(self.device)
        with self._evaluating():
            logits = self._causal_logits()
            places = find_key_places(self.model, self._probe)
        self.key: str = places.resolve(key)
        """The key choice in effect, one of `Key`."""
        self._decoder: nn.Module = find_decoder(self.model)
        self._tap = places.taps[self.key]
        self._is_decoder_enough = True  # to compute keys
        self.batch_rules: BatchRules = BatchRules(True)
        keys = self.keys(self._probe)
        self.dimension: int = keys.shape[-1]
        """The dimension of a key; in some models not the hidden size."""
        self.vocab_size: int = logits.shape[-1]
        """The last dimension of the logits, which may exceed the tokenizer's vocabulary."""
        self.batch_rules = self._find_batch_rules(Pass(keys, logits, None))
        """Which texts may be read beside each other."""

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
        the padding, whose keys are to be ignored. See `batch_rules` for which rows may be so.
        Raises UnsupportedModelError where keys are numbers and what the model makes of them is not.
        """
        if len(tokens) > 1 and not self.batch_rules.batches:
            return torch.cat([self.keys(row) for row in torch.split(tokens, 1)])
        if self._is_decoder_enough:
            with self._evaluating(), self.capture() as captured:
                made = self._decoder(input_ids=tokens.to(self.device), use_cache=False)[0]
                keys = captured.keys.to(self.device)
        else:
            read = self._run(input_ids=tokens.to(self.device), use_cache=False)
            keys, made = read.keys, read.logits[..., 0]
        if bool(keys.isfinite().all()):  # whoever reads the others can say of what text they are
            self.check_numbers(made)
        return keys

    def keys_and_logits(self, tokens: Int[Tensor, "batch time"]) -> Reading:
        """Return keys and logits of every position from one forward pass; padding as in `keys`."""
        if len(tokens) > 1 and not self.batch_rules.batches:
            readings = [self.keys_and_logits(row) for row in torch.split(tokens, 1)]
            return Reading(
                torch.cat([reading.keys for reading in readings]),
                torch.cat([reading.logits for reading in readings]),
            )
        read = self._run(input_ids=tokens.to(self.device), use_cache=False)
        return Reading(read.keys, read.logits.float())

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
            digest.update(json.dumps([original_name(name), list(parameter.shape)]).encode())
            digest.update(rounded.astype("<f2").tobytes())
        return digest.hexdigest()

    def remedy_for_weights(self, dtype: str) -> str:
        """Say what to do about weights unlike a datastore's, built with a model in `dtype`."""
        own = str(self.dtype).removeprefix("torch.")
        if own != dtype and "float16" in (own, dtype):
            return (
                f"if it is the same model, {own} only rounds its weights differently than {dtype}: "
                f"load it with dtype {dtype}"
            )
        if has_adapter(self.model):
            return "load that model, take the adapter off this one"
        return "load that model"

    @property
    def cache_rules(self) -> CacheRules:
        """How a text may be continued from what earlier passes read; found at the first use."""
        known = _CACHE_RULES.setdefault(self.model, {})
        if self.key not in known:
            known[self.key] = find_cache_rules(self.model, self._run, self._probe[:1])
        return known[self.key]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Run without dropout and gradients, then restore the model's training mode."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with ExitStack() as contexts:
                if self.is_compiled:  # compiled code does not notice hooks that come and go
                    contexts.enter_context(torch.compiler.set_stance("force_eager"))
                contexts.enter_context(torch.inference_mode())
                yield
        finally:
            if training:
                self.model.train()

    def cache_options(self, positions: int, later: int) -> dict[str, Any]:
        """Return the options that `generate` needs for a text that grows this far."""
        grows = self.batch_rules.changes_between(positions, later)
        return {"use_cache": False} if grows or self.cache_rules.is_unreliable else {}

    def _run(self, **arguments: Any) -> Pass:
        with self._evaluating(), self.capture() as captured:
            output = self.model(**arguments)
            return Pass(captured.keys.to(self.device), output.logits, output)

    def _causal_logits(self) -> Float[Tensor, "2 time vocab"]:
        """Return the logits of the probe, having checked that they depend on the past only."""
        logits: Tensor | None = getattr(self.model(input_ids=self._probe), "logits", None)
        if logits is None or logits.dim() != 3:
            raise UnsupportedModelError(
                f"model {self.name!r} must have a language-modeling head, but is a "
                f"{type(self.model).__name__}; load it with AutoModelForCausalLM"
            )
        if is_future_seen(logits):
            if not torch.allclose(self.model(input_ids=self._probe).logits, logits, rtol=0.1):
                raise self._is_random()
            raise UnsupportedModelError(
                f"model {self.name!r} must be a causal language model, but a position's logits "
                "depend on later tokens, as in masked language models; choose a decoder-only model"
            )
        return logits

    def _find_batch_rules(self, together: Pass) -> BatchRules:
        """Compare what a text gets alone with what it got beside another, padded on the right.

        together: logits of the model and keys of its decoder alone.
        """
        limit = find_frequency_limit(self.model.config.get_text_config())
        alone = read_alone(self._run, self._probe)
        if agree(together.row(1, alone.keys.shape[1]), alone):
            return BatchRules(True, limit)
        if not agree(read_alone(self._run, self._probe), alone):
            raise self._is_random()
        whole = self._run(input_ids=self._probe, use_cache=False)
        self._is_decoder_enough = agree(together, whole)
        return BatchRules(agree(whole.row(1, alone.keys.shape[1]), alone), limit)

    def _is_random(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"model {self.name!r} must give a text the same keys and logits whenever it is read, "
            "but computes them with random numbers; choose another model"
        )


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
