"""Memories: datastores as parts of a mixture, each with its index, its k, its λ and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.policy import open_index
from knnlm.index.protocol import Index, Neighbors
from knnlm.keyed_model import KeyedModel
from knnlm.mixture.interpolation import (
    Component,
    Votes,
    interpolate_vocabulary,
    neighbor_log_weights,
    target_knn_log_probs,
)
from knnlm.mixture.parameters import Parameters

Value = TypeVar("Value")
ForEach: TypeAlias = Value | Sequence[Value | None] | None
"""One value for every datastore, or a sequence with one for each; None for the stored default."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A datastore in a mixture: how it is searched, and how its neighbors' vote counts."""

    store: Datastore
    index: Index
    parameters: Parameters

    @property
    def counts(self) -> bool:
        """Whether it can change anything: λ > 0, and an entry to find."""
        return self.parameters.lmbda > 0.0 and len(self.store) > 0

    def search(self, keys: Float[Tensor, "query dim"]) -> Neighbors:
        """Return the k nearest entries of each key, k being its parameter."""
        return self.index.search(keys.float(), self.parameters.k)

    def votes(self, neighbors: Neighbors) -> Int[Tensor, "query k"]:
        """Return the token that each neighbor votes for; what an absent one has means nothing."""
        values = self.store.values[neighbors.rows.clamp_min(0).cpu()]
        return values.to(neighbors.rows.device)

    def votes_for_targets(
        self, neighbors: Neighbors, targets: Int[Tensor, " query"]
    ) -> Bool[Tensor, "query k"]:
        """Return which neighbors have the query's target as their value."""
        return (self.votes(neighbors) == targets[:, None]) & neighbors.present

    def target_component(self, neighbors: Neighbors, targets: Int[Tensor, " query"]) -> Component:
        """Return what the neighbors say of one target a query."""
        weights = neighbor_log_weights(neighbors.squared_distances, self.parameters.temperature)
        return Component(
            target_knn_log_probs(weights, self.votes_for_targets(neighbors, targets)),
            self.parameters.lmbda,
            neighbors.present.any(dim=1),
        )

    def vocabulary_component(self, neighbors: Neighbors) -> Votes:
        """Return what the neighbors say of the whole vocabulary."""
        return Votes(
            neighbor_log_weights(neighbors.squared_distances, self.parameters.temperature),
            self.votes(neighbors),
            self.parameters.lmbda,
            neighbors.present.any(dim=1),
        )


def mix(
    memories: Sequence[Memory],
    keys: Float[Tensor, "query dim"],
    lm_log_probs: Float[Tensor, "query vocab"],
) -> Float[Tensor, "query vocab"]:
    """Return log p of the whole vocabulary under the mixture.

    Memories with λ = 0 are not searched; if no other is left, `lm_log_probs` come back as they are.
    """
    counting = [memory for memory in memories if memory.counts]
    if not counting or len(keys) == 0:
        return lm_log_probs
    components = [memory.vocabulary_component(memory.search(keys)) for memory in counting]
    return interpolate_vocabulary(lm_log_probs, components)


def open_memories(
    model: KeyedModel,
    store: Datastore | Sequence[Datastore],
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
    index: ForEach[Index] = None,
) -> tuple[Memory, ...]:
    """Open one or several datastores for a model, and choose their parameters.

    See `choose_parameters`; index: by default the datastore's own, searched where the model is.
    Raises DatastoreMismatchError for a datastore of another model.
    """
    stores = _sequence(store)
    for one in stores:
        one.check_model(model)
    chosen = choose_parameters(store, k=k, lmbda=lmbda, temperature=temperature)
    return tuple(
        Memory(
            one, open_index(one, device=str(model.device)) if given is None else given, parameters
        )
        for one, given, parameters in zip(
            stores, _for_each("index", index, len(stores)), chosen, strict=True
        )
    )


def choose_parameters(
    store: Datastore | Sequence[Datastore],
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
) -> tuple[Parameters, ...]:
    """Fill in what was not asked for: a datastore's tuned values, else the paper's.

    A default k is at most the number of entries; one that was asked for and is more is refused.
    Raises InvalidArgumentError, also where the weights λ of several datastores add up to more
    than 1.
    """
    stores = _sequence(store)
    if not stores:
        raise InvalidArgumentError("store must be a datastore or several, got none")
    given = zip(
        stores,
        _for_each("k", k, len(stores)),
        _for_each("lmbda", lmbda, len(stores)),
        _for_each("temperature", temperature, len(stores)),
        strict=True,
    )
    chosen = tuple(_choose(*of_one) for of_one in given)
    total = sum(parameters.lmbda for parameters in chosen)
    if total > 1.0 + 1e-9:
        weights = " + ".join(f"{parameters.lmbda:g}" for parameters in chosen)
        raise InvalidArgumentError(
            f"the weights lmbda (λ) of several datastores must add up to at most 1, got {weights} "
            f"= {total:g}: give each a smaller one, or tune them together"
        )
    return chosen


def _choose(
    store: Datastore, k: int | None, lmbda: float | None, temperature: float | None
) -> Parameters:
    default = store.parameters or Parameters()
    default = replace(default, k=min(default.k, max(len(store), 1)))
    if k is not None and k > len(store):
        raise InvalidArgumentError(
            f"k must be at most the number of entries, {len(store)}, got {k}: ask for fewer"
        )
    return Parameters(
        k=default.k if k is None else k,
        lmbda=default.lmbda if lmbda is None else lmbda,
        temperature=default.temperature if temperature is None else temperature,
    )


def _sequence(store: Datastore | Sequence[Datastore]) -> Sequence[Datastore]:
    return [store] if isinstance(store, Datastore) else store


def _for_each(name: str, given: ForEach[Value], count: int) -> Sequence[Value | None]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InvalidArgumentError(
            f"{name} must be one value, or one for each of the {count} datastores, got {len(given)}"
        )
    return given
