"""Sweeping k, temperature and λ of one datastore over neighbors that were searched once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from knnlm import display
from knnlm.evaluation.tally import perplexity_of
from knnlm.mixture.parameters import Parameters
from knnlm.progress import SILENT, Progress
from knnlm.tuning.held_out import TargetNeighbors

_COARSE_TEMPERATURES = tuple(m * 10.0**e for e in range(-1, 4) for m in (1, 2, 5))
_FURTHER = 24  # doublings or halvings beyond them, while the best lies at the edge
_FINER = (0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 1.75)
_COARSE_LMBDAS = tuple(step / 20 for step in range(1, 20))
_FINE_LMBDAS = tuple(step / 100 for step in range(1, 100))


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting, and the perplexity that it gives the tuning text."""

    k: int
    lmbda: float
    temperature: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """The best parameters of one datastore and how perplexity depends on each.

    by_k, by_lmbda, by_temperature: the best trial for each value of that parameter, the other two
    free. Where no setting beats the LM alone, parameters.lmbda is 0.
    """

    parameters: Parameters
    tokens: int
    lm_perplexity: float
    knn_perplexity: float
    by_k: tuple[Trial, ...]
    by_lmbda: tuple[Trial, ...]
    by_temperature: tuple[Trial, ...]

    def _repr_html_(self) -> str:
        """Return the best parameters and the perplexity by each of them, for notebooks."""
        best = self.parameters
        said = (
            f"{self.tokens:,} tokens: perplexity {self.lm_perplexity:.3f} by the LM alone, "
            f"{self.knn_perplexity:.3f} with k {best.k}, λ {best.lmbda:g}, T {best.temperature:g}"
        )
        plots = [
            display.plot(
                [(getattr(trial, name), trial.perplexity) for trial in trials],
                self.lm_perplexity,
                label=label,
                log=name != "lmbda",
            )
            for name, label, trials in (
                ("k", "k", self.by_k),
                ("lmbda", "λ", self.by_lmbda),
                ("temperature", "T", self.by_temperature),
            )
        ]
        return display.paragraph(said) + "".join(plots)


class _Setting(NamedTuple):
    k: int
    lmbda: float
    temperature: float


_Gains: TypeAlias = dict[_Setting, float]
"""For each setting, the mean of log p − log p_LM over the tokens, in nats."""


def sweep(neighbors: TargetNeighbors, progress: Progress = SILENT) -> Sweep:
    """Try powers of two for k, temperatures from coarse to fine, and λ in steps of 0.01."""
    gains = _try_settings(neighbors, progress)
    lm_nats = -float(neighbors.lm_log_probs.double().mean())
    best = max(gains, key=gains.__getitem__)

    def best_by(name: str) -> tuple[Trial, ...]:
        winners: dict[float, _Setting] = {}
        for setting, gain in gains.items():
            value = getattr(setting, name)
            if value not in winners or gain > gains[winners[value]]:
                winners[value] = setting
        return tuple(
            Trial(*setting, perplexity=perplexity_of(lm_nats - gains[setting]))
            for _, setting in sorted(winners.items())
        )

    return Sweep(
        parameters=Parameters(*(best if gains[best] > 0 else best._replace(lmbda=0.0))),
        tokens=len(neighbors.lm_log_probs),
        lm_perplexity=perplexity_of(lm_nats),
        knn_perplexity=perplexity_of(lm_nats - max(gains[best], 0.0)),
        by_k=best_by("k"),
        by_lmbda=best_by("lmbda"),
        by_temperature=best_by("temperature"),
    )


def _try_settings(neighbors: TargetNeighbors, progress: Progress) -> _Gains:
    most = neighbors.squared_distances.shape[1]
    ks = sorted({most, *(2**power for power in range(int(math.log2(most)) + 1))})
    gains: _Gains = {}
    with progress.task("sweep", len(_COARSE_TEMPERATURES) + len(_FINER), "temperatures") as advance:
        for temperature in _COARSE_TEMPERATURES:
            gains |= _try_temperature(neighbors, temperature, ks, _COARSE_LMBDAS)
            advance(1)
        for _ in range(_FURTHER):  # keys of another scale want other temperatures
            best = _best_temperature(gains)
            tried = {setting.temperature for setting in gains}
            if min(tried) < best < max(tried):
                break
            factor = 2.0 if best == max(tried) else 0.5
            gains |= _try_temperature(neighbors, best * factor, ks, _COARSE_LMBDAS)
        best = _best_temperature(gains)
        for factor in _FINER:
            temperature = float(f"{best * factor:.3g}")
            gains |= _try_temperature(neighbors, temperature, ks, _FINE_LMBDAS)
            advance(1)
    return gains


def _best_temperature(gains: _Gains) -> float:
    return max(gains, key=gains.__getitem__).temperature


def _try_temperature(
    neighbors: TargetNeighbors, temperature: float, ks: Sequence[int], lmbdas: Sequence[float]
) -> _Gains:
    """Try every k and λ at one temperature.

    Neighbors are sorted, so the votes of the k nearest are sums over the ranges from one k to the
    next.
    """
    nearest = neighbors.squared_distances[:, :1]
    relative = (neighbors.squared_distances - nearest.nan_to_num(posinf=0.0)) / temperature
    weights = torch.exp(-relative)
    present = nearest[:, 0].isfinite()
    lm_probs = neighbors.lm_log_probs.double().exp()
    all_votes = torch.zeros(len(weights), dtype=torch.float64)
    true_votes = torch.zeros_like(all_votes)
    gains: _Gains = {}
    start = 0
    for k in ks:
        new = weights[:, start:k]
        all_votes += new.sum(dim=1)
        true_votes += (new * neighbors.votes[:, start:k]).sum(dim=1)
        start = k
        ratios = true_votes / all_votes.clamp_min(1e-300) / lm_probs.clamp_min(1e-300)
        ratios = torch.where(present, ratios, torch.ones_like(ratios))
        some_lmbdas = torch.tensor(lmbdas, dtype=torch.float64)
        means = ((ratios[:, None] - 1) * some_lmbdas).log1p().mean(dim=0)
        for lmbda, gain in zip(lmbdas, means.tolist(), strict=True):
            gains[_Setting(k, lmbda, temperature)] = gain
    return gains
