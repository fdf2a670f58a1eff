"""What the memories add to a step of the model, and who spoke for a token.

Knows memories and tensors; knows no request and no protocol.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.apps.server.decoding import Step
from knnlm.attribution import Explanation, explain_scores
from knnlm.errors import InvalidArgumentError
from knnlm.index.protocol import Neighbors
from knnlm.language_model import LanguageModel
from knnlm.memory import Memory
from knnlm.mixture.interpolation import interpolate_vocabulary
from knnlm.mixture.parameters import Parameters
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


def override(memories: Sequence[Memory], asked: Overrides) -> tuple[Memory, ...]:
    """Return the memories with what was asked for; raises InvalidArgumentError."""
    changed = []
    for number, memory in enumerate(memories):
        entries = len(memory.store)
        default = memory.parameters
        k = _of_one("k", asked.k, number, len(memories))
        lmbda = _of_one("lmbda", asked.lmbda, number, len(memories))
        temperature = _of_one("knn_temperature", asked.temperature, number, len(memories))
        if k is not None and k > entries:
            raise InvalidArgumentError(
                f"k must be at most the number of entries, {entries}, got {k}: ask for fewer"
            )
        parameters = Parameters(
            k=default.k if k is None else int(k),
            lmbda=default.lmbda if lmbda is None else lmbda,
            temperature=default.temperature if temperature is None else temperature,
        )
        changed.append(memory if parameters == default else replace(memory, parameters=parameters))
    total = sum(memory.parameters.lmbda for memory in changed)
    if total > 1.0 + 1e-9:
        raise InvalidArgumentError(
            f"lmbda must add up to at most 1 over the {len(changed)} datastores, got {total:g}: "
            "give each a smaller one"
        )
    return tuple(changed)


def _of_one(
    name: str, asked: float | Sequence[float] | None, number: int, count: int
) -> float | None:
    if not isinstance(asked, Sequence):
        return asked
    if len(asked) != count:
        raise InvalidArgumentError(
            f"{name} must be one value, or one for each of the {count} datastores, got {len(asked)}"
        )
    return asked[number]


def mix_step(memories: Sequence[Memory], step: Step) -> Mixture:
    """Return the mixture after each position of a step; λ = 0 is not searched."""
    searched = tuple(memory for memory in memories if memory.counts)
    started = time.perf_counter()
    neighbors = tuple(memory.search(step.keys) for memory in searched)
    seconds = time.perf_counter() - started
    log_probs = step.log_probs
    if searched:
        components = [
            memory.vocabulary_component(of_memory)
            for memory, of_memory in zip(searched, neighbors, strict=True)
        ]
        log_probs = interpolate_vocabulary(log_probs, components)
    return Mixture(log_probs, step.log_probs, searched, neighbors, seconds)
