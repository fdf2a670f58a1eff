"""KNNLM: a language model and its datastores, which together predict the next token."""

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.attachment.attachment import Attachment
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import explain
from knnlm.evaluation.explanation import Explanations
from knnlm.evaluation.passages import FoundPassage, search_passages
from knnlm.evaluation.perplexity import PerplexityReport, evaluate
from knnlm.index.policy import open_index
from knnlm.index.protocol import Index, coverage_of
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.model.encoding import check_text
from knnlm.model.generation import generate_tokens
from knnlm.model.language_model import LanguageModel
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.mixer import Mixer, open_mixer
from knnlm.retrieval.retriever import ForEach, GivenParameters, Retriever, Stores, as_stores
from knnlm.retrieval.saved_searches import SavingRule, choose_saving
from knnlm.rules import (
    LEAST_TEMPERATURE,
    check_min_p,
    check_repetition_penalty,
    check_sampling_temperature,
    check_seed,
    check_top_k,
    check_top_p,
    check_whole,
)
from knnlm.text.conversations import Message
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation: its text, and its tokens with an end token if there was one.

    prompt: what it continues; of a conversation, the last message. coverage: the least of the
    searches; see `Neighbors`. searches_saved: the share of them that was saved.
    """

    prompt: str
    text: str
    tokens: list[int]
    coverage: float = 1.0
    searches_saved: float = 0.0


class KNNLM:
    """p(y|x) = λ p_kNN(y|x) + (1 − λ) p_LM(y|x) (Khandelwal et al. 2020, eq. 3).

    lm: a language model, or its hub name, folder or .gguf file, which is then loaded with the
    settings that the (first) datastore was built with.
    store: a datastore or its folder, or several of them, each with a λ of its own: p = Σ λ_i
    p_kNN,i + (1 − Σ λ_i) p_LM. Then k, lmbda, temperature and index are one value for all or a
    sequence with one for each.
    k, lmbda, temperature: by default those that `tune` stored with the datastore, else the paper's
    1024, 0.25 and 1, with k at most the number of entries.
    index: finds the neighbors; by default the datastore's own.
    cache: the continuous cache (Grave et al. 2017), mixed in too; True for the one that `tune`
    stored.
    weights: `learned` lets the gate that `tune` stored for these datastores choose λ and T of each
    token; `distance` chooses λ by the distance of the nearest neighbor, as tuned (Drozdov et al.
    2022); `fixed` is the paper's. By default learned where there is a gate and none of k, lmbda and
    temperature is given, else fixed.
    pointers, skip: save searches, in `perplexity`, `generate` and `chat`. pointers: search only
    where fewer entries than this follow the last neighbors (RetoMaton, Alon et al. 2022). skip: the
    share of searches that are left out where the language model is sure, as tuned (He et al. 2021).

    Raises DatastoreMismatchError if a datastore was built with another model, and
    InvalidArgumentError for arguments outside their rules, such as λ that add up to more than 1.
    """

    def __init__(
        self,
        lm: LanguageModel | str | Path,
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
    ) -> None:
        stores = as_stores(store)
        if isinstance(lm, str | Path):
            lm = stores[0].load_model(lm)
        elif not isinstance(lm, LanguageModel):
            raise InvalidArgumentError(
                "lm must be a LanguageModel, or the hub name or folder of one, got "
                f"{type(lm).__name__}: wrap a model in knnlm.LanguageModel(model, tokenizer)"
            )
        self.lm = lm
        given: GivenParameters = {"k": k, "lmbda": lmbda, "temperature": temperature}
        self.mixer: Mixer = open_mixer(
            lm, stores, index=index, cache=cache, weights=weights, **given
        )
        """Everything that is mixed with the language model, and how."""
        self._choose_saving = partial(choose_saving, pointers=pointers, skip=skip)
        self.saving: SavingRule | None = self._choose_saving(stores)
        """Where `perplexity`, `generate` and `chat` save searches; None where they do not."""
        self._chosen = self.mixer
        self._choose_mixer = partial(open_mixer, lm, cache=cache, weights=weights, **given)

    @property
    def retrievers(self) -> tuple[Retriever, ...]:
        """The datastores, each with its index and its parameters."""
        return self.mixer.retrievers

    @property
    def windowing(self) -> Windowing:
        """How the first datastore's text was cut into windows; held-out text is cut likewise."""
        return self.retrievers[0].store.windowing

    def reopened(self) -> "KNNLM":
        """Return this model with the newest state of its datastores; itself if none has changed.

        Parameters are chosen as they were for this model: given ones stay, and tuned ones are read
        again. Where that is no longer possible, because a given k exceeds the entries that are
        left, or because `mixer` was replaced, they stay as they are. This model does not change.
        Raises the errors of opening the datastores and their indexes, and of a first search.
        """
        stores = [retriever.store.reopened() for retriever in self.retrievers]
        pairs = list(zip(self.retrievers, stores, strict=True))
        if all(store is retriever.store for retriever, store in pairs):
            return self
        retrievers = []
        for retriever, store in pairs:
            store.check_model(self.lm)
            allowed = coverage_of(retriever.index)
            index = open_index(store, device=str(self.lm.device), coverage=allowed)
            retrievers.append(replace(retriever, store=store, index=index))
            if len(store) > 0:  # what cannot be read is to be noticed now
                retrievers[-1].tokens(index.search(torch.zeros(1, self.lm.dimension), 1))
        model = copy.copy(self)
        model.mixer = replace(self.mixer, retrievers=tuple(retrievers))
        if self.mixer is self._chosen:
            try:
                indexes = [retriever.index for retriever in retrievers]
                model.mixer = self._choose_mixer(stores, index=indexes)
                model.saving = self._choose_saving(stores)
            except InvalidArgumentError as error:
                _LOG.warning("the parameters of %s stay as they are: %s", stores[0].path, error)
            model._chosen = model.mixer
        return model

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, read as the (first) datastore's text was; no start token."""
        (tokens,) = self.lm.encode([text], control_tokens=self.windowing.control_tokens)
        return [int(token) for token in tokens]

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Return log p of every next token after each position, float32.

        tokens: token ids, the start token included; rows may be padded on the right. With λ = 0
        these are the model's own log-probabilities to the bit, without a search. A continuous cache
        holds the tokens before a position in its row.
        """
        reading = self.lm.keys_and_logits(tokens)
        log_probs = self.lm.log_probs(reading.logits)
        cache_view = None
        if self.mixer.uses_cache:
            cache = self.mixer.new_cache(reading.keys)
            cache_view = cache.read(tokens.to(reading.keys.device), reading.keys)
        return self.mixer.mix(self.mixer.search(reading.keys), cache_view, log_probs).log_probs

    def perplexity(
        self,
        documents: Iterable[Document],
        *,
        windowing: Windowing | None = None,
        max_tokens: int | None = None,
        progress: Progress = SILENT,
    ) -> PerplexityReport:
        """Score held-out documents; every token once, in the datastore's windows by default."""
        return evaluate(
            self.lm,
            self.mixer,
            documents,
            windowing or self.windowing,
            max_tokens=max_tokens,
            saving=self.saving,
            progress=progress,
        )

    def explain(
        self,
        text: str,
        *,
        generated: Sequence[int] = (),
        sources: int = 3,
        before: int = 24,
        after: int = 8,
    ) -> Explanations:
        """Explain every token of a text, and of a generation after it; see `knnlm.explain`."""
        return explain(self, text, generated=generated, sources=sources, before=before, after=after)

    def search(self, text: str, *, passages: int = 5, tokens: int = 128) -> list[FoundPassage]:
        """Return the stored passages nearest to a text, the nearest first.

        The state after each token of the text is searched for, and a passage's score counts the
        tokens that it is near to. passages: how many at most. tokens: how long; documents are cut
        into stretches of this length. Raises InvalidArgumentError for numbers below 1, and for a
        text without tokens or with more than one window holds.
        """
        return search_passages(self, text, passages=passages, tokens=tokens)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        drafts: bool = True,
        **options: Any,
    ) -> Generation:
        """Continue a prompt, greedily unless `do_sample=True`.

        options: those of transformers' `generate` (do_sample, temperature, top_p, num_beams, …),
        where temperature is the sampling temperature; all of them act on the mixture. The model's
        generation config only says which tokens end a text: its penalties, bans and sampling
        options count if they are given here. seed: makes sampling repeatable and leaves torch's own
        random numbers alone. drafts: whether the model may read several tokens in one pass, guessed
        from the datastores and the text; the words are the same without. Any of the model's
        `end_tokens` ends the text and is left out of it. The prompt and the text together are what
        the tokens say. Raises InvalidArgumentError for arguments outside their rules, and if prompt
        and continuation do not fit the model.
        """
        check_text("prompt", prompt)
        tokens = [self.lm.start_token, *self.encode(prompt)]
        return self._continue(
            prompt, tokens, 1, max_new_tokens, seed=seed, drafts=drafts, options=options
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        drafts: bool = True,
        **options: Any,
    ) -> Generation:
        """Answer a conversation through the model's chat template, greedily unless told otherwise.

        messages: like {"role": "user", "content": "Hello"}, the oldest first; roles are system,
        user and assistant. What they say is text, their `</s>` too. The other arguments are those
        of `generate`; the answer also ends where the template ends a turn. Raises
        InvalidArgumentError for messages that are none, that the template refuses or that do not
        fit the model, and UnsupportedModelError for a model without a chat template.
        """
        template = self.lm.chat_template
        tokens = template.encode(messages)
        ends = sorted(self.lm.end_tokens | template.turn_ends)
        options = {"eos_token_id": ends or None} | options
        prompt = messages[-1]["content"]
        return self._continue(
            prompt, tokens, 0, max_new_tokens, seed=seed, drafts=drafts, options=options
        )

    def _continue(
        self,
        prompt: str,
        tokens: Sequence[int],
        hidden: int,
        max_new_tokens: int,
        *,
        seed: int | None,
        drafts: bool,
        options: dict[str, Any],
    ) -> Generation:
        """Continue tokens, the first `hidden` of which belong to no text."""
        max_new_tokens = check_whole("max_new_tokens", max_new_tokens)
        seed = None if seed is None else check_seed(seed)
        options = _checked(options)
        lm = self.lm
        if lm.max_window is not None and len(tokens) + max_new_tokens > lm.max_window:
            raise InvalidArgumentError(
                f"prompt ({len(tokens)} tokens) and max_new_tokens ({max_new_tokens}) must fit the "
                f"model's {lm.max_window} positions; shorten one of them"
            )
        options = lm.cache_options(len(tokens), len(tokens) + max_new_tokens) | options
        with Attachment(lm, self.mixer, self.saving) as attachment:
            if drafts and not _OTHER_LOOPS & options.keys():
                options["custom_generate"] = attachment.with_drafts
            new, ended = generate_tokens(lm, tokens, seed, max_new_tokens=max_new_tokens, **options)
        text = lm.decode(new[:-1] if ended else new, before=tokens[hidden:])
        return Generation(prompt, text, new, attachment.coverage, attachment.searches_saved)


_OPTION_RULES: dict[str, Callable[[object], float]] = {
    "temperature": check_sampling_temperature,
    "top_k": check_top_k,
    "top_p": check_top_p,
    "min_p": check_min_p,
    "repetition_penalty": check_repetition_penalty,
}


_OTHER_LOOPS = {"custom_generate", "assistant_model", "streamer"}
"""Options of `generate` that `custom_generate` would not get, or would replace."""


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Check the options of `generate` whose rules are our own."""
    checked = {
        name: check(options[name])
        for name, check in _OPTION_RULES.items()
        if options.get(name) is not None
    }
    if checked.get("temperature", 1.0) < LEAST_TEMPERATURE:  # float32 cannot be divided by it
        return {**options, **checked, "temperature": None, "do_sample": False}
    return options | checked
