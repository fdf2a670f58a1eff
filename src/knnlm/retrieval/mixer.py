"""Mixers: retrievers and the continuous cache, mixed with a language model's predictions.

The weights are fixed, or chosen for each token by the nearest distance or by a learned gate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Unpack

from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Weights, parse_choice
from knnlm.errors import InvalidArgumentError
from knnlm.index.protocol import Index, Neighbors
from knnlm.mixture.continuous_cache import (
    CacheNeighbors,
    CacheParameters,
    CacheView,
    ContinuousCache,
)
from knnlm.mixture.features import Weighed, weigh
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.interpolation import (
    TokenSums,
    TokenVotes,
    Votes,
    interpolate_vocabulary,
    vote,
)
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.model.keyed_model import KeyedModel
from knnlm.retrieval.retriever import (
    ForEach,
    GivenParameters,
    Retriever,
    Stores,
    as_stores,
    check_total,
    open_retrievers,
    override,
)


class Retrieved(NamedTuple):
    """The neighbors of some keys, and all that can be computed before the LM's predictions.

    neighbors: from each retriever of `Mixer.searched`. votes, by_token: with weights that need no
    gate. weighed, sums: for a gate, which chooses the weights after the LM's predictions.
    """

    neighbors: Sequence[Neighbors]
    votes: Sequence[Votes] = ()
    by_token: Sequence[TokenVotes] = ()
    weighed: Sequence[Weighed] = ()
    sums: Sequence[TokenSums] = ()

    @property
    def coverage(self) -> float:
        """The least coverage of the searches; see `Neighbors`."""
        return min((nearest.coverage for nearest in self.neighbors), default=1.0)


class Mixed:
    """The mixture's predictions after some positions. log_probs: log p of every token."""

    def __init__(
        self,
        log_probs: Float[Tensor, "*position vocab"],
        choose_votes: Callable[[], Sequence[Votes]],
    ) -> None:
        self.log_probs = log_probs
        self._choose_votes = choose_votes

    @cached_property
    def votes(self) -> Sequence[Votes]:
        """The votes behind the predictions, from each searched retriever, the cache's last."""
        return self._choose_votes()

    def votes_at(self, query: int) -> list[Votes]:
        """Return the votes for one query, on the CPU."""
        return [Votes(*(column[[query]].cpu() for column in votes)) for votes in self.votes]


@dataclass(frozen=True, slots=True)
class Mixer:
    """Everything that is mixed with a language model's predictions.

    cache: the continuous cache, if there is one. gate: chooses all weights; without a gate each
    retriever chooses its own, and the cache's weight is fixed.
    """

    retrievers: tuple[Retriever, ...]
    cache: CacheParameters | None = None
    gate: LearnedGate | None = None

    @property
    def weights(self) -> Weights:
        """How the weights of each token's neighbors are chosen."""
        if self.gate is not None:
            return Weights.learned
        by_distance = any(retriever.by_distance is not None for retriever in self.retrievers)
        return Weights.distance if by_distance else Weights.fixed

    @property
    def unverified(self) -> tuple[str, ...]:
        """The datastores that were imported and not proved, whose keys may be another model's."""
        stores = (retriever.store for retriever in self.retrievers)
        return tuple(str(store.path) for store in stores if store.is_unverified)

    @property
    def searched(self) -> tuple[Retriever, ...]:
        """The retrievers whose neighbors are needed: all with a gate, else those with weight."""
        if self.gate is not None:
            return self.retrievers
        return tuple(retriever for retriever in self.retrievers if retriever.counts)

    @property
    def uses_cache(self) -> bool:
        """Whether the continuous cache can change a prediction."""
        return self.cache is not None and (self.gate is not None or self.cache.votes.lmbda > 0.0)

    @property
    def counts(self) -> bool:
        """Whether anything can change the model's predictions."""
        return self.uses_cache or any(len(retriever.store) > 0 for retriever in self.searched)

    def searching_all(self) -> "Mixer":
        """Return the mixer with indexes that leave nothing out, even where they may."""
        return replace(self, retrievers=tuple(one.searching_all() for one in self.retrievers))

    def new_cache(
        self, keys: Float[Tensor, "batch time dim"], position: int = 0
    ) -> ContinuousCache:
        """Return an empty continuous cache for sequences with keys like these."""
        assert self.cache is not None
        return ContinuousCache(
            self.cache.size,
            keys.shape[2],
            similarity=self.cache.similarity,
            batch=len(keys),
            device=keys.device,
            position=position,
        )

    def search(self, keys: Float[Tensor, "*position dim"]) -> Retrieved:
        """Search each retriever in `searched`, and do all that needs no language model."""
        return self.prepare(self.find(keys.flatten(0, -2)))

    def find(self, queries: Float[Tensor, "query dim"]) -> list[Neighbors]:
        """Search each retriever in `searched`; nothing for no queries."""
        return [one.search(queries) for one in self.searched] if len(queries) else []

    def prepare(self, neighbors: Sequence[Neighbors]) -> Retrieved:
        """Do all that needs no language model. neighbors: of each retriever, as `find` returns."""
        pairs = list(zip(self.searched, neighbors, strict=False))
        if self.gate is None:
            votes = [retriever.vote(nearest) for retriever, nearest in pairs]
            return Retrieved(neighbors, votes, [one.by_token() for one in votes])
        weighed = [
            weigh(own_input, retriever.voters(nearest))
            for own_input, (retriever, nearest) in zip(self.gate.inputs, pairs, strict=False)
        ]
        sums = [one.by_token() for one in weighed]
        return Retrieved(neighbors, weighed=weighed, sums=sums)

    def mix(
        self,
        retrieved: Retrieved,
        cache_view: CacheView | None,
        lm_log_probs: Float[Tensor, "*position vocab"],
    ) -> Mixed:
        """Mix the LM's predictions after some positions with the neighbors of their keys.

        retrieved: from `search`. cache_view: the positions' view of the continuous cache, where
        `uses_cache`. The mixture's log_probs are `lm_log_probs` itself where nothing counts.
        """
        if not self.counts or lm_log_probs.numel() == 0:
            return Mixed(lm_log_probs, lambda: retrieved.votes)
        cached: list[CacheNeighbors] = []
        if cache_view is not None:
            assert self.cache is not None
            cached.append(cache_view.nearest(self.cache.votes.k))
        rows = lm_log_probs.flatten(0, -2)
        if self.gate is None:
            cache_votes = self._cache_votes(cached)
            votes = [*retrieved.votes, *cache_votes]
            by_token = [*retrieved.by_token, *(one.by_token() for one in cache_votes)]
            mixed = interpolate_vocabulary(rows, by_token).reshape(lm_log_probs.shape)
            return Mixed(mixed, lambda: votes)
        cache_weighed = [weigh(self.gate.inputs[-1], one.voters) for one in cached]
        weighed = [*retrieved.weighed, *cache_weighed]
        sums = [*retrieved.sums, *(one.by_token() for one in cache_weighed)]
        lm = summarize_lm(rows.detach())
        gate = self.gate.on(lm.entropy.device)
        by_token = gate.choose_by_token(lm, weighed, sums)
        mixed = interpolate_vocabulary(rows, by_token).reshape(lm_log_probs.shape)
        return Mixed(mixed, lambda: gate.choose(lm, weighed))

    def votes(
        self,
        retrievers: Sequence[Retriever],
        neighbors: Sequence[Neighbors],
        cache_neighbors: Sequence[CacheNeighbors],
        lm: LMSummary | None,
    ) -> list[Votes]:
        """Return the votes of each retriever's neighbors in the mixture, the cache's last.

        For targets alone, without the whole vocabulary. retrievers: those in `searched`, or all,
        each with its neighbors. cache_neighbors: one where `uses_cache`. lm: where there is a gate.
        """
        pairs = list(zip(retrievers, neighbors, strict=True))
        if self.gate is None:
            votes = [retriever.vote(nearest) for retriever, nearest in pairs]
            return [*votes, *self._cache_votes(cache_neighbors)]
        assert lm is not None
        voters = [retriever.voters(nearest) for retriever, nearest in pairs]
        voters += [one.voters for one in cache_neighbors]
        chosen: list[Votes] = self.gate.on(lm.entropy.device)(lm, voters)
        return chosen

    def _cache_votes(self, cache_neighbors: Sequence[CacheNeighbors]) -> list[Votes]:
        """Return the continuous cache's votes with its fixed weight, if it is used."""
        if not cache_neighbors:
            return []
        assert self.cache is not None
        own = self.cache.votes
        return [vote(one.voters, own.temperature, own.lmbda) for one in cache_neighbors]


def open_mixer(
    model: KeyedModel,
    store: Stores,
    *,
    index: ForEach[Index] = None,
    cache: CacheParameters | bool = False,
    weights: str | None = None,
    **given: Unpack[GivenParameters],
) -> Mixer:
    """Open one or several datastores for a model, and choose how they are mixed.

    weights: see `Weights`; by default learned where `tune` stored a gate for these datastores and
    no parameters are given, neither k, lmbda and temperature nor the cache's; else fixed. cache:
    True for the continuous cache that `tune` stored. Raises DatastoreMismatchError for a datastore
    of another model, and InvalidArgumentError, also for weights that were never tuned.
    """
    if weights is not None:
        weights = parse_choice(Weights, "weights", weights)
    stores = as_stores(store)
    retrievers = open_retrievers(model, stores, index=index, **given)
    has_parameters = any(value is not None for value in given.values())
    _check_weights(weights, has_parameters, cache)
    if weights == Weights.distance:
        return Mixer(_by_distance(retrievers))
    if isinstance(cache, CacheParameters):
        return _with_fixed_cache(retrievers, cache)
    is_fixed = weights == Weights.fixed or has_parameters
    tuned = stores[0].mixture(stores[1:]) if cache or not is_fixed else None
    gate = None if tuned is None else tuned.cache_gate if cache else tuned.gate
    if weights == Weights.learned and gate is None:
        raise InvalidArgumentError(
            "weights='learned' must have been learned for these datastores, from enough text, and "
            "they were not: run knnlm tune, or choose fixed"
        )
    if cache and tuned is None:
        raise InvalidArgumentError(
            "cache must have been tuned for these datastores, and it was not: run knnlm tune, or "
            "give its parameters"
        )
    if tuned is None or (not cache and gate is None):
        return Mixer(retrievers)
    if gate is not None and not is_fixed:
        return Mixer(retrievers, tuned.cache if cache else None, gate.to(model.device))
    if not is_fixed:
        retrievers = override(retrievers, lmbda=tuned.lmbdas)
    return _with_fixed_cache(retrievers, tuned.cache)


def _check_weights(
    weights: str | None, has_parameters: bool, cache: CacheParameters | bool
) -> None:
    """Refuse weights that were tuned with parameters other than the given ones."""
    if weights == Weights.learned and (has_parameters or isinstance(cache, CacheParameters)):
        raise InvalidArgumentError(
            "weights='learned' must come without k, lmbda, temperature and the cache's parameters: "
            "the gate uses those that it was learned with"
        )
    if weights == Weights.distance and (has_parameters or cache):
        raise InvalidArgumentError(
            "weights='distance' must come without k, lmbda, temperature and cache: it uses the "
            "k and T that it was tuned with"
        )


def override_mixer(mixer: Mixer, **given: Unpack[GivenParameters]) -> Mixer:
    """Return the mixer with the given parameters, and then with fixed weights."""
    if all(value is None for value in given.values()):
        return mixer
    retrievers = override(mixer.retrievers, **given)
    return Mixer(retrievers) if mixer.cache is None else _with_fixed_cache(retrievers, mixer.cache)


def _by_distance(retrievers: tuple[Retriever, ...]) -> tuple[Retriever, ...]:
    tuned = retrievers[0].store.mixture() if len(retrievers) == 1 else None
    if tuned is None or tuned.by_distance is None:
        raise InvalidArgumentError(
            "weights='distance' must have been tuned for this datastore alone, on text that was "
            "long enough, and it was not: run knnlm tune, or choose learned or fixed"
        )
    return (replace(retrievers[0], by_distance=tuned.by_distance),)


def _with_fixed_cache(retrievers: tuple[Retriever, ...], cache: CacheParameters) -> Mixer:
    weights = [*(retriever.parameters for retriever in retrievers), cache.votes]
    check_total(weights, "the datastores and the continuous cache")
    return Mixer(retrievers, cache)
