"""What the retrievers add to a step of the model, and who spoke for a token.

Knows retrievers and tensors; knows no request and no protocol.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.apps.engine.decoding import Step
from knnlm.evaluation.explain import Evidence, Explainer
from knnlm.evaluation.explanation import Explanation
from knnlm.index.protocol import Neighbors
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Mixed, Mixer, override_mixer
from knnlm.retrieval.retriever import Retriever, for_each


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

    retrievers: those that were searched. neighbors: of every position, in each of them.
    """

    mixed: Mixed
    lm_log_probs: Float[Tensor, "position vocab"]
    retrievers: tuple[Retriever, ...]
    neighbors: tuple[Neighbors, ...]
    search_seconds: float

    @property
    def log_probs(self) -> Float[Tensor, "position vocab"]:
        """The mixture's log-probabilities."""
        return self.mixed.log_probs

    def explain(self, place: int, token: int, sources: int, lm: LanguageModel) -> Explanation:
        """Name the strongest neighbors of the position `place`, which `token` follows."""
        evidence = Evidence(
            torch.tensor([token]),
            self.lm_log_probs[place, [token]].cpu(),
            self.mixed.votes_at(place),
            [
                Neighbors(nearest.squared_distances[[place]].cpu(), nearest.rows[[place]].cpu())
                for nearest in self.neighbors
            ],
        )
        explainer = Explainer(lm, self.retrievers, sources=sources, with_credits=False)
        (explanation,) = explainer.explain(evidence)
        return explanation


def mix_step(mixer: Mixer, step: Step) -> MixedStep:
    """Return the mixture after each position of a step; λ = 0 is not searched."""
    started = time.perf_counter()
    retrieved = mixer.search(step.keys)
    seconds = time.perf_counter() - started
    mixed = mixer.mix(retrieved, None, step.log_probs)
    neighbors = tuple(retrieved.neighbors)
    return MixedStep(mixed, step.log_probs, mixer.searched, neighbors, seconds)
