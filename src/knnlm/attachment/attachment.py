"""The mixture inside an unmodified Hugging Face model: its logits become the mixture's.

`generate()`, pipelines, `Trainer.evaluate` and evaluation harnesses work as before; the model's
class, signature and weights stay as they are.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from knnlm.attachment.drafted import DraftedDecoding
from knnlm.attachment.sequence_caches import SequenceCaches
from knnlm.attachment.sequence_walks import SequenceWalks
from knnlm.errors import AttachmentError, UnsupportedModelError
from knnlm.index.protocol import Index
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.rows import select
from knnlm.model.decoding import Decoder
from knnlm.model.keyed_model import KeyedModel
from knnlm.model.wrapped import forget_compiled_code
from knnlm.retrieval.mixer import Mixer, Retrieved, open_mixer
from knnlm.retrieval.retriever import ForEach, GivenParameters, Stores, as_stores
from knnlm.retrieval.saved_searches import SavingRule, choose_saving
from knnlm.threads import BackgroundThread

_AHEAD = 4  # sequences; more keep all cores busy, so that searching during the head gains nothing
_ATTACHED: WeakSet[nn.Module] = WeakSet()


class Attachment:
    """A mixer in a model, until `detach` or the end of the `with` block.

    After every forward pass the model's logits are log-probabilities of the mixture, float32, for
    the positions that the pass keeps (`logits_to_keep`), and only these are searched for; if labels
    are given, the loss is the mixture's. Gradients reach the model through p_LM; neighbors are
    constants. Where every λ is 0, outputs are the model's own, to the bit. A forward pass raises
    UnsupportedModelError where the model gives NaN.

    Raises AttachmentError if the model already has an attachment.
    """

    def __init__(self, keyed: KeyedModel, mixer: Mixer, saving: SavingRule | None = None) -> None:
        self.model: PreTrainedModel = keyed.model
        self.mixer = mixer
        if self.model in _ATTACHED:
            raise AttachmentError(
                f"model {keyed.name!r} already has a datastore attached: detach that first, or "
                "attach several at once with attach(model, [store, other])"
            )
        self._keyed = keyed
        _ = keyed.cache_rules  # found by passes that the hooks below must not see
        self._signature = inspect.signature(self.model.forward)
        self._hooks = ExitStack()
        self._ahead = BackgroundThread()
        self._hooks.callback(self._ahead.close)
        self._pending = threading.local()
        begin = torch.compiler.disable(self._search_ahead)  # type: ignore[no-untyped-call]
        self._captured = self._hooks.enter_context(keyed.capture(begin))
        self._caches = SequenceCaches(mixer, keyed.name)
        self._walks = None if saving is None else SequenceWalks(mixer, saving, keyed.name)
        hook = self.model.register_forward_hook(
            torch.compiler.disable(self._mix_output),  # type: ignore[no-untyped-call]
            with_kwargs=True,
        )
        self._hooks.callback(hook.remove)
        if keyed.is_compiled:
            forget_compiled_code()
            self._hooks.callback(forget_compiled_code)
        self.coverage = 1.0
        """The least coverage of the searches so far; see `Neighbors`."""
        self.retrieved = Retrieved(())
        """What was found for the positions that the last pass kept, row by row."""
        self.attached = True
        _ATTACHED.add(self.model)

    @property
    def saves_searches(self) -> bool:
        """Whether some searches are saved: by pointers, or by a gate."""
        return self._walks is not None

    @property
    def searches_saved(self) -> float:
        """The share of the searches so far that were saved."""
        return 0.0 if self._walks is None else self._walks.saved

    def detach(self) -> None:
        """Leave the model as it was; raises AttachmentError if already detached."""
        if not self.attached:
            raise AttachmentError(
                f"the datastore was already detached from model {self._keyed.name!r}; attach again "
                "with knnlm.attach(model, store)"
            )
        self._hooks.close()
        _ATTACHED.discard(self.model)
        self.attached = False

    @contextmanager
    def reading_draft(self) -> Iterator[None]:
        """Tell that this thread's passes, meanwhile, keep every position that they read."""
        self._pending.draft = True
        try:
            yield
        finally:
            self._pending.draft = False

    @property
    def _reads_draft(self) -> bool:
        return getattr(self._pending, "draft", False)

    @cached_property
    def with_drafts(self) -> DraftedDecoding:
        """A loop for `generate(…, custom_generate=attachment.with_drafts)`: faster, no other words.

        See `DraftedDecoding`.
        """
        return DraftedDecoding(self, Decoder(self._keyed, self._captured))

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *raised: object) -> None:
        if self.attached:
            self.detach()

    def _search_ahead(self, keys: Float[Tensor, "batch time dim"]) -> None:
        """Begin searching for a few new positions while the model's head runs, which is slower."""
        self._pending.search = None
        sequences, width = keys.shape[:2]
        few = sequences <= _AHEAD if width == 1 else self._reads_draft and sequences == 1
        if few and keys.is_cpu and self.mixer.counts and self._walks is None:
            queries = keys.flatten(0, 1)
            self._pending.search = self._ahead.begin(lambda: self.mixer.search(queries))

    def _mix_output(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        self._check_reading(given, output)
        # a tuple holds the losses first, which have no dimensions
        place = None if hasattr(output, "logits") else _first_with_three_dimensions(output)
        logits: Tensor = output.logits if place is None else output[place]
        if not self.mixer.counts:
            self._keyed.check_numbers(logits.amax(dim=-1))
            return output
        mixed = self._mix(logits, given, output)
        labels = given.get("labels")
        if place is None:
            if labels is not None:
                aux_loss = getattr(output, "aux_loss", None)
                output.loss = _loss(
                    model, given, logits, mixed, loss=output.loss, aux_loss=aux_loss
                )
            output.logits = mixed
            return output
        parts = list(output)
        parts[place] = mixed
        if labels is not None:
            aux_loss = parts[1] if place == 2 else None
            parts[0] = _loss(model, given, logits, mixed, loss=parts[0], aux_loss=aux_loss)
        return tuple(parts)

    def _check_reading(self, given: dict[str, Any], output: Any) -> None:
        """Refuse a pass whose keys are not those of reading the text at once."""
        keyed = self._keyed
        if given.get("position_ids") is not None and not keyed.cache_rules.positions:
            raise UnsupportedModelError(
                f"position_ids must mean what they meant for the keys, but {keyed.name!r} does not "
                "count positions from 0, as generate does: leave position_ids out, or use "
                "knnlm serve"
            )
        past = getattr(output, "past_key_values", None)
        suspect = keyed.cache_rules.is_unreliable or keyed.batch_rules.frequency_limit is not None
        if past is not None and suspect:
            read = int(past.get_seq_length())
            before = read - self._captured.keys.shape[1]
            if before > 0 and keyed.cache_rules.is_unreliable:
                raise UnsupportedModelError(
                    f"a text must be read by {keyed.name!r} as a whole, because with its cache the "
                    "model gives other keys or logits: pass use_cache=False"
                )
            if before > 0 and keyed.batch_rules.changes_between(before, read):
                raise UnsupportedModelError(
                    f"a text of {read} positions must be read by {keyed.name!r} with other rotary "
                    f"frequencies than the {before} in its cache: pass use_cache=False"
                )

    def _mix(
        self, logits: Float[Tensor, "batch kept vocab"], given: dict[str, Any], output: Any
    ) -> Float[Tensor, "batch kept vocab"]:
        read = keys = self._captured.keys.to(logits.device)
        kept = torch.arange(keys.shape[:2].numel(), device=keys.device)
        kept = kept.reshape(*keys.shape[:2], 1)
        if logits.shape[1] != keys.shape[1]:
            keys = slice_logits_to_keep(keys, given.get("logits_to_keep", 0))
            kept = slice_logits_to_keep(kept, given.get("logits_to_keep", 0))
        cache_view = None
        if self.mixer.uses_cache:
            cache_view = select(self._caches.read(given, output, read.detach()), kept.flatten())
        lm_log_probs = self._keyed.log_probs(logits)
        begun = self._pending.search
        if self._walks is not None:
            found = self._walks.find(given, output, keys, lm_log_probs)
            retrieved = self.mixer.prepare(found)
        else:
            retrieved = self.mixer.search(keys) if begun is None else begun.result()
        self.retrieved = retrieved
        self.coverage = min(self.coverage, retrieved.coverage)
        return self.mixer.mix(retrieved, cache_view, lm_log_probs).log_probs


def attach(
    model: nn.Module,
    store: Stores,
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
    index: ForEach[Index] = None,
    cache: CacheParameters | bool = False,
    weights: str | None = None,
    pointers: int | None = None,
    skip: float = 0.0,
) -> Attachment:
    """Let an unmodified HF causal LM answer with the kNN-LM's mixture.

        with knnlm.attach(model, "docs.store"):
            model.generate(**inputs)

    model: one that torch.compile, DataParallel or PEFT has wrapped is taken out of its wrapper.
    store: a datastore or its folder, or several of them, whose λ add up to at most 1. The options
    are those of `KNNLM`; a continuous cache follows the sequences that the model reads.
    Outside a `with` block, call the attachment's `detach()`.

    The tokenizer is not seen, so not checked: use the one that the datastore was built with. Raises
    DatastoreMismatchError for a datastore of another model, AttachmentError if one is attached
    already, InvalidArgumentError.
    """
    stores = as_stores(store)
    keyed = KeyedModel(model, key=stores[0].settings.key)
    given: GivenParameters = {"k": k, "lmbda": lmbda, "temperature": temperature}
    mixer = open_mixer(keyed, stores, index=index, cache=cache, weights=weights, **given)
    return Attachment(keyed, mixer, choose_saving(stores, pointers, skip))


def _first_with_three_dimensions(output: tuple[Any, ...]) -> int:
    return next(
        place for place, part in enumerate(output) if isinstance(part, Tensor) and part.dim() == 3
    )


def _loss(
    model: Any,
    given: dict[str, Any],
    logits: Tensor,
    mixed: Tensor,
    *,
    loss: Tensor,
    aux_loss: Tensor | None,
) -> Tensor:
    """Return the mixture's loss, reduced and shifted as the model reduces and shifts its own."""
    names = ("num_items_in_batch", "shift_labels", "ignore_index")
    options = {name: given[name] for name in names if name in given}

    def loss_from(predictions: Tensor) -> Tensor:
        result: Tensor = model.loss_function(
            logits=predictions, labels=given["labels"], vocab_size=logits.shape[-1], **options
        )
        return result

    if aux_loss is None:
        return loss_from(mixed)
    return loss_from(mixed) + (loss - loss_from(logits))  # with a mixture of experts' routing loss
