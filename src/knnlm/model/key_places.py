"""Finds where in a Hugging Face model a key is read, without a table of architectures.

Knows modules, their names and one trial forward pass. Knows no tokenizer, no text, no file.

The last layer is the last of the decoder's list of `num_hidden_layers` modules; its feed-forward
and attention blocks have one of a few customary names; the norm before a block is the module whose
output is, bit for bit, what the block reads.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from knnlm.choices import Key
from knnlm.errors import UnsupportedModelError

_FEED_FORWARD_NAMES = (
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
    "mlp_block",
    "fc1",
    "intermediate",
)
_ATTENTION_NAMES = (
    "self_attn",
    "attention",
    "attn",
    "self_attention",
    "linear_attn",
    "mixer",
    "mamba",
    "temporal_block",
    "conv",
)
_NOTHING_BUT_A_MIXER = "its layers are one mixer and have no feed-forward block"


@dataclass(frozen=True)
class Tap:
    """One place where a key can be read: a module's input or its output."""

    module: nn.Module
    side: Literal["input", "output"]

    def hook(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `receive` with the tensor of every forward pass until the handle is removed."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(
                lambda _, args, kwargs: receive(_first_input(args, kwargs)), with_kwargs=True
            )
        return self.module.register_forward_hook(
            lambda _, __, output: receive(_first_output(output))
        )


@dataclass(frozen=True)
class KeyPlaces:
    """A model's taps by key choice, and the reasons why it lacks the others."""

    taps: dict[str, Tap]
    reasons: dict[str, str]

    def resolve(self, key: str) -> str:
        """Return the choice in effect for `key`; raises UnsupportedModelError if there is none.

        A layer that consists of one mixer (Mamba) has no feed-forward block; there the default,
        `ffn_input`, becomes the mixer's input, `attention_input`.
        """
        if key in self.taps:
            return key
        if key == "ffn_input" and self.reasons[key] == _NOTHING_BUT_A_MIXER:
            return "attention_input"
        raise UnsupportedModelError(
            f"key={key!r} is not available in this model: {self.reasons[key]}; "
            f"choose one of {', '.join(self.taps)}"
        )


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that ends before its head.

    What models call their decoder may be all of the model (Llama 4's for text) or a part of the
    head (ModernBERT's decoder). Raises UnsupportedModelError if there is no such part.
    """
    decoders = (model.get_decoder(), model.base_model)
    with_layers = (one for one in decoders if _layers(model, one) is not None)
    decoder: nn.Module = next(with_layers, decoders[0])
    head, layers = model.get_output_embeddings(), _layers(model, decoder)
    while head is not None and layers is not None and _contains(decoder, head):
        decoder = next(child for child in decoder.children() if _contains(child, layers))
        if decoder is layers:
            raise UnsupportedModelError(
                f"a {type(model).__name__} must have a decoder apart from its head, but its layers "
                "are the head's siblings; choose another model"
            )
    return decoder


def find_key_places(model: PreTrainedModel, probe: Int[Tensor, "batch time"]) -> KeyPlaces:
    """Find every key choice that `model` has, with one forward pass over a few tokens."""
    decoder = find_decoder(model)
    taps = {"output_after_norm": Tap(decoder, "output")}
    layers = _layers(model, decoder)
    if layers is None:
        reason = "its decoder has no list of num_hidden_layers layers"
        return KeyPlaces(taps, {key: reason for key in Key if key not in taps})
    layer = layers[-1]
    taps["output"] = Tap(layer, "output")
    attention = _child(layer, _ATTENTION_NAMES)
    feed_forward = _child(layer, _FEED_FORWARD_NAMES)

    reasons: dict[str, str] = {}
    if attention is None:
        reason = f"its last layer has none of {', '.join(_ATTENTION_NAMES)}"
        reasons |= {"attention_input": reason, "attention_input_before_norm": reason}
    else:
        taps["attention_input"] = Tap(attention, "input")
        taps["attention_input_before_norm"] = Tap(layer, "input")
    if feed_forward is None:
        reason = f"its last layer has none of {', '.join(_FEED_FORWARD_NAMES)}"
        others = [child for child in layer.children() if child is not attention]
        if attention is not None and all(map(_holds_no_matrix, others)):
            reason = _NOTHING_BUT_A_MIXER
        reasons |= {"ffn_input": reason, "ffn_input_before_norm": reason}
    else:
        taps["ffn_input"] = Tap(feed_forward, "input")
        taps["ffn_input_before_norm"] = Tap(
            _norm_before(feed_forward, layer, decoder, probe) or feed_forward, "input"
        )
    return KeyPlaces({key: taps[key] for key in Key if key in taps}, reasons)


class KeyCapture:
    """The keys of the most recent forward pass, for the thread that ran it.

    on_keys: called with them as soon as the decoder is done, before the model's head.
    """

    def __init__(self, on_keys: Callable[[Tensor], None] | None = None) -> None:
        self._local = threading.local()
        self._on_keys = on_keys

    @property
    def keys(self) -> Float[Tensor, "batch time dim"]:
        """The keys, where and in the precision that the model computed them."""
        keys: Tensor | None = getattr(self._local, "keys", None)
        if keys is None:
            raise UnsupportedModelError(
                "no key was captured: the model's forward pass did not reach the module that the "
                "key is read from; choose another key, such as key='output_after_norm', or, if the "
                "model had been compiled, call torch.compiler.reset() first"
            )
        return keys

    def _passing(self, key: Tensor) -> None:
        self._local.passing = key.detach()

    def _decoded(self, hidden_states: Tensor) -> None:
        # Some blocks see the batch flattened to (batch · time, dim): the decoder's output tells its
        # shape.
        passing: Tensor | None = getattr(self._local, "passing", None)
        if passing is not None:
            self._local.keys = passing.reshape(*hidden_states.shape[:2], -1)
            self._local.passing = None
            if self._on_keys is not None:
                self._on_keys(self._local.keys)


@contextmanager
def capture_keys(
    decoder: nn.Module, tap: Tap, on_keys: Callable[[Tensor], None] | None = None
) -> Iterator[KeyCapture]:
    """Record the tensors at `tap` in every forward pass of `decoder` inside the `with` block."""
    capture = KeyCapture(on_keys)
    with ExitStack() as hooks:
        hooks.callback(tap.hook(capture._passing).remove)
        hooks.callback(Tap(decoder, "output").hook(capture._decoded).remove)
        yield capture


def _layers(model: PreTrainedModel, decoder: nn.Module) -> nn.ModuleList | None:
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return None


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(other is part for other in module.modules())


def _child(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = (getattr(layer, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)


def _holds_no_matrix(module: nn.Module) -> bool:
    return all(parameter.dim() <= 1 for parameter in module.parameters())


def _norm_before(
    block: nn.Module, layer: nn.Module, decoder: nn.Module, probe: Tensor
) -> nn.Module | None:
    """Return the norm in `layer` whose output `block` reads, or None if it reads an un-normed one.

    In parallel-residual models the norm reads the layer's input, possibly for attention as well.
    """
    block_inputs: list[Tensor] = []
    passages: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        output = _first_output(out)
        if isinstance(output, Tensor):
            # Copies, because later blocks may add to the residual stream in place.
            passages.append((module, _first_input(args, kwargs).clone(), output.clone()))

    with ExitStack() as hooks:
        hooks.callback(
            Tap(block, "input").hook(lambda key: block_inputs.append(key.clone())).remove
        )
        for module in layer.modules():
            if _holds_no_matrix(module):
                hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        decoder(input_ids=probe, use_cache=False)
    if not block_inputs:
        return None
    for module, before, after in passages:
        # A module that returns its own input, as dropout does here, is not a norm.
        if _same_values(after, block_inputs[-1]) and not _same_values(before, after):
            return module
    return None


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next(value for value in given if isinstance(value, Tensor))


def _first_output(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]
