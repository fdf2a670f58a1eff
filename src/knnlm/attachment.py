"""The mixture inside an unmodified Hugging Face model: whatever reads its logits reads that.

`generate()`, pipelines, `Trainer.evaluate` and evaluation harnesses work as they did; the model's
class, signature and weights stay as they are.
"""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from knnlm.datastore.datastore import Datastore
from knnlm.errors import AttachmentError
from knnlm.index.protocol import Index
from knnlm.keyed_model import KeyedModel
from knnlm.memory import ForEach, Memory, as_stores, mix, open_memories

_ATTACHED: WeakSet[nn.Module] = WeakSet()


class Attachment:
    """Memories in a model, until `detach` or the end of the `with` block.

    After every forward pass the model's logits are log-probabilities of the mixture, float32, for
    the positions that the pass keeps (`logits_to_keep`), and only these are searched; the loss, if
    labels are given, is the mixture's. Gradients reach the model through p_LM; neighbors are
    constants. Where every λ is 0, outputs are the model's own, to the bit.

    Raises AttachmentError if the model already has an attachment.
    """

    def __init__(self, keyed: KeyedModel, memories: Sequence[Memory]) -> None:
        self.model: PreTrainedModel = keyed.model
        self.memories = memories
        if self.model in _ATTACHED:
            raise AttachmentError(
                f"model {keyed.name!r} already has a datastore attached: detach that first, or "
                "attach several at once with attach(model, [store, other])"
            )
        self._keyed = keyed
        self._signature = inspect.signature(self.model.forward)
        self._hooks = ExitStack()
        self._captured = self._hooks.enter_context(keyed.capture())
        hook = self.model.register_forward_hook(
            torch.compiler.disable(self._mix_output),  # type: ignore[no-untyped-call]
            with_kwargs=True,
        )
        self._hooks.callback(hook.remove)
        self.attached = True
        _ATTACHED.add(self.model)

    def detach(self) -> None:
        """Leave the model as it was; raises AttachmentError if that was done before."""
        if not self.attached:
            raise AttachmentError(
                f"the datastore was already detached from model {self._keyed.name!r}; attach again "
                "with knnlm.attach(model, store)"
            )
        self._hooks.close()
        _ATTACHED.discard(self.model)
        self.attached = False

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *raised: object) -> None:
        if self.attached:
            self.detach()

    def _mix_output(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not any(memory.counts for memory in self.memories):
            return output
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        # a tuple holds the losses first, which have no dimensions
        place = None if hasattr(output, "logits") else _first_with_three_dimensions(output)
        logits: Tensor = output.logits if place is None else output[place]
        mixed = self._mix(logits, given.get("logits_to_keep", 0))
        labels = given.get("labels")
        if place is None:
            if labels is not None:
                aux_loss = getattr(output, "aux_loss", None)
                output.loss = _loss(model, given, logits, mixed, output.loss, aux_loss)
            output.logits = mixed
            return output
        parts = list(output)
        parts[place] = mixed
        if labels is not None:
            aux_loss = parts[1] if place == 2 else None
            parts[0] = _loss(model, given, logits, mixed, parts[0], aux_loss)
        return tuple(parts)

    def _mix(
        self, logits: Float[Tensor, "batch kept vocab"], logits_to_keep: int | Tensor
    ) -> Float[Tensor, "batch kept vocab"]:
        keys = self._captured.keys
        if logits.shape[1] != keys.shape[1]:
            keys = slice_logits_to_keep(keys, logits_to_keep)
        lm_log_probs = torch.log_softmax(logits.float(), dim=-1)
        mixed = mix(self.memories, keys.flatten(0, 1).to(logits.device), lm_log_probs.flatten(0, 1))
        return mixed.reshape(lm_log_probs.shape)


def attach(
    model: PreTrainedModel,
    store: Datastore | Sequence[Datastore],
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
    index: ForEach[Index] = None,
) -> Attachment:
    """Let an unmodified HF causal LM answer with the kNN-LM's mixture.

        with knnlm.attach(model, store):
            model.generate(**inputs)

    store: one datastore, or several whose λ add up to at most 1; then k, lmbda, temperature and
    index are one value for all or a sequence with one for each. By default they are what `tune`
    stored with the datastore, else the paper's. Outside a `with` block, call the attachment's
    `detach()`.

    The tokenizer is not seen, so not checked: use the one that the datastore was built with. Raises
    DatastoreMismatchError for a datastore of another model, AttachmentError if one is attached
    already, InvalidArgumentError.
    """
    stores = as_stores(store)
    keyed = KeyedModel(model, key=stores[0].settings.key)
    memories = open_memories(keyed, stores, k=k, lmbda=lmbda, temperature=temperature, index=index)
    return Attachment(keyed, memories)


def _first_with_three_dimensions(output: tuple[Any, ...]) -> int:
    return next(
        place for place, part in enumerate(output) if isinstance(part, Tensor) and part.dim() == 3
    )


def _loss(
    model: Any,
    given: dict[str, Any],
    logits: Tensor,
    mixed: Tensor,
    loss: Tensor,
    aux_loss: Tensor | None,
) -> Tensor:
    """Return the mixture's loss, reduced and shifted as the model reduces and shifts its own."""
    names = ("num_items_in_batch", "shift_labels", "ignore_index")
    options = {name: given[name] for name in names if name in given}

    def of(some_logits: Tensor) -> Tensor:
        result: Tensor = model.loss_function(
            logits=some_logits, labels=given["labels"], vocab_size=logits.shape[-1], **options
        )
        return result

    if aux_loss is None:
        return of(mixed)
    return of(mixed) + (loss - of(logits))  # what a mixture of experts adds for its routing
