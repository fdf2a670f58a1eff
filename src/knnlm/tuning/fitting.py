"""Beyond one λ: a continuous cache and gates, fitted to the cached neighbors of a held-out text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.evaluation.scoring import CacheRequest, ScoreRequest, score_documents
from knnlm.evaluation.tally import share_hurt
from knnlm.knn_lm import KNNLM
from knnlm.mixture.continuous_cache import CacheNeighbors, CacheParameters, join_cache_neighbors
from knnlm.mixture.features import GateInput, LMSummary, Voters
from knnlm.mixture.gate import BucketedLambda, LearnedGate
from knnlm.mixture.interpolation import neighbor_log_weights, target_knn_log_probs
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.stored import TunedMixture
from knnlm.progress import SILENT, Progress
from knnlm.text.corpus import Document
from knnlm.text.windows import Windowing
from knnlm.tuning.gate_training import (
    fit_buckets,
    fit_gate,
    join_examples,
    make_examples,
)

LEAST_TOKENS = 2048
"""A gate needs so many tokens to learn from and to be tried on."""

CACHE_SIZES = (64, 256, 1024, 4096)
CACHE_K = 256
_CACHE_TEMPERATURES = tuple(m * 10.0**e for e in range(-1, 4) for m in (1, 2, 5))
_FINER = (0.7, 1.4)
_FEW_STEPS, _MANY_STEPS = 40, 300
_LARGEST_LOG_RATIO = 600.0
_EXAMPLES_AT_ONCE = 2048
_BLOCKS = 5


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """All that is needed of a held-out text to tune a mixture.

    lm_log_probs: of the true tokens, the targets. voters: of each datastore. cache_neighbors: of a
    continuous cache of each of CACHE_SIZES.
    """

    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    lm: LMSummary
    voters: tuple[Voters, ...]
    cache_neighbors: tuple[CacheNeighbors, ...]

    def __len__(self) -> int:
        return len(self.targets)


def read_held_out(
    model: KNNLM,
    documents: Iterable[Document],
    k: int,
    windowing: Windowing,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> HeldOutText | None:
    """Read a held-out text and search each datastore once, for the k nearest of every token.

    k: of a datastore with fewer entries, all of them. Takes 9·k bytes a token and datastore. None
    for a text without tokens.
    """
    retrievers = tuple(
        replace(m, parameters=replace(m.parameters, k=min(k, len(m.store))))
        for m in model.retrievers
    )
    cache = CacheRequest(CACHE_SIZES, CACHE_K, boundary=windowing.boundary)
    parts: list[HeldOutText] = []
    text = score_documents(
        model.lm,
        documents,
        windowing,
        ScoreRequest(retrievers, cache, summary=True),
        max_tokens=max_tokens,
        progress=progress,
        description="tune",
    )
    for scores in text.scores:
        assert scores.lm is not None
        voters = tuple(
            retriever.voters(found)
            for retriever, found in zip(retrievers, scores.neighbors, strict=True)
        )
        parts.append(
            HeldOutText(
                scores.targets, scores.lm_log_probs, scores.lm, voters, scores.cache_neighbors
            )
        )
    if not parts:
        return None
    return HeldOutText(
        torch.cat([part.targets for part in parts]),
        torch.cat([part.lm_log_probs for part in parts]),
        LMSummary.join([part.lm for part in parts]),
        tuple(
            Voters(*(torch.cat(column) for column in zip(*of_store, strict=True)))
            for of_store in zip(*(part.voters for part in parts), strict=True)
        ),
        tuple(
            join_cache_neighbors(of_size)
            for of_size in zip(*(part.cache_neighbors for part in parts), strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """What a way to mix gives the tuning text.

    share_hurt: of tokens to which it gives at least 0.1 nats less than the LM. held_out: whether
    each token was predicted by what had learned from others only.
    """

    name: str
    perplexity: float
    share_hurt: float
    held_out: bool


def fit_mixture(
    text: HeldOutText, parameters: Sequence[Parameters], progress: Progress = SILENT
) -> tuple[TunedMixture, tuple[Fit, ...]]:
    """Fit a continuous cache, then gates without and with it; return what each is worth.

    parameters: the best fixed ones of each datastore. A gate is kept where it predicts text that it
    was not fitted to better than fixed weights do text that they were fitted to.
    """
    voters = [
        Voters(*(part[:, : p.k] for part in of_store))
        for of_store, p in zip(text.voters, parameters, strict=True)
    ]
    knn_ratios = [
        _ratios(text, nearest, p.temperature) for nearest, p in zip(voters, parameters, strict=True)
    ]
    fixed = _mixed(text, torch.stack(knn_ratios, dim=1), [p.lmbda for p in parameters])
    cache, lmbdas, with_cache = _fit_cache(text, knn_ratios, progress)
    fits = [_fit("fixed weights", text, fixed), _fit("fixed weights + cache", text, with_cache)]
    mixture = TunedMixture(cache, lmbdas)
    if len(text) < LEAST_TOKENS:
        return mixture, tuple(fits)
    if len(parameters) == 1:
        log_probs = _held_out_by_distance(text, voters[0], knn_ratios[0])
        fits.append(_fit("λ by distance", text, log_probs, held_out=True))
        everything = torch.ones(len(text), dtype=torch.bool)
        mixture = replace(
            mixture, by_distance=_fit_by_distance(text, voters[0], knn_ratios[0], everything)
        )
    sources = [GateInput(p.k, p.temperature) for p in parameters]
    cache_neighbors = text.cache_neighbors[CACHE_SIZES.index(cache.size)]
    cache_source = GateInput(CACHE_K, cache.votes.temperature)
    remembered = cache_neighbors.voters
    gate, log_probs = _fit_gate(text, sources, voters, progress)
    fits.append(_fit("learned weights", text, log_probs, held_out=True))
    if fits[-1].perplexity < fits[0].perplexity:
        mixture = replace(mixture, gate=gate)
    gate, log_probs = _fit_gate(text, [*sources, cache_source], [*voters, remembered], progress)
    fits.append(_fit("learned weights + cache", text, log_probs, held_out=True))
    if fits[-1].perplexity < fits[1].perplexity:
        mixture = replace(mixture, cache_gate=gate)
    return mixture, tuple(fits)


def _fit_by_distance(
    text: HeldOutText,
    voters: Voters,
    ratios: Float[Tensor, " token"],
    tokens: Bool[Tensor, " token"],
) -> BucketedLambda:
    """Fit λ by the nearest distance (Drozdov et al. 2022) to some tokens."""
    lm_log_probs = text.lm_log_probs[tokens].double()
    nearest = voters.squared_distances[tokens, 0]
    return fit_buckets(nearest, lm_log_probs, lm_log_probs + ratios[tokens].log())


def _held_out_by_distance(
    text: HeldOutText, voters: Voters, ratios: Float[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Return the true tokens' log p, each block of the text with the λ that suit the others."""
    log_probs = torch.empty(len(text), dtype=torch.float64)
    block = torch.arange(len(text)) * _BLOCKS // len(text)
    for held_out in range(_BLOCKS):
        own = block == held_out
        lmbda = _fit_by_distance(text, voters, ratios, ~own)(voters.squared_distances[own])
        log_probs[own] = text.lm_log_probs[own] + torch.log1p(lmbda * (ratios[own] - 1))
    return log_probs


def _fit_gate(
    text: HeldOutText, sources: Sequence[GateInput], voters: Sequence[Voters], progress: Progress
) -> tuple[LearnedGate, Float[Tensor, " token"]]:
    parts = []
    with progress.task("gate", len(text), "tokens") as advance:
        for start in range(0, len(text), _EXAMPLES_AT_ONCE):
            part = slice(start, start + _EXAMPLES_AT_ONCE)
            parts.append(
                make_examples(
                    sources,
                    text.lm.of(part),
                    text.lm_log_probs[part],
                    [of_source.of(part) for of_source in voters],
                    text.targets[part],
                )
            )
            advance(len(parts[-1]))
        fitted = fit_gate(sources, join_examples(parts))
    return fitted.gate, fitted.held_out_log_probs


def _fit_cache(
    text: HeldOutText, knn_ratios: Sequence[Float[Tensor, " token"]], progress: Progress
) -> tuple[CacheParameters, tuple[float, ...], Float[Tensor, " token"]]:
    """Return the best cache, the λ of each datastore beside it, and the true tokens' log p."""
    tried: dict[tuple[int, float], float] = {}

    def try_out(number: int, temperature: float, steps: int) -> tuple[list[float], Tensor]:
        voters = text.cache_neighbors[number].voters
        ratios = torch.stack([*knn_ratios, _ratios(text, voters, temperature)], dim=1)
        weights = fit_weights(ratios, steps)
        return weights, _mixed(text, ratios, weights)

    def look(number: int, temperature: float) -> None:
        if (number, temperature) not in tried:
            _, log_probs = try_out(number, temperature, _FEW_STEPS)
            tried[number, temperature] = float(log_probs.mean())

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
    weights, log_probs = try_out(number, best, _MANY_STEPS)
    votes = Parameters(CACHE_K, weights[-1], best)
    return CacheParameters(CACHE_SIZES[number], votes), tuple(weights[:-1]), log_probs


def fit_weights(ratios: Float[Tensor, "token part"], steps: int = _MANY_STEPS) -> list[float]:
    """Return the λ of each part that together fit best, in steps of 0.001.

    ratios: p / p_LM of the true token under each part. Likelihood is concave in the weights of a
    mixture, so expectation-maximization finds the best.
    """
    relative = torch.cat([torch.ones(len(ratios), 1, dtype=torch.float64), ratios.double()], dim=1)
    weights = torch.full((relative.shape[1],), 1 / relative.shape[1], dtype=torch.float64)
    for _ in range(steps):
        # parts' shares of each token: w_i r_i / Σ w_j r_j
        weights = weights * (relative / (relative @ weights)[:, None]).mean(dim=0)
    return [float(lmbda) for lmbda in ((weights[1:] * 1000).floor() / 1000).tolist()]


def _ratios(text: HeldOutText, voters: Voters, temperature: float) -> Float[Tensor, " token"]:
    """Return p / p_LM of the true tokens, 1 where there is no voter."""
    log_weights = neighbor_log_weights(voters.squared_distances, temperature)
    log_probs = target_knn_log_probs(log_weights, voters.tokens == text.targets[:, None])
    return relative_probs(log_probs, text.lm_log_probs, voters.present)


def relative_probs(
    log_probs: Float[Tensor, " token"],
    lm_log_probs: Float[Tensor, " token"],
    present: Bool[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Return p / p_LM in float64, 1 where nobody votes."""
    ratios = (log_probs.double() - lm_log_probs.double()).clamp_max(_LARGEST_LOG_RATIO).exp()
    return ratios.where(present, 1.0)


def _mixed(
    text: HeldOutText, ratios: Float[Tensor, "token part"], lmbdas: Sequence[float]
) -> Float[Tensor, " token"]:
    gains = ((ratios - 1) * torch.tensor(lmbdas, dtype=torch.float64)).sum(dim=1).log1p()
    return text.lm_log_probs.double() + gains


def _fit(
    name: str, text: HeldOutText, log_probs: Float[Tensor, " token"], held_out: bool = False
) -> Fit:
    perplexity = math.exp(-float(log_probs.double().mean()))
    return Fit(name, perplexity, share_hurt(log_probs, text.lm_log_probs), held_out)
