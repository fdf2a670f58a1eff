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
from knnlm.mixture.by_distance import BucketedLambda
from knnlm.mixture.interpolation import Voters, Votes, neighbor_log_weights
from knnlm.mixture.parameters import Parameters
from knnlm.model.keyed_model import KeyedModel

Value = TypeVar("Value")
ForEach: TypeAlias = Value | Sequence[Value | None] | None
"""One value for every datastore, or a sequence with one for each; None for the stored default."""


@dataclass(frozen=True, slots=True)
class Retriever:
    """A datastore in a mixture: how it is searched, and how its neighbors' vote counts.

    by_distance: gives each query its λ, in place of the parameters'; None for that one.
    """

    store: Datastore
    index: Index
    parameters: Parameters
    by_distance: BucketedLambda | None = None

    @property
    def counts(self) -> bool:
        """Whether it can change anything: λ > 0, and an entry to find."""
        weighs = self.parameters.lmbda > 0.0 or self.by_distance is not None
        return weighs and len(self.store) > 0

    def search(self, keys: Float[Tensor, "query dim"]) -> Neighbors:
        """Return the k nearest entries of each key, k being its parameter."""
        return self.index.search(keys.float(), self.parameters.k)

    def tokens(self, neighbors: Neighbors) -> Int[Tensor, "query k"]:
        """Return the token that each neighbor votes for, −1 where it is absent."""
        values = self.store.values[neighbors.rows.clamp_min(0).cpu()]
        return values.to(neighbors.rows.device).masked_fill(~neighbors.present, -1)

    def voters(self, neighbors: Neighbors) -> Voters:
        """Return the neighbors as voters."""
        return Voters(neighbors.squared_distances.float(), self.tokens(neighbors))

    def votes_for_targets(
        self, neighbors: Neighbors, targets: Int[Tensor, " query"]
    ) -> Bool[Tensor, "query k"]:
        """Return which neighbors have the query's target as their value."""
        return self.tokens(neighbors) == targets[:, None]

    def vote(self, neighbors: Neighbors) -> Votes:
        """Return what the neighbors say, and how much that counts."""
        distances = neighbors.squared_distances
        return Votes(
            neighbor_log_weights(distances, self.parameters.temperature),
            self.tokens(neighbors),
            self.parameters.lmbda if self.by_distance is None else self.by_distance(distances),
            neighbors.present.any(dim=1),
        )


def open_retrievers(
    model: KeyedModel,
    store: Datastore | Sequence[Datastore],
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
    index: ForEach[Index] = None,
) -> tuple[Retriever, ...]:
    """Open one or several datastores for a model, and choose their parameters.

    See `choose_parameters`; index: by default the datastore's own, searched where the model is.
    Raises DatastoreMismatchError for a datastore of another model.
    """
    stores = as_stores(store)
    for one in stores:
        one.check_model(model)
    chosen = choose_parameters(store, k=k, lmbda=lmbda, temperature=temperature)
    return tuple(
        Retriever(
            one, open_index(one, device=str(model.device)) if given is None else given, parameters
        )
        for one, given, parameters in zip(
            stores, for_each("index", index, len(stores)), chosen, strict=True
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
    stores = as_stores(store)
    defaults = [one.parameters or Parameters() for one in stores]
    capped = [
        replace(default, k=min(default.k, max(len(one), 1)))
        for one, default in zip(stores, defaults, strict=True)
    ]
    return _fill_in(stores, capped, k, lmbda, temperature)


def override(
    retrievers: Sequence[Retriever],
    *,
    k: ForEach[int] = None,
    lmbda: ForEach[float] = None,
    temperature: ForEach[float] = None,
) -> tuple[Retriever, ...]:
    """Return the retrievers with what is asked for, and λ fixed.

    The rules are those of `choose_parameters`.
    """
    stores = [retriever.store for retriever in retrievers]
    defaults = [retriever.parameters for retriever in retrievers]
    chosen = _fill_in(stores, defaults, k, lmbda, temperature)
    return tuple(
        replace(retriever, parameters=parameters, by_distance=None)
        for retriever, parameters in zip(retrievers, chosen, strict=True)
    )


def _fill_in(
    stores: Sequence[Datastore],
    defaults: Sequence[Parameters],
    k: ForEach[int],
    lmbda: ForEach[float],
    temperature: ForEach[float],
) -> tuple[Parameters, ...]:
    given = zip(
        stores,
        defaults,
        for_each("k", k, len(stores)),
        for_each("lmbda", lmbda, len(stores)),
        for_each("temperature", temperature, len(stores)),
        strict=True,
    )
    chosen = tuple(_choose(*of_one) for of_one in given)
    check_total(chosen)
    return chosen


def check_total(parameters: Sequence[Parameters], of: str = "several datastores") -> None:
    """Refuse weights λ that leave the language model less than nothing."""
    total = sum(of_one.lmbda for of_one in parameters)
    if total > 1.0 + 1e-9:
        weights = " + ".join(f"{of_one.lmbda:g}" for of_one in parameters)
        raise InvalidArgumentError(
            f"the weights lmbda (λ) of {of} must add up to at most 1, got {weights} = {total:g}: "
            "give each a smaller one, or tune them together"
        )


def _choose(
    store: Datastore,
    default: Parameters,
    k: int | None,
    lmbda: float | None,
    temperature: float | None,
) -> Parameters:
    if k is not None and k > len(store):
        raise InvalidArgumentError(
            f"k must be at most the number of entries, {len(store)}, got {k}: ask for fewer"
        )
    return Parameters(
        k=default.k if k is None else k,
        lmbda=default.lmbda if lmbda is None else lmbda,
        temperature=default.temperature if temperature is None else temperature,
    )


def as_stores(store: Datastore | Sequence[Datastore]) -> Sequence[Datastore]:
    """Return one or several datastores as several; raises InvalidArgumentError for none."""
    stores = [store] if isinstance(store, Datastore) else store
    if not stores:
        raise InvalidArgumentError("store must be a datastore or several, got none")
    return stores


def for_each(name: str, given: ForEach[Value], count: int) -> Sequence[Value | None]:
    """Return an argument's value for each of `count` datastores; raises InvalidArgumentError."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InvalidArgumentError(
            f"{name} must be one value, or one for each of the {count} datastores, got {len(given)}"
        )
    return given
