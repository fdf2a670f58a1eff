"""Models inside wrappers: torch.compile, DataParallel, PEFT's adapters.

Knows the wrappers' attributes only, so that none of their packages is imported.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knnlm.errors import InvalidArgumentError, UnsupportedModelError

_ORIGINAL = "_orig_mod"  # what torch.compile calls the module that it wraps


def unwrap(model: Any) -> PreTrainedModel:
    """Return the transformers model in `model`, which may be wrapped several times.

    Raises InvalidArgumentError where there is none, and UnsupportedModelError where the wrapper
    changes what the model computes.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.DataParallel) and len(inner.device_ids) > 1:
            raise UnsupportedModelError(
                "model must compute on one device, but DataParallel splits each batch among "
                f"{len(inner.device_ids)}: give its .module"
            )
        if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                "model must read the tokens that it is given, but its PEFT adapter puts others "
                "before them: give a model without prompt learning"
            )
        parts = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
        if hasattr(inner, "get_base_model"):  # PEFT's
            parts = {_ORIGINAL: inner.get_base_model()}
        found = parts.get(_ORIGINAL, parts.get("module"))
        if found is None:
            raise InvalidArgumentError(
                f"model must be a transformers PreTrainedModel, got {type(model).__name__}: load "
                "it with AutoModelForCausalLM, or give a LanguageModel's .model"
            )
        inner = found
    return inner


def original_name(name: str) -> str:
    """Return the name of a parameter as it was before torch.compile wrapped a part of the model."""
    return ".".join(part for part in name.split(".") if part != _ORIGINAL)


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether PEFT has put an adapter beside some of the weights."""
    return any(".base_layer." in name for name, _ in model.named_parameters())


def is_compiled(model: Any) -> bool:
    """Whether torch.compile was applied to the model, its wrapper or a part of it."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return "torch._dynamo" in sys.modules and any(
        hasattr(module, _ORIGINAL)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in modules
    )


def forget_compiled_code() -> None:
    """Have everything that is compiled compiled again, with the hooks that modules have by then.

    Compiled code does not notice when hooks come or go.
    """
    torch.compiler.reset()
