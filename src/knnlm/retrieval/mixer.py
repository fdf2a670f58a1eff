"""Mixers: who is asked beside the language model, and how much each answer counts.

Fixed weights, or a gate that chooses them for each token; datastores, and the continuous cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Weights, parse_choice
from knnlm.datastore.datastore import Datastore
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
    neighbor_log_weights,
    sum_by_token,
)
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.model.keyed_model import KeyedModel
from knnlm.retrieval.retriever import (
    ForEach,
    Retriever,
    as_stores,
    check_total,
    open_retrievers,
    override,
)


@dataclass(frozen=True, slots=True)
class Mixer:
    """Everything that is mixed with a language model's predictions.

    cache: the continuous cache, None for none. gate: chooses every weight; without one, each
    memory chooses its own, and the cache's is fixed.
    """

    retrievers: tuple[Retriever, ...]
    cache: CacheParameters | None = None
    gate: LearnedGate | None = None

    @property
    def weights(self) -> Weights:
        """What chooses the weights of each token's neighbors."""
        if self.gate is not None:
            return Weights.learned
        by_distance = any(retriever.by_distance is not None for retriever in self.retrievers)
        return Weights.distance if by_distance else Weights.fixed

    @property
    def searched(self) -> tuple[Retriever, ...]:
        """The retrievers whose neighbors are needed: without a gate, those that count."""
        if self.gate is not None:
            return self.retrievers
        return tuple(retriever for retriever in self.retrievers if retriever.counts)

    @property
    def uses_cache(self) -> bool:
        """Whether what the continuous cache remembers is needed."""
        return self.cache is not None and (self.gate is not None or self.cache.votes.lmbda > 0.0)

    @property
    def counts(self) -> bool:
        """Whether anything can change the model's predictions."""
        return self.uses_cache or any(len(retriever.store) > 0 for retriever in self.searched)

    def new_cache(
        self, keys: Float[Tensor, "batch time dim"], position: int = 0
    ) -> ContinuousCache:
        """Return a cache for sequences with keys like these, that remembers nothing yet."""
        assert self.cache is not None
        return ContinuousCache(
            self.cache.size,
            keys.shape[2],
            similarity=self.cache.similarity,
            batch=len(keys),
            device=keys.device,
            position=position,
        )

    def nearest(self, cache_view: CacheView) -> CacheNeighbors:
        """Return the pairs that vote, of what the cache remembers."""
        assert self.cache is not None
        return cache_view.nearest(self.cache.votes.k)

    def ask(self, keys: Float[Tensor, "query dim"]) -> "Asked":
        """Search each retriever in `searched`, and do all that needs no language model."""
        neighbors = [retriever.search(keys) for retriever in self.searched] if len(keys) else []
        found = list(zip(self.searched, neighbors, strict=False))
        if self.gate is None:
            votes = [retriever.vote(of_one).by_token() for retriever, of_one in found]
            return Asked(neighbors, votes, [], [])
        voters = [retriever.voters(of_one) for retriever, of_one in found]
        sources = self.gate.inputs
        weighed = [weigh(*of_source) for of_source in zip(sources, voters, strict=False)]
        return Asked(neighbors, [], weighed, [_sums(one) for one in weighed])

    def votes(
        self,
        retrievers: Sequence[Retriever],
        neighbors: Sequence[Neighbors],
        cache_neighbors: CacheNeighbors | None,
        lm: LMSummary | None,
    ) -> list[Votes]:
        """Return how each source's voters enter the mixture, the cache's last.

        retrievers: those in `searched`, or all; neighbors: of each. cache_neighbors: where
        `uses_cache`. lm: what the model says, where there is a gate.
        """
        if self.gate is None:
            votes = [
                retriever.vote(found)
                for retriever, found in zip(retrievers, neighbors, strict=True)
            ]
            return [*votes, *self._cache_votes(cache_neighbors)]
        assert lm is not None
        voters = [
            retriever.voters(found) for retriever, found in zip(retrievers, neighbors, strict=True)
        ]
        if cache_neighbors is not None:
            voters.append(cache_neighbors.voters)
        chosen: list[Votes] = self.gate.on(lm.entropy.device)(lm, voters)
        return chosen

    def _cache_votes(self, cache_neighbors: CacheNeighbors | None) -> list[Votes]:
        """Return the continuous cache's fixed vote, if it has one."""
        if cache_neighbors is None:
            return []
        assert self.cache is not None
        temperature, lmbda = self.cache.votes.temperature, self.cache.votes.lmbda
        log_weights = neighbor_log_weights(cache_neighbors.squared_distances, temperature)
        present = cache_neighbors.squared_distances[:, 0].isfinite()
        return [Votes(log_weights, cache_neighbors.tokens, lmbda, present)]

    def mix_vocabulary(
        self,
        asked: "Asked",
        cache_neighbors: CacheNeighbors | None,
        lm_log_probs: Float[Tensor, "query vocab"],
    ) -> Float[Tensor, "query vocab"]:
        """Return log p of every token. asked: what `ask` found; cache_neighbors: see `votes`.

        Where nothing counts, `lm_log_probs` come back as they are.
        """
        if not self.counts or len(lm_log_probs) == 0:
            return lm_log_probs
        if self.gate is None:
            by_token = [
                *asked.votes,
                *(one.by_token() for one in self._cache_votes(cache_neighbors)),
            ]
        else:
            weighed, sums = asked.weighed, asked.sums
            if cache_neighbors is not None:
                of_cache = weigh(self.gate.inputs[-1], cache_neighbors.voters)
                weighed, sums = [*weighed, of_cache], [*sums, _sums(of_cache)]
            lm = summarize_lm(lm_log_probs.detach())
            by_token = self.gate.on(lm.entropy.device).choose_by_token(lm, weighed, sums)
        return interpolate_vocabulary(lm_log_probs, by_token)


class Asked(NamedTuple):
    """What was found near some keys: in each retriever in `Mixer.searched`.

    votes: for each token, where weights are fixed. weighed, sums: for a gate, which has to see the
    language model before it chooses.
    """

    neighbors: list[Neighbors]
    votes: list[TokenVotes]
    weighed: list[Weighed]
    sums: list[TokenSums]


def _sums(weighed: Weighed) -> TokenSums:
    return sum_by_token(weighed.log_weights, weighed.voters.tokens)


def open_mixer(
    model: KeyedModel,
    store: Datastore | Sequence[Datastore],
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
    index: ForEach[Index] = None,
    cache: CacheParameters | bool = False,
    weights: str | None = None,
) -> Mixer:
    """Open one or several datastores for a model, and choose how they are mixed.

    weights: see `Weights`; None for learned weights where `tune` stored a gate for these datastores
    and none of k, lmbda, temperature and the cache's parameters is given, else fixed ones. cache:
    True for the continuous cache that `tune` stored. Raises DatastoreMismatchError for a datastore
    of another model, and InvalidArgumentError, also for weights that were never tuned.
    """
    if weights is not None:
        weights = parse_choice(Weights, "weights", weights)
    retrievers = open_retrievers(
        model, store, k=k, lmbda=lmbda, temperature=temperature, index=index
    )
    given = any(one is not None for one in (k, lmbda, temperature))
    if weights == Weights.learned and (given or isinstance(cache, CacheParameters)):
        raise InvalidArgumentError(
            "weights='learned' must come without k, lmbda, temperature and the cache's parameters: "
            "the gate uses those that it was learned with"
        )
    if weights == Weights.distance:
        if given or cache:
            raise InvalidArgumentError(
                "weights='distance' must come without k, lmbda, temperature and cache: it uses the "
                "k and T that it was tuned with"
            )
        return Mixer(_by_distance(retrievers))
    fixed = weights == Weights.fixed or given
    if isinstance(cache, CacheParameters):
        return _with_fixed_cache(retrievers, cache)
    if fixed and not cache:
        return Mixer(retrievers)
    stores = as_stores(store)
    tuned = stores[0].mixture(stores[1:])
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
    if tuned is None:
        return Mixer(retrievers)
    if fixed:
        return _with_fixed_cache(retrievers, tuned.cache)
    if gate is not None:
        return Mixer(retrievers, tuned.cache if cache else None, gate.to(model.device))
    if not cache:
        return Mixer(retrievers)
    return Mixer(override(retrievers, lmbda=tuned.lmbdas), tuned.cache)


def override_mixer(
    mixer: Mixer,
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
) -> Mixer:
    """Return the mixer with what is asked for; then its weights are fixed."""
    if k is None and lmbda is None and temperature is None:
        return mixer
    retrievers = override(mixer.retrievers, k=k, lmbda=lmbda, temperature=temperature)
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
