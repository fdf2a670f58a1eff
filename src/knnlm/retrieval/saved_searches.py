"""Saved searches: neighbors that are reached by pointers, or not needed, instead of searched for.

Where pointers reach enough entries, these are the neighbors. Elsewhere a search is made, if it
matters, as far as the language model alone can tell; if it does not, there are no neighbors, and
the mixture is p_LM. (The votes of a few reached entries make predictions worse.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.protocol import Neighbors
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.search_gate import SearchGate
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.pointers import Pointers
from knnlm.retrieval.retriever import Retriever
from knnlm.rules import check_share, check_whole

Search = Callable[[Int[Tensor, " some"]], Sequence[Neighbors]]
"""Searches for some of the sequences, by their numbers: neighbors from each retriever."""


@dataclass(frozen=True, slots=True)
class SavingRule:
    """Where searches are saved.

    pointers: reached entries are the neighbors where there are at least so many in each datastore
    (≥ 1); None: pointers are not followed. gate, least_gain: elsewhere a search is made where the
    gate expects it to gain at least so many nats; without a gate, always. Raises
    InvalidArgumentError.
    """

    pointers: int | None = None
    gate: SearchGate | None = None
    least_gain: float = 0.0

    def __post_init__(self) -> None:
        if self.pointers is not None:
            check_whole("pointers", self.pointers, remedy="leave them out to search always")

    def matters(
        self, lm: LMSummary | None, keys: Float[Tensor, "query dim"]
    ) -> Bool[Tensor, " query"]:
        """Return whether a search can be expected to matter. lm: of each query, for a gate."""
        if self.gate is None:
            return torch.ones(len(keys), dtype=torch.bool)
        assert lm is not None
        return self.gate(lm, keys) >= self.least_gain


def choose_saving(
    stores: Sequence[Datastore], pointers: int | None = None, skip: float = 0.0
) -> SavingRule | None:
    """Return the rule by which searches are saved, None where they are not.

    pointers: see `SavingRule`. skip: the share of searches that the gate that `tune` stored for
    these datastores leaves out. Raises InvalidArgumentError, also where no gate was tuned.
    """
    skip = check_share("skip", skip)
    if skip == 0.0:
        return None if pointers is None else SavingRule(pointers)
    tuned = stores[0].mixture(stores[1:])
    if tuned is None or tuned.search_gate is None:
        raise InvalidArgumentError(
            "skip must have been tuned for these datastores, on text that was long enough, and it "
            "was not: run knnlm tune, or leave it out"
        )
    return SavingRule(pointers, tuned.search_gate, tuned.search_gate.least_gain(skip))


class Walks:
    """The neighbors of several sequences, position by position, with few searches.

    made: how many searches were made, of `positions` that could have had one.
    """

    def __init__(self, mixer: Mixer, rule: SavingRule, sequences: int = 1) -> None:
        self._retrievers = mixer.searched
        self._least = rule.pointers
        follows = rule.pointers is not None
        self._pointers = [
            [Pointers(retriever) for retriever in self._retrievers] if follows else []
            for _ in range(sequences)
        ]
        self.made = self.positions = 0

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self._pointers)

    def step(
        self,
        tokens: Sequence[int] | None,
        keys: Float[Tensor, "sequence dim"],
        matters: Bool[Tensor, " sequence"],
        search: Search,
    ) -> list[Neighbors]:
        """Return the neighbors of each sequence's next position, from each retriever.

        tokens: what each sequence went on with after its last position; None where the sequences
        begin. keys: of the positions. matters: see `SavingRule.matters`.
        """
        if tokens is not None:
            for token, pointers in zip(tokens, self._pointers, strict=True):
                for one in pointers:
                    one.follow(token)
        enough = torch.tensor([self._reach_enough(pointers) for pointers in self._pointers])
        needed = matters.cpu() & ~enough
        self.made += int(needed.sum())
        self.positions += len(keys)
        found = search_some(search, self._retrievers, keys, needed)
        for sequence in enough.nonzero()[:, 0].tolist():
            for one, neighbors in zip(self._pointers[sequence], found, strict=False):
                reached = one.reach(keys[sequence])
                neighbors.squared_distances[sequence] = reached.squared_distances[0]
                neighbors.rows[sequence] = reached.rows[0]
        for sequence in needed.nonzero()[:, 0].tolist():
            for one, neighbors in zip(self._pointers[sequence], found, strict=False):
                one.start(neighbors.rows[sequence])
        return found

    def _reach_enough(self, pointers: Sequence[Pointers]) -> bool:
        return self._least is not None and all(len(one) >= self._least for one in pointers)

    def reorder(self, sequences: Sequence[int]) -> None:
        """Continue sequence sequences[i] as sequence i, as a beam search does."""
        self._pointers = [[one.copy() for one in self._pointers[number]] for number in sequences]


def search_some(
    search: Search,
    retrievers: Sequence[Retriever],
    queries: Float[Tensor, "query dim"],
    needed: Bool[Tensor, " query"],
) -> list[Neighbors]:
    """Return the neighbors of those queries that need them, from each retriever, none of others."""
    numbers = needed.nonzero()[:, 0]
    searched = list(search(numbers)) if len(numbers) else []
    if len(numbers) == len(queries) > 0:
        return searched
    found = []
    for place, retriever in enumerate(retrievers):
        own = searched[place] if searched else None
        shape = len(queries), retriever.parameters.k
        distances = torch.full(shape, torch.inf, device=queries.device)
        rows = torch.full(shape, -1, device=queries.device)
        if own is not None:
            distances[numbers], rows[numbers] = own.squared_distances, own.rows
        found.append(Neighbors(distances, rows, 1.0 if own is None else own.coverage))
    return found
