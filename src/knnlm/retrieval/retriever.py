"""Retrievers: datastores as parts of a mixture, each with its index, k, λ and temperature."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from jaxtyping import Float, Int
from torch import Tensor

from knnlm.choices import Coverage
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.policy import open_index
from knnlm.index.protocol import Index, Neighbors, PartialIndex
from knnlm.mixture.by_distance import BucketedLambda
from knnlm.mixture.interpolation import Voters, Votes, vote
from knnlm.mixture.parameters import Parameters
from knnlm.model.keyed_model import KeyedModel

_LOG = logging.getLogger(__name__)

Value = TypeVar("Value")
ForEach: TypeAlias = Value | Sequence[Value | None] | None
"""One value for every datastore, or a sequence with one for each; None for the stored default."""

Stores: TypeAlias = str | Path | Datastore | Sequence[str | Path | Datastore]
"""One datastore or several, each of them open or named by its folder."""


class GivenParameters(TypedDict, total=False):
    """The parameters that a caller chooses; those left out are the stored defaults."""

    k: ForEach[int]
    lmbda: ForEach[float]
    temperature: ForEach[float]


@dataclass(frozen=True, slots=True)
class Retriever:
    """A datastore in a mixture: how it is searched, and how much its neighbors' votes count.

    by_distance: chooses a λ for each query; None where all queries have the parameters' λ.
    """

    store: Datastore
    index: Index
    parameters: Parameters
    by_distance: BucketedLambda | None = None

    @property
    def counts(self) -> bool:
        """Whether it can change a prediction: it has weight and entries."""
        has_weight = self.parameters.lmbda > 0.0 or self.by_distance is not None
        return has_weight and len(self.store) > 0

    def search(self, keys: Float[Tensor, "query dim"]) -> Neighbors:
        """Return the entries nearest to each key, `parameters.k` of them."""
        return self.index.search(keys.float(), self.parameters.k)

    def searching_all(self) -> "Retriever":
        """Return the retriever with an index that leaves nothing out, even where it may."""
        if not isinstance(self.index, PartialIndex):
            return self
        return replace(self, index=self.index.with_coverage(Coverage.whole))

    def keep_nearest(self, neighbors: Neighbors) -> Neighbors:
        """Return only the k nearest, where more neighbors than that were searched for."""
        k = self.parameters.k
        return replace(
            neighbors,
            squared_distances=neighbors.squared_distances[:, :k],
            rows=neighbors.rows[:, :k],
        )

    def tokens(self, neighbors: Neighbors) -> Int[Tensor, "query k"]:
        """Return the token that each neighbor votes for, −1 where it is absent."""
        values = self.store.values[neighbors.rows.clamp_min(0).cpu()]
        return values.to(neighbors.rows.device).masked_fill(~neighbors.present, -1)

    def voters(self, neighbors: Neighbors) -> Voters:
        """Return the neighbors as voters."""
        return Voters(neighbors.squared_distances.float(), self.tokens(neighbors))

    def vote(self, neighbors: Neighbors) -> Votes:
        """Return the neighbors' votes with fixed weights, or with λ by distance."""
        voters = self.voters(neighbors)
        lmbda: float | Tensor = self.parameters.lmbda
        if self.by_distance is not None:
            lmbda = self.by_distance(voters.squared_distances)
        return vote(voters, self.parameters.temperature, lmbda)


def open_retrievers(
    model: KeyedModel,
    stores: Sequence[Datastore],
    *,
    index: ForEach[Index] = None,
    **given: Unpack[GivenParameters],
) -> tuple[Retriever, ...]:
    """Open the indexes of some datastores for a model, and choose their parameters.

    given: see `choose_parameters`. index: by default the datastore's own, on the model's device.
    Raises DatastoreMismatchError for a datastore that was built with another model; warns of
    unverified ones.
    """
    for store in stores:
        store.check_model(model)
        if store.is_unverified:
            _LOG.warning(
                "%s is unverified: it was imported without reading it again with the model, so "
                "that its keys may be another's; prove it: knnlm import %s --model MODEL",
                store.path,
                store.path,
            )
    parameters = choose_parameters(stores, **given)
    indexes = [
        open_index(store, device=str(model.device)) if own is None else own
        for store, own in zip(stores, for_each("index", index, len(stores)), strict=True)
    ]
    return tuple(map(Retriever, stores, indexes, parameters))


def choose_parameters(store: Stores, **given: Unpack[GivenParameters]) -> tuple[Parameters, ...]:
    """Fill in the parameters that were not given: a datastore's tuned values, else the paper's.

    A default k is at most the number of entries; a given k that exceeds it is refused. Raises
    InvalidArgumentError, also where the weights λ of several datastores add up to more than 1.
    """
    stores = as_stores(store)
    defaults = [
        replace(default, k=min(default.k, max(len(one), 1)))
        for one in stores
        for default in [one.parameters or Parameters()]
    ]
    return _fill_in(stores, defaults, given)


def override(
    retrievers: Sequence[Retriever], **given: Unpack[GivenParameters]
) -> tuple[Retriever, ...]:
    """Return the retrievers with the given parameters, and λ fixed.

    The rules are those of `choose_parameters`.
    """
    stores = [retriever.store for retriever in retrievers]
    chosen = _fill_in(stores, [retriever.parameters for retriever in retrievers], given)
    return tuple(
        replace(retriever, parameters=parameters, by_distance=None)
        for retriever, parameters in zip(retrievers, chosen, strict=True)
    )


def _fill_in(
    stores: Sequence[Datastore], defaults: Sequence[Parameters], given: GivenParameters
) -> tuple[Parameters, ...]:
    columns: dict[str, Sequence[Any]] = {
        name: for_each(name, values, len(stores)) for name, values in given.items()
    }
    chosen = []
    for number, (store, default) in enumerate(zip(stores, defaults, strict=True)):
        own = {name: values[number] for name, values in columns.items()}
        own = {name: value for name, value in own.items() if value is not None}
        parameters = replace(default, **own)
        if "k" in own and parameters.k > len(store):
            raise InvalidArgumentError(
                f"k must be at most the number of entries, {len(store)}, got {parameters.k}: ask "
                "for fewer"
            )
        chosen.append(parameters)
    check_total(chosen)
    return tuple(chosen)


def check_total(parameters: Sequence[Parameters], sources: str = "several datastores") -> None:
    """Refuse weights λ that add up to more than 1; raises InvalidArgumentError."""
    total = sum(one.lmbda for one in parameters)
    if total > 1.0 + 1e-9:
        weights = " + ".join(f"{one.lmbda:g}" for one in parameters)
        raise InvalidArgumentError(
            f"the weights lmbda (λ) of {sources} must add up to at most 1, got {weights} = "
            f"{total:g}: give each a smaller one, or tune them together"
        )


def as_stores(store: Stores) -> list[Datastore]:
    """Return one or several datastores as a list, opening those that are named by their folder.

    Raises InvalidArgumentError for none and for a wrong type, and what opening a `Datastore` does.
    """
    stores: Sequence[Any] = (
        [store] if isinstance(store, str) or not isinstance(store, Sequence) else store
    )
    if not stores:
        raise InvalidArgumentError("store must be a datastore or several, got none")
    return [open_datastore(one) for one in stores]


def for_each(name: str, given: ForEach[Value], count: int) -> Sequence[Value | None]:
    """Return an argument's value for each of `count` datastores; raises InvalidArgumentError."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InvalidArgumentError(
            f"{name} must be one value, or one for each of the {count} datastores, got {len(given)}"
        )
    return given
