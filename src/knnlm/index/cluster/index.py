"""The index of a datastore that a cluster searches: an `Index` like any other."""

import copy
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from knnlm.choices import Coverage
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_cluster import StoredCluster, stored_cluster
from knnlm.errors import ClusterError, DatastoreChangedError
from knnlm.index.cluster.asking import Answers, Failure, Place, Question, Refusal
from knnlm.index.cluster.connection import connect, endpoint_of, find_actor
from knnlm.index.cluster.links import Links
from knnlm.index.cluster.merging import merge_shares
from knnlm.index.cluster.messages import Answer
from knnlm.index.cluster.states import state_of
from knnlm.index.protocol import Neighbors, check_search

_OPEN_SECONDS = 60.0  # for the actors to open a state
_DEADLINES_TO_OPEN_PARTLY = 2.0  # what is not open by then is left out until it is
_QUERIES_PER_DEADLINE = 16
_QUERIES_AT_ONCE = 8192
_ANSWERED_AT_ONCE = 1 << 21  # neighbors, of every share: 25 MB


class ClusterIndex:
    """Searches a datastore by asking one actor of every share of its entries.

    Follows every change that `store` has seen: the actors open the same state, and every answer
    says which state it is of; one of another state does not count. Of several shares the nearest
    are chosen by the distances to the keys, and where these are equal by row.

    coverage: with "partial", shares that do not answer in time are left out, which `Neighbors`
    tells; with "whole" that is an error.

    Raises ClusterError where the actors are not there, and DatastoreChangedError where they hold a
    newer state than `store`.
    """

    exact_distances = True

    def __init__(
        self, store: Datastore, cluster: StoredCluster, coverage: str = Coverage.whole
    ) -> None:
        self.store, self.cluster, self.coverage = store, cluster, Coverage(coverage)
        ray = connect(cluster.address)
        actors = {
            (share, replica): find_actor(ray, cluster, share, replica)
            for share, replica in cluster.actors
        }
        if None in actors.values():
            raise ClusterError(
                f"{store.path} is searched by a cluster whose actors are not running at "
                f"{cluster.address}: knnlm cluster stop {store.path}, then start it again"
            )
        self._links = Links(
            {place: partial(endpoint_of, ray, actor) for place, actor in actors.items()}
        )
        # clients begin with different replicas
        self._preferred = random.SystemRandom().choices(range(cluster.replicas), k=cluster.shares)
        self._generation = -1
        self._follow()

    def with_coverage(self, coverage: str) -> "ClusterIndex":
        """Return the same index with another coverage."""
        other = copy.copy(self)
        other.coverage = Coverage(coverage)
        return other

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        """Return the k nearest live entries; see `Index.search`.

        Raises ClusterError if a share does not answer in time, unless partial coverage is allowed,
        and DatastoreChangedError.
        """
        check_search(queries, k, self.store.settings.dimension)
        self._follow()
        vectors = queries.detach().to("cpu", torch.float32)
        size = max(1, min(_QUERIES_AT_ONCE, _ANSWERED_AT_ONCE // k))
        parts = [self._search(some, k) for some in torch.split(vectors, size)]
        return Neighbors(
            torch.cat([part.squared_distances for part in parts]).to(queries.device),
            torch.cat([part.rows for part in parts]).to(queries.device),
            min(part.coverage for part in parts),
        )

    def _search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        times = max(1.0, len(queries) / _QUERIES_PER_DEADLINE)
        seconds = self.cluster.deadline_seconds * times
        answers = self._ask(queries.contiguous().numpy(), k, seconds)
        in_order = [answers.by_share[share] for share in sorted(answers.by_share)]
        is_whole = len(in_order) == self.cluster.shares
        entries = sum(answer.entries for answer in in_order)
        coverage = 1.0 if is_whole else entries / max(1, len(self.store))
        return merge_shares([answer.found for answer in in_order], k, coverage)

    def _ask(self, queries: NDArray[np.float32], k: int, seconds: float) -> Answers:
        """Ask all shares for the state of `store`, and refuse answers that do not suffice.

        queries: none where the state is only to be opened.
        """

        def ask(place: Place, seconds: float) -> None:
            self._links.ask(place, self._state, queries, k, seconds)

        def wait(seconds: float) -> Iterator[tuple[Place, Any]]:
            for place, answer in self._links.wait(seconds):
                yield place, answer if isinstance(answer, Exception) else self._judged(answer)

        with self._links.asking:
            question = Question(self._preferred, self.cluster.replicas, ask, wait)
            try:
                answers = question.answers(seconds)
            finally:
                self._links.forget()
            for share, _ in self.cluster.actors:
                if share in answers.failures:
                    self._links.renew(share)
        self._check(answers)
        self._check_total([answer.entries for answer in answers.by_share.values()])
        return answers

    def _judged(self, answer: Answer) -> Answer | Refusal | Failure:
        if answer.error is not None:
            return Failure(answer.error)
        return answer if answer.state == self._state else Refusal(answer)

    def _follow(self) -> None:
        """Have the actors hold the state of `store`, whose generation the index has not seen."""
        if self._generation == self.store.generation:
            return
        self._state = state_of(self.store)
        is_whole = self.coverage is Coverage.whole
        partly = _DEADLINES_TO_OPEN_PARTLY * self.cluster.deadline_seconds
        nothing = np.empty((0, self.store.settings.dimension), np.float32)
        self._ask(nothing, 1, _OPEN_SECONDS if is_whole else partly)
        self._generation = self.store.generation

    def _check_total(self, counts: Sequence[int]) -> None:
        """Refuse shares that do not add up to the datastore: ClusterError."""
        if len(counts) == self.cluster.shares and sum(counts) != len(self.store):
            raise ClusterError(
                f"the shares of {self.store.path} hold {sum(counts)} entries, the datastore "
                f"{len(self.store)}: stop its cluster and start it again"
            )

    def _check(self, answers: Answers) -> None:
        """Refuse answers of several states, and those that lack a share where none may be lacking.

        Raises ClusterError and DatastoreChangedError.
        """
        missing = [s for s in range(self.cluster.shares) if s not in answers.by_share]
        if not missing:
            return
        path = self.store.path
        for refusal in answers.refusals.values():
            theirs = refusal.reason.state.generation
            if theirs >= self._state.generation:
                raise DatastoreChangedError(
                    f"{path} was changed since it was opened, and its cluster holds the new state "
                    f"(generation {theirs}, not {self._state.generation}): open it again"
                )
            raise ClusterError(
                f"{path} is of generation {self._state.generation}, and the datastore that its "
                f"cluster reads of generation {theirs}: wait for its copies, or start the cluster "
                "again"
            )
        recorded = stored_cluster(self.store.catalog)
        if recorded is None or recorded.namespace != self.cluster.namespace:
            raise ClusterError(f"the cluster of {path} was stopped: open the datastore again")
        if self.coverage is Coverage.whole or not answers.by_share:
            reasons = "; ".join(dict.fromkeys(answers.failures.values()))
            raise ClusterError(
                f"{len(missing)} of {self.cluster.shares} shares of {path} were not searched "
                f"({reasons}): see knnlm cluster status {path}"
            )
