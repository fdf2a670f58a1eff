"""Search once, then sweep k, temperature and λ over the cached neighbors in seconds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.mixture.interpolation import neighbor_log_weights, target_knn_log_probs
from knnlm.mixture.parameters import Parameters, as_plain
from knnlm.mixture.stored import TunedMixture
from knnlm.progress import SILENT, Progress
from knnlm.text.corpus import Document
from knnlm.text.windows import Windowing
from knnlm.tuning.fitting import (
    Fit,
    HeldOutText,
    fit_mixture,
    fit_weights,
    read_held_out,
    relative_probs,
)

MAX_K = 1024
_COARSE_TEMPERATURES = tuple(m * 10.0**e for e in range(-1, 4) for m in (1, 2, 5))
_FURTHER = 24  # doublings or halvings beyond them, while the best lies at the edge
_FINER = (0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 1.75)
_COARSE_LMBDAS = tuple(step / 20 for step in range(1, 20))
_FINE_LMBDAS = tuple(step / 100 for step in range(1, 100))


@dataclass(frozen=True, slots=True)
class CachedNeighbors:
    """All that a sweep needs of a held-out text.

    lm_log_probs: of the true tokens. votes: which neighbors have the true token as their value.
    """

    lm_log_probs: Float[Tensor, " token"]
    squared_distances: Float[Tensor, "token k"]
    votes: Bool[Tensor, "token k"]


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


@dataclass(frozen=True, slots=True)
class Tuning:
    """What predicts a held-out text best.

    parameters: of each datastore, with fixed weights. sweeps: of each datastore alone; where there
    are several, k and T are those of its sweep, and the λ are fitted together. fits: what each way
    to mix gives. mixture: beyond the parameters, a continuous cache and gates.
    """

    parameters: tuple[Parameters, ...]
    tokens: int
    lm_perplexity: float
    knn_perplexity: float
    sweeps: tuple[Sweep, ...]
    fits: tuple[Fit, ...]
    mixture: TunedMixture

    def save(self, stores: Sequence[Datastore], text: Sequence[str]) -> None:
        """Store each datastore's parameters as its defaults, with where they come from.

        text: the names of the tuning text.
        """
        for store, parameters in zip(stores, self.parameters, strict=True):
            others = [str(other.path) for other in stores if other is not store]
            origin = {
                "text": list(text),
                "tokens": self.tokens,
                "lm_perplexity": self.lm_perplexity,
                "knn_perplexity": self.knn_perplexity,
                "together_with": others,
            }
            if store is stores[0]:
                origin["fits"] = [asdict(fit) for fit in self.fits]
                store.save_parameters(parameters, origin, self.mixture, stores[1:])
            else:
                store.save_parameters(parameters, origin)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON; `parameters` as `as_plain` gives them."""
        mixture = {
            "cache": asdict(self.mixture.cache),
            "lmbdas": self.mixture.lmbdas,
            "by_distance": self.mixture.by_distance is not None,
            "learned": self.mixture.gate is not None,
            "learned_with_cache": self.mixture.cache_gate is not None,
        }
        plain = {
            field.name: _plain(getattr(self, field.name))
            for field in fields(self)
            if field.name not in ("parameters", "mixture")
        }
        return {"parameters": as_plain(self.parameters), **plain, "mixture": mixture}


def _plain(value: Any) -> Any:
    return [asdict(item) for item in value] if isinstance(value, tuple) else value


def cache_neighbors(
    model: KNNLM,
    documents: Iterable[Document],
    k: int,
    windowing: Windowing | None = None,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> list[CachedNeighbors]:
    """Read a held-out text and search each datastore once, for the k nearest of every token.

    k: of a datastore with fewer entries, all of them. Takes 9·k bytes a token and datastore. Raises
    InvalidArgumentError for a text without tokens.
    """
    text = _read(model, documents, k, windowing, max_tokens, progress)
    return _cached(text)


def _read(
    model: KNNLM,
    documents: Iterable[Document],
    k: int,
    windowing: Windowing | None,
    max_tokens: int | None,
    progress: Progress,
) -> HeldOutText:
    windowing = windowing or model.windowing
    text = read_held_out(model, documents, k, windowing, max_tokens, progress)
    if text is None:
        raise InvalidArgumentError("the text to tune on must have a token, got none")
    return text


def _cached(text: HeldOutText) -> list[CachedNeighbors]:
    return [
        CachedNeighbors(
            text.lm_log_probs, voters.squared_distances, voters.tokens == text.targets[:, None]
        )
        for voters in text.voters
    ]


def tune(
    model: KNNLM,
    documents: Iterable[Document],
    *,
    max_k: int | None = None,
    windowing: Windowing | None = None,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> Tuning:
    """Find the k ≤ max_k (1,024), λ and temperature that predict a held-out text best.

    Of several datastores, k and temperature of each alone, then all λ together. Then a continuous
    cache, and, of a text of at least 2,048 tokens, gates that choose the weights of each token.
    """
    for retriever in model.retrievers:
        if len(retriever.store) == 0:
            raise InvalidArgumentError(
                f"{retriever.store.path} must have entries to tune on, got none"
            )
    if max_k is not None and max_k < 1:
        raise InvalidArgumentError(f"max_k must be at least 1, got {max_k}: ask for a neighbor")
    text = _read(model, documents, max_k or MAX_K, windowing, max_tokens, progress)
    cached = _cached(text)
    sweeps = tuple(sweep(of_one, progress) for of_one in cached)
    first = sweeps[0]
    parameters, knn_perplexity = tuple(one.parameters for one in sweeps), first.knn_perplexity
    if len(sweeps) > 1:
        parameters, knn_perplexity = fit_lmbdas(cached, parameters)
    mixture, fits = fit_mixture(text, parameters, progress)
    return Tuning(
        parameters, first.tokens, first.lm_perplexity, knn_perplexity, sweeps, fits, mixture
    )


def fit_lmbdas(
    cached: Sequence[CachedNeighbors], parameters: Sequence[Parameters]
) -> tuple[tuple[Parameters, ...], float]:
    """Return the parameters with the λ that together fit best, and the perplexity."""
    lm_log_probs = cached[0].lm_log_probs.double()
    ratios = []
    for of_one, given in zip(cached, parameters, strict=True):
        distances, votes = of_one.squared_distances[:, : given.k], of_one.votes[:, : given.k]
        log_probs = target_knn_log_probs(neighbor_log_weights(distances, given.temperature), votes)
        ratios.append(relative_probs(log_probs, lm_log_probs, distances[:, 0].isfinite()))
    together = torch.stack(ratios, dim=1)
    lmbdas = fit_weights(together)
    gain = torch.log1p(((together - 1) * torch.tensor(lmbdas)).sum(dim=1)).mean()
    chosen = tuple(
        replace(given, lmbda=lmbda) for given, lmbda in zip(parameters, lmbdas, strict=True)
    )
    return chosen, math.exp(-float(lm_log_probs.mean() + gain))


def sweep(cached: CachedNeighbors, progress: Progress = SILENT) -> Sweep:
    """Try powers of two for k, temperatures from coarse to fine, and λ in steps of 0.01."""
    most = cached.squared_distances.shape[1]
    ks = sorted({most, *(2**power for power in range(int(math.log2(most)) + 1))})
    gains: dict[tuple[int, float, float], float] = {}  # (k, T, λ) → nats a token less than the LM
    with progress.task("sweep", len(_COARSE_TEMPERATURES) + len(_FINER), "temperatures") as advance:
        for temperature in _COARSE_TEMPERATURES:
            gains |= _gains(cached, ks, temperature, _COARSE_LMBDAS)
            advance(1)
        best_temperature = _best_temperature(gains)
        for _ in range(_FURTHER):  # keys of another scale want other temperatures
            tried = {temperature for _, temperature, _ in gains}
            if min(tried) < best_temperature < max(tried):
                break
            factor = 2.0 if best_temperature == max(tried) else 0.5
            gains |= _gains(cached, ks, best_temperature * factor, _COARSE_LMBDAS)
            best_temperature = _best_temperature(gains)
        for factor in _FINER:
            temperature = float(f"{best_temperature * factor:.3g}")
            gains |= _gains(cached, ks, temperature, _FINE_LMBDAS)
            advance(1)
    lm_nats = -float(cached.lm_log_probs.double().mean())
    best = max(gains, key=gains.__getitem__)
    helps = gains[best] > 0
    k, temperature, lmbda = best

    def best_by(axis: int) -> tuple[Trial, ...]:
        winners: dict[float, tuple[int, float, float]] = {}
        for setting, gain in gains.items():
            value = setting[axis]
            if value not in winners or gain > gains[winners[value]]:
                winners[value] = setting
        return tuple(
            Trial(k, lmbda, temperature, math.exp(lm_nats - gains[k, temperature, lmbda]))
            for _, (k, temperature, lmbda) in sorted(winners.items())
        )

    return Sweep(
        parameters=Parameters(k, lmbda if helps else 0.0, temperature),
        tokens=len(cached.lm_log_probs),
        lm_perplexity=math.exp(lm_nats),
        knn_perplexity=math.exp(lm_nats - max(gains[best], 0.0)),
        by_k=best_by(0),
        by_lmbda=best_by(2),
        by_temperature=best_by(1),
    )


def _best_temperature(gains: dict[tuple[int, float, float], float]) -> float:
    return max(gains, key=gains.__getitem__)[1]


def _gains(
    cached: CachedNeighbors, ks: Sequence[int], temperature: float, lmbdas: Sequence[float]
) -> dict[tuple[int, float, float], float]:
    """Return the mean of log p − log p_LM for every k and λ at one temperature.

    With r = p_kNN / p_LM of the true token it is log(1 − λ + λ r). Neighbors are sorted, so the
    votes of the k nearest are sums over ranges between one k and the next.
    """
    nearest = cached.squared_distances[:, :1]
    relative = (cached.squared_distances - nearest.nan_to_num(posinf=0.0)) / temperature
    weights = torch.exp(-relative)
    present = nearest[:, 0].isfinite()
    lm_probs = cached.lm_log_probs.double().exp()
    all_votes = torch.zeros(len(weights), dtype=torch.float64)
    true_votes = torch.zeros_like(all_votes)
    gains = {}
    start = 0
    for k in ks:
        new = weights[:, start:k]
        all_votes += new.sum(dim=1)
        true_votes += (new * cached.votes[:, start:k]).sum(dim=1)
        start = k
        ratio = true_votes / all_votes.clamp_min(1e-300) / lm_probs.clamp_min(1e-300)
        ratio = torch.where(present, ratio, torch.ones_like(ratio))
        for lmbda in lmbdas:
            gains[k, temperature, lmbda] = float(torch.log1p(lmbda * (ratio - 1)).mean())
    return gains
