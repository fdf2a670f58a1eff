"""Every way to mix, fitted to a held-out text and measured on it.

A new way is one more step of `fit_mixture`; what it fits is stored as a field of `TunedMixture`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.evaluation.tally import perplexity_of, share_hurt
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.features import GateInput
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.interpolation import Voters
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.stored import TunedMixture
from knnlm.progress import SILENT, Progress
from knnlm.tuning.by_distance import fit_by_distance
from knnlm.tuning.gate_training import fit_gate, make_examples
from knnlm.tuning.held_out import CACHE_K, CACHE_SIZES, HeldOutText
from knnlm.tuning.search_gate import fit_search_gate
from knnlm.tuning.weights import fit_weights, knn_ratios, log_gains

LEAST_TOKENS = 2048
"""A gate needs so many tokens to learn from and to be tried on."""

_CACHE_TEMPERATURES = tuple(m * 10.0**e for e in range(-1, 4) for m in (1, 2, 5))
_FINER = (0.7, 1.4)
_FEW_STEPS = 40


@dataclass(frozen=True, slots=True)
class Fit:
    """What a way to mix gives the tuning text.

    share_hurt: the share of tokens to which it gives at least 0.1 nats less than the LM. held_out:
    whether each token was predicted by what was fitted to other tokens only.
    """

    name: str
    perplexity: float
    share_hurt: float
    held_out: bool


def fit_mixture(
    text: HeldOutText, parameters: Sequence[Parameters], progress: Progress = SILENT
) -> tuple[TunedMixture, tuple[Fit, ...]]:
    """Fit a continuous cache, λ by distance, gates without and with the cache, and a search gate.

    parameters: the best fixed ones of each datastore. Also returns what each way to mix gives. A
    gate is kept where it predicts text that it was not fitted to better than fixed weights predict
    text that they were fitted to.
    """
    voters = [own.nearest(p.k) for own, p in zip(text.voters, parameters, strict=True)]
    ratios = [
        knn_ratios(text.for_targets(own), p.temperature)
        for own, p in zip(voters, parameters, strict=True)
    ]
    fixed = log_gains(torch.stack(ratios, dim=1), [p.lmbda for p in parameters])
    fixed_fit = _fit("fixed weights", text, _mixed(text, fixed))
    cache, lmbdas, log_probs = _fit_cache(text, ratios, progress)
    cache_fit = _fit("fixed weights + cache", text, log_probs)
    fits = [fixed_fit, cache_fit]
    mixture = TunedMixture(cache, lmbdas)
    if len(text) < LEAST_TOKENS:
        return mixture, tuple(fits)

    if len(parameters) == 1:
        nearest = voters[0].squared_distances[:, 0]
        by_distance, log_probs = fit_by_distance(nearest, text.lm_log_probs, ratios[0])
        fits.append(_fit("λ by distance", text, log_probs, held_out=True))
        mixture = replace(mixture, by_distance=by_distance)

    inputs = [GateInput(p.k, p.temperature) for p in parameters]
    gate, log_probs = _fit_gate(text, inputs, voters, progress)
    fits.append(_fit("learned weights", text, log_probs, held_out=True))
    gains = fixed
    if fits[-1].perplexity < fixed_fit.perplexity:
        mixture = replace(mixture, gate=gate)
        gains = log_probs.double() - text.lm_log_probs.double()
    mixture = replace(mixture, search_gate=fit_search_gate(text.lm, text.keys, gains))

    inputs.append(GateInput(CACHE_K, cache.votes.temperature))
    voters.append(text.cache_neighbors[CACHE_SIZES.index(cache.size)].voters)
    gate, log_probs = _fit_gate(text, inputs, voters, progress)
    fits.append(_fit("learned weights + cache", text, log_probs, held_out=True))
    if fits[-1].perplexity < cache_fit.perplexity:
        mixture = replace(mixture, cache_gate=gate)
    return mixture, tuple(fits)


def _fit_cache(
    text: HeldOutText, ratios: Sequence[Float[Tensor, " token"]], progress: Progress
) -> tuple[CacheParameters, tuple[float, ...], Float[Tensor, " token"]]:
    """Return the best cache, the λ of each datastore that go with it, and the true tokens' log p.

    ratios: p_kNN / p_LM of the true tokens, for each datastore.
    """
    tried: dict[tuple[int, float], float] = {}

    def all_ratios(number: int, temperature: float) -> Float[Tensor, "token component"]:
        neighbors = text.for_targets(text.cache_neighbors[number].voters)
        return torch.stack([*ratios, knn_ratios(neighbors, temperature)], dim=1)

    def look(number: int, temperature: float) -> None:
        if (number, temperature) not in tried:
            mixed = all_ratios(number, temperature)
            gains = log_gains(mixed, fit_weights(mixed, _FEW_STEPS))
            tried[number, temperature] = float(_mixed(text, gains).mean())

    total = len(CACHE_SIZES) * len(_CACHE_TEMPERATURES)
    with progress.task("cache", total, "settings") as advance:
        for number in range(len(CACHE_SIZES)):
            for temperature in _CACHE_TEMPERATURES:
                look(number, temperature)
                advance(1)
    number, best = max(tried, key=tried.__getitem__)
    for factor in _FINER:
        look(number, float(f"{best * factor:.3g}"))
    number, best = max(tried, key=tried.__getitem__)
    mixed = all_ratios(number, best)
    *lmbdas, cache_lmbda = weights = fit_weights(mixed)
    cache = CacheParameters(CACHE_SIZES[number], Parameters(CACHE_K, cache_lmbda, best))
    return cache, tuple(lmbdas), _mixed(text, log_gains(mixed, weights))


def _fit_gate(
    text: HeldOutText, inputs: Sequence[GateInput], voters: Sequence[Voters], progress: Progress
) -> tuple[LearnedGate, Float[Tensor, " token"]]:
    """Return a gate, and log p of the true tokens by the networks that did not learn from them."""
    with progress.task("gate", len(text), "tokens") as advance:
        examples = make_examples(
            inputs, text.lm, text.lm_log_probs, voters, text.targets, advance=advance
        )
        return fit_gate(inputs, examples)


def _mixed(text: HeldOutText, gains: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Return log p of the true tokens. gains: see `log_gains`."""
    return text.lm_log_probs.double() + gains


def _fit(
    name: str, text: HeldOutText, log_probs: Float[Tensor, " token"], *, held_out: bool = False
) -> Fit:
    perplexity = perplexity_of(-float(log_probs.double().mean()))
    return Fit(name, perplexity, share_hurt(log_probs, text.lm_log_probs), held_out)
