"""KNNLM: a language model and a datastore that together predict the next token."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from knnlm.corpus import Document
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.policy import open_index
from knnlm.index.protocol import Index
from knnlm.language_model import LanguageModel
from knnlm.mixture.interpolation import dense_knn_log_probs, interpolate, neighbor_log_weights
from knnlm.mixture.parameters import Parameters
from knnlm.perplexity import PerplexityReport, evaluate
from knnlm.progress import SILENT, Progress
from knnlm.reading import Windowing

_DENSE_ROWS = 256  # of the vocabulary-wide mixture made at once


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation; `tokens` are the new ones only."""

    prompt: str
    text: str
    tokens: list[int]


class KNNLM:
    """p(y|x) = λ p_kNN(y|x) + (1 − λ) p_LM(y|x) (Khandelwal et al. 2020, eq. 3).

    k, lmbda, temperature: by default what `tune` stored with the datastore, else the paper's
    1024, 0.25 and 1, with k at most the number of entries.
    index: what finds the neighbors; by default the datastore's.

    Raises DatastoreMismatchError if the datastore was built with another model, and
    InvalidArgumentError for parameters outside their rules.
    """

    def __init__(
        self,
        lm: LanguageModel,
        store: Datastore,
        *,
        k: int | None = None,
        lmbda: float | None = None,
        temperature: float | None = None,
        index: Index | None = None,
    ) -> None:
        store.check_model(lm)
        self.lm = lm
        self.store = store
        self.parameters = choose_parameters(store, k, lmbda, temperature)
        self.index = open_index(store, device=str(lm.device)) if index is None else index

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Return log p of every next token after each position, float32.

        tokens: token ids, the start token included; rows may be padded on the right. λ = 0 gives
        the model's own log-probabilities to the bit, without a search.
        """
        reading = self.lm.keys_and_logits(tokens)
        log_probs = torch.log_softmax(reading.logits, dim=-1)
        mixed = self._mix(reading.keys.flatten(0, 1), log_probs.flatten(0, 1))
        return mixed.reshape(log_probs.shape)

    @property
    def _is_lm_alone(self) -> bool:
        return self.parameters.lmbda == 0.0 or len(self.store) == 0

    def _mix(
        self, keys: Float[Tensor, "query dim"], lm_log_probs: Float[Tensor, "query vocab"]
    ) -> Float[Tensor, "query vocab"]:
        if self._is_lm_alone:
            return lm_log_probs
        neighbors = self.index.search(keys.float(), self.parameters.k)
        values = self.store.values[neighbors.rows.clamp_min(0).cpu()].to(keys.device)
        weights = neighbor_log_weights(neighbors.squared_distances, self.parameters.temperature)
        present = neighbors.present.any(dim=1)
        mixed = [
            interpolate(
                lm_log_probs[rows],
                dense_knn_log_probs(weights[rows], values[rows], lm_log_probs.shape[1]),
                self.parameters.lmbda,
                present[rows],
            )
            for rows in torch.split(torch.arange(len(keys), device=keys.device), _DENSE_ROWS)
        ]
        return torch.cat(mixed)

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
            self.store,
            self.index,
            self.parameters,
            documents,
            windowing or self.store.windowing,
            max_tokens,
            progress,
        )

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
        with torch.random.fork_rng(devices, enabled=seed is not None), self._mixing_in_model():
            if seed is not None:
                torch.manual_seed(seed)
            output = lm.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                **options,
            )
        new = output[0, length:].tolist()
        end = lm.tokenizer.eos_token_id
        text = lm.decode(new[:-1] if new and new[-1] == end else new)
        return Generation(prompt, text, new)

    @contextmanager
    def _mixing_in_model(self) -> Iterator[None]:
        """Let the model answer with the mixture, so that whatever reads its logits reads that."""
        model = self.lm.model
        training = model.training
        with self.lm.capture() as captured:

            def mix(module: nn.Module, inputs: Any, output: Any) -> Any:
                if not self._is_lm_alone:
                    kept = output.logits.shape[1]  # while generating, only the last positions'
                    log_probs = torch.log_softmax(output.logits.float(), dim=-1)
                    keys = captured.keys[:, -kept:].to(log_probs.device)
                    mixed = self._mix(keys.flatten(0, 1), log_probs.flatten(0, 1))
                    output.logits = mixed.reshape(log_probs.shape)
                return output

            hook = model.register_forward_hook(mix)
            model.eval()
            try:
                yield
            finally:
                hook.remove()
                model.train(training)


def choose_parameters(
    store: Datastore, k: int | None, lmbda: float | None, temperature: float | None
) -> Parameters:
    """Fill in what was not asked for: the datastore's tuned values, else the paper's."""
    default = store.parameters or Parameters()
    default = replace(default, k=min(default.k, max(len(store), 1)))
    if k is not None and k > len(store):
        raise InvalidArgumentError(
            f"k must be at most the number of entries, {len(store)}, got {k}: ask for fewer"
        )
    return Parameters(
        k=default.k if k is None else k,
        lmbda=default.lmbda if lmbda is None else lmbda,
        temperature=default.temperature if temperature is None else temperature,
    )
