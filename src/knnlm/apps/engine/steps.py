"""What the retrievers add to a step of the model, and who spoke for a token.

Knows retrievers and tensors; knows no request and no protocol.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.apps.engine.decoding import Step
from knnlm.evaluation.explain import Explanation, explain_scores
from knnlm.evaluation.scoring import Scores
from knnlm.index.protocol import Neighbors
from knnlm.mixture.lm_summary import summarize_lm
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Mixer, override_mixer
from knnlm.retrieval.retriever import for_each

_TOKENS_BEFORE, _TOKENS_AFTER = 24, 8


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a request asks of the retrievers: one value for all of them, or one for each.

    None stands for what the server was started with.
    """

    k: int | Sequence[int] | None = None
    lmbda: float | Sequence[float] | None = None
    temperature: float | Sequence[float] | None = None

    def of(self, mixer: Mixer) -> Mixer:
        """Return the mixer with what was asked for; raises InvalidArgumentError."""
        if self.temperature is not None:  # checked here: the protocol's `temperature` is another
            for_each("knn_temperature", self.temperature, len(mixer.retrievers))
        return override_mixer(mixer, k=self.k, lmbda=self.lmbda, temperature=self.temperature)


@dataclass(frozen=True, slots=True)
class MixedStep:
    """Log-probabilities of what follows some positions, and the neighbors that were asked.

    mixer: with the retrievers that were searched. neighbors: of every position, in each of them.
    """

    log_probs: Float[Tensor, "position vocab"]
    lm_log_probs: Float[Tensor, "position vocab"]
    mixer: Mixer
    neighbors: tuple[Neighbors, ...]
    search_seconds: float

    def explain(self, place: int, token: int, sources: int, lm: LanguageModel) -> Explanation:
        """Name the strongest neighbors of the position `place`, which `token` follows."""
        lm_log_probs = self.lm_log_probs[place, [token]].cpu()
        if not self.mixer.retrievers:
            log_prob = float(lm_log_probs[0])
            return Explanation(token, lm.decode([token]), log_prob, 0.0, log_prob, ())
        neighbors = tuple(
            Neighbors(found.squared_distances[[place]].cpu(), found.rows[[place]].cpu())
            for found in self.neighbors
        )
        summary = None
        if self.mixer.gate is not None:
            summary = summarize_lm(self.lm_log_probs[[place]]).cpu()
        scores = Scores([], torch.tensor([token]), lm_log_probs, neighbors, lm=summary)
        (explanation,) = explain_scores(
            lm, self.mixer, scores, sources, _TOKENS_BEFORE, _TOKENS_AFTER
        )
        return explanation


def mix_step(mixer: Mixer, step: Step) -> MixedStep:
    """Return the mixture after each position of a step; λ = 0 is not searched."""
    mixer = replace(mixer, retrievers=mixer.searched)
    started = time.perf_counter()
    asked = mixer.ask(step.keys)
    seconds = time.perf_counter() - started
    log_probs = mixer.mix_vocabulary(asked, None, step.log_probs)
    return MixedStep(log_probs, step.log_probs, mixer, tuple(asked.neighbors), seconds)
