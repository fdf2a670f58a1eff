"""A step of the model, mixed: the probabilities of the next tokens, and the votes behind them.

Knows the mixer and tensors; knows no job and no text.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.evaluation.explain import Evidence, Explainer
from knnlm.evaluation.explanation import Explanation
from knnlm.index.protocol import Neighbors
from knnlm.model.decoding import Step
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Mixed, Mixer
from knnlm.retrieval.retriever import Retriever


@dataclass(frozen=True, slots=True)
class MixedStep:
    """The mixture after each position of a step, in nats, and what it was made from.

    retrievers: those that were searched. neighbors: of each position, in each of them.
    coverage: the least of these searches.
    """

    mixed: Mixed
    lm_log_probs: Float[Tensor, "position vocab"]
    retrievers: tuple[Retriever, ...]
    neighbors: tuple[Neighbors, ...]
    search_seconds: float
    coverage: float

    @property
    def log_probs(self) -> Float[Tensor, "position vocab"]:
        """The mixture's log-probabilities."""
        return self.mixed.log_probs

    def explain(
        self, position: int, text: Sequence[int], sources: int, lm: LanguageModel
    ) -> Explanation:
        """Name the strongest neighbors for the last token of a text, which follows a position.

        What the token adds to the text is left out.
        """
        *before, token = text
        evidence = Evidence(
            torch.tensor([token]),
            self.lm_log_probs[position, [token]].cpu(),
            self.mixed.votes_at(position),
            [
                Neighbors(
                    nearest.squared_distances[[position]].cpu(), nearest.rows[[position]].cpu()
                )
                for nearest in self.neighbors
            ],
        )
        explainer = Explainer(lm, self.retrievers, text=before, sources=sources, with_credits=False)
        (explanation,) = explainer.explain(evidence, iter([""]))
        return explanation


def mix_step(mixer: Mixer, step: Step) -> MixedStep:
    """Search for the neighbors of each position once, and mix them; λ = 0 is not searched."""
    started = time.perf_counter()
    retrieved = mixer.search(step.keys)
    seconds = time.perf_counter() - started
    mixed = mixer.mix(retrieved, None, step.log_probs)
    neighbors = tuple(retrieved.neighbors)
    return MixedStep(mixed, step.log_probs, mixer.searched, neighbors, seconds, retrieved.coverage)
