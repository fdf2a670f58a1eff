"""A step of the model, mixed: the probabilities of the next tokens, and the votes behind them.

Knows the mixer and tensors; knows no job and no text.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.apps.engine.decoding import Step
from knnlm.errors import UnsupportedModelError
from knnlm.evaluation.explain import Explanation, explain_scores
from knnlm.evaluation.scoring import Scores
from knnlm.index.protocol import Neighbors
from knnlm.mixture.features import LMSummary, summarize_lm
from knnlm.mixture.interpolation import Votes
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Asked, Mixer

_TOKENS_BEFORE, _TOKENS_AFTER = 24, 8


@dataclass(frozen=True)
class MixedStep:
    """The mixture after each position of a step, in nats, and what it was made from.

    mixer: with only those retrievers that were searched. asked: the neighbors of each position in
    each of them. lm: a summary of the language model's predictions, where there is a gate.
    """

    log_probs: Float[Tensor, "position vocab"]
    lm_log_probs: Float[Tensor, "position vocab"]
    mixer: Mixer
    asked: Asked
    lm: LMSummary | None
    search_seconds: float

    @cached_property
    def votes(self) -> list[Votes]:
        """The neighbors' votes in each retriever, as they entered the mixture."""
        return self.mixer.asked_votes(self.asked, self.lm)

    def explain(self, position: int, token: int, sources: int, lm: LanguageModel) -> Explanation:
        """Name the strongest neighbors for `token`, which follows a position."""
        lm_log_probs = self.lm_log_probs[position, [token]].cpu()
        if not self.mixer.retrievers:
            log_prob = float(lm_log_probs[0])
            return Explanation(token, lm.decode([token]), log_prob, 0.0, log_prob, ())
        neighbors = tuple(
            Neighbors(found.squared_distances[[position]].cpu(), found.rows[[position]].cpu())
            for found in self.asked.neighbors
        )
        votes = [_at(position, votes) for votes in self.votes]
        scores = Scores([], torch.tensor([token]), lm_log_probs, neighbors)
        (explanation,) = explain_scores(
            lm, self.mixer, scores, sources, _TOKENS_BEFORE, _TOKENS_AFTER, votes=votes
        )
        return explanation


def mix_step(mixer: Mixer, step: Step) -> MixedStep:
    """Search for the neighbors of each position once, and mix them; λ = 0 is not searched."""
    mixer = replace(mixer, retrievers=mixer.searched)
    started = time.perf_counter()
    asked = mixer.ask(step.keys)
    search_seconds = time.perf_counter() - started
    lm = None if mixer.gate is None else summarize_lm(step.log_probs)
    log_probs = mixer.mix_vocabulary(asked, None, step.log_probs, lm)
    return MixedStep(log_probs, step.log_probs, mixer, asked, lm, search_seconds)


def check_numbers(log_probs: Tensor) -> None:
    """Raise UnsupportedModelError if some log-probabilities are not numbers."""
    if bool(log_probs.isnan().any()):
        raise UnsupportedModelError("the model's probabilities must be numbers, but some are NaN")


def _at(position: int, votes: Votes) -> Votes:
    """Return the votes at one position alone, on the CPU."""
    lmbda = votes.lmbda
    return Votes(
        votes.log_weights[[position]].cpu(),
        votes.tokens[[position]].cpu(),
        lmbda[[position]].cpu() if isinstance(lmbda, Tensor) else lmbda,
        votes.present[[position]].cpu(),
    )
