"""KNNLM: a language model and its datastores, which together predict the next token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.attachment.attachment import Attachment
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import Explanation, explain
from knnlm.evaluation.perplexity import PerplexityReport, evaluate
from knnlm.index.protocol import Index
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import Windowing
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.mixer import Mixer, open_mixer
from knnlm.retrieval.retriever import ForEach, Retriever
from knnlm.text.corpus import Document


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation; `tokens` are the new ones only."""

    prompt: str
    text: str
    tokens: list[int]


class KNNLM:
    """p(y|x) = λ p_kNN(y|x) + (1 − λ) p_LM(y|x) (Khandelwal et al. 2020, eq. 3).

    store: one datastore, or several, each with a λ of its own: p = Σ λ_i p_kNN,i + (1 − Σ λ_i)
    p_LM. Then k, lmbda, temperature and index are one value for all or a sequence with one for
    each.
    k, lmbda, temperature: by default what `tune` stored with the datastore, else the paper's
    1024, 0.25 and 1, with k at most the number of entries.
    index: what finds the neighbors; by default the datastore's.
    weights: `learned` lets the gate that `tune` stored for these datastores choose λ and T of each
    token; `distance` chooses λ by the distance of the nearest neighbor, as tuned (Drozdov et al.
    2022); `fixed` is the paper's. By default learned where there is a gate and none of k, lmbda and
    temperature is given, else fixed.
    cache: the continuous cache (Grave et al. 2017), a further component; True for the one that
    `tune` stored.

    Raises DatastoreMismatchError if the datastore was built with another model, and
    InvalidArgumentError for parameters outside their rules, such as λ that add up to more than 1.
    """

    def __init__(
        self,
        lm: LanguageModel,
        store: Datastore | Sequence[Datastore],
        *,
        k: ForEach[int] = None,
        lmbda: ForEach[float] = None,
        temperature: ForEach[float] = None,
        index: ForEach[Index] = None,
        cache: CacheParameters | bool = False,
        weights: str | None = None,
    ) -> None:
        self.lm = lm
        self.mixer: Mixer = open_mixer(
            lm,
            store,
            k=k,
            lmbda=lmbda,
            temperature=temperature,
            index=index,
            cache=cache,
            weights=weights,
        )
        """What is mixed with the language model, and how."""

    @property
    def retrievers(self) -> tuple[Retriever, ...]:
        """The datastores, each with its index and its parameters."""
        return self.mixer.retrievers

    @property
    def windowing(self) -> Windowing:
        """How the first datastore's text was cut into windows; held-out text is cut likewise."""
        return self.retrievers[0].store.windowing

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Return log p of every next token after each position, float32.

        tokens: token ids, the start token included; rows may be padded on the right. λ = 0 gives
        the model's own log-probabilities to the bit, without a search. A continuous cache remembers
        what precedes a position in its row.
        """
        reading = self.lm.keys_and_logits(tokens)
        log_probs = torch.log_softmax(reading.logits, dim=-1)
        cache_neighbors = None
        if self.mixer.uses_cache:
            cache = self.mixer.new_cache(reading.keys)
            cache_view = cache.read(tokens.to(reading.keys.device), reading.keys)
            cache_neighbors = self.mixer.nearest(cache_view)
        asked = self.mixer.ask(reading.keys.flatten(0, 1))
        mixed = self.mixer.mix_vocabulary(asked, cache_neighbors, log_probs.flatten(0, 1))
        return mixed.reshape(log_probs.shape)

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
            max_tokens,
            progress,
        )

    def explain(
        self,
        text: str,
        *,
        generated: Sequence[int] = (),
        sources: int = 3,
        before: int = 24,
        after: int = 8,
    ) -> list[Explanation]:
        """Explain every token of a text, and of what was generated after it.

        See `knnlm.explain`, which is the same.
        """
        return explain(self, text, generated=generated, sources=sources, before=before, after=after)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a prompt, greedily unless `do_sample=True`.

        options: of transformers' `generate` (do_sample, temperature, top_p, num_beams, …), where
        temperature is the sampling temperature; all of them act on the mixture. seed: makes
        sampling repeatable and leaves torch's own random numbers alone. Raises
        InvalidArgumentError if prompt and continuation do not fit the model.
        """
        if max_new_tokens < 1:
            raise InvalidArgumentError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        lm = self.lm
        tokens = torch.tensor([[lm.start_token, *lm.encode([prompt])[0].tolist()]])
        length = tokens.shape[1]
        if lm.max_window is not None and length + max_new_tokens > lm.max_window:
            raise InvalidArgumentError(
                f"prompt ({length} tokens) and max_new_tokens ({max_new_tokens}) must fit the "
                f"model's {lm.max_window} positions; shorten one of them"
            )
        tokens = tokens.to(lm.device)
        options.setdefault("do_sample", False)
        padding = lm.tokenizer.pad_token_id
        options.setdefault("pad_token_id", lm.start_token if padding is None else padding)
        devices = [lm.device] if lm.device.type == "cuda" else []
        training = lm.model.training
        lm.model.eval()
        try:
            with (
                torch.random.fork_rng(devices, enabled=seed is not None),
                Attachment(lm, self.mixer),
            ):
                if seed is not None:
                    torch.manual_seed(seed)
                output = lm.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=max_new_tokens,
                    **options,
                )
        finally:
            lm.model.train(training)
        new = output[0, length:].tolist()
        end = lm.tokenizer.eos_token_id
        text = lm.decode(new[:-1] if new and new[-1] == end else new)
        return Generation(prompt, text, new)
