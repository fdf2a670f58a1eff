"""What the memories add to a step of the model, and who spoke for a token.

Knows memories and tensors; knows no request and no protocol.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.apps.server.decoding import Step
from knnlm.attribution import Explanation, explain_scores
from knnlm.index.protocol import Neighbors
from knnlm.language_model import LanguageModel
from knnlm.memory import Memory, for_each, mix_neighbors, override
from knnlm.scoring import Scores

_PASSAGE_TOKENS = {"before": 24, "after": 8}


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a request asks of the memories: one value for all of them, or one for each.

    None stands for what the server was started with.
    """

    k: int | Sequence[int] | None = None
    lmbda: float | Sequence[float] | None = None
    temperature: float | Sequence[float] | None = None

    def of(self, memories: Sequence[Memory]) -> tuple[Memory, ...]:
        """Return the memories with what was asked for; raises InvalidArgumentError."""
        # the protocol's own `temperature` is another one
        temperature = for_each("knn_temperature", self.temperature, len(memories))
        return override(memories, k=self.k, lmbda=self.lmbda, temperature=temperature)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Log-probabilities of what follows some positions, and the neighbors that were asked.

    searched: the memories that counted. neighbors: of every position, in each of them.
    """

    log_probs: Float[Tensor, "position vocab"]
    lm_log_probs: Float[Tensor, "position vocab"]
    searched: tuple[Memory, ...]
    neighbors: tuple[Neighbors, ...]
    search_seconds: float

    def explain(self, place: int, token: int, sources: int, lm: LanguageModel) -> Explanation:
        """Name the strongest neighbors of the position `place`, which `token` follows."""
        lm_log_probs = self.lm_log_probs[place, [token]].cpu()
        if not self.searched:
            log_prob = float(lm_log_probs[0])
            return Explanation(token, lm.decode([token]), log_prob, 0.0, log_prob, ())
        neighbors = tuple(
            Neighbors(found.squared_distances[[place]].cpu(), found.rows[[place]].cpu())
            for found in self.neighbors
        )
        scores = Scores([], torch.tensor([token]), lm_log_probs, neighbors, 0.0, 0.0)
        (explanation,) = explain_scores(lm, self.searched, scores, sources, **_PASSAGE_TOKENS)
        return explanation


def mix_step(memories: Sequence[Memory], step: Step) -> Mixture:
    """Return the mixture after each position of a step; λ = 0 is not searched."""
    searched = tuple(memory for memory in memories if memory.counts)
    started = time.perf_counter()
    neighbors = tuple(memory.search(step.keys) for memory in searched)
    seconds = time.perf_counter() - started
    log_probs = mix_neighbors(searched, neighbors, step.log_probs)
    return Mixture(log_probs, step.log_probs, searched, neighbors, seconds)
