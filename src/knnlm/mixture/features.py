"""What is known of a query before its next token is: how sure the LM is, how the votes fall.

A `GateInput` is a datastore or the continuous cache: voters near the query, each with a token. It
enters the mixture as several components, the same voters weighed at several temperatures. Distances
are taken in units of the source's temperature, so that features mean the same whatever the scale of
the keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.errors import InvalidArgumentError
from knnlm.mixture.interpolation import group_by_token, neighbor_log_weights

TEMPERATURES = (0.5, 1.0, 2.5)  # of the components, in units of the source's
_MIDDLE = 1  # the component whose votes are described
_LEAST_DISTANCE, _GREATEST_DISTANCE = 1e-2, 1e4  # copies have distance 0, absent neighbors +inf
_LEAST_SHARE = 1e-4
_ROWS = 16  # distributions described at once, so that they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class GateInput:
    """Where voters come from, and how they are weighed.

    k: how many at most (≥ 1). temperature: T of a fixed mixture that suits it (> 0); components
    are made around it.

    Raises InvalidArgumentError.
    """

    k: int
    temperature: float

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InvalidArgumentError(f"k must be at least 1, got {self.k}: ask for a neighbor")
        if not self.temperature > 0.0:
            raise InvalidArgumentError(
                f"temperature must be positive, got {self.temperature}: 1 is the paper's"
            )


class Voters(NamedTuple):
    """The entries near each query, the nearest first.

    squared_distances: +inf where absent. tokens: what each votes for, any where it is absent.
    """

    squared_distances: Float[Tensor, "query k"]
    tokens: Int[Tensor, "query k"]

    @property
    def present(self) -> Bool[Tensor, " query"]:
        """Where there is any."""
        return self.squared_distances[:, 0].isfinite()

    def of(self, queries: slice) -> "Voters":
        """Return those of some of the queries."""
        return Voters(self.squared_distances[queries], self.tokens[queries])


class LMSummary(NamedTuple):
    """How sure the language model is, and of what.

    entropy: in nats. log_prob, token: of its most probable token.
    """

    entropy: Float[Tensor, " query"]
    log_prob: Float[Tensor, " query"]
    token: Int[Tensor, " query"]

    def of(self, queries: slice) -> "LMSummary":
        """Return that of some of the queries."""
        return LMSummary(self.entropy[queries], self.log_prob[queries], self.token[queries])

    def cpu(self) -> "LMSummary":
        """Return the same in the machine's own memory."""
        return LMSummary(*(column.cpu() for column in self))

    @classmethod
    def join(cls, parts: Sequence["LMSummary"]) -> "LMSummary":
        """Return that of consecutive queries."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def summarize_lm(log_probs: Float[Tensor, "query vocab"]) -> LMSummary:
    """Describe the language model's whole distribution."""
    space = torch.empty_like(log_probs[:_ROWS])  # used again: new memory costs more than the sums
    parts = [_summarize(rows, space[: len(rows)]) for rows in log_probs.split(_ROWS)]  # type: ignore[no-untyped-call]
    return parts[0] if len(parts) == 1 else LMSummary.join(parts)


def _summarize(log_probs: Float[Tensor, "query vocab"], space: Tensor) -> LMSummary:
    probs = torch.exp(log_probs, out=space)
    entropy = -torch.linalg.vecdot(probs, log_probs)
    if bool(entropy.isnan().any()):  # a token of probability 0 adds nothing
        entropy = -(probs * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(dim=1)
    if log_probs.is_cpu:  # where torch's argmax takes as long as the softmax
        token = torch.from_numpy(log_probs.numpy().argmax(axis=1))
    else:
        token = log_probs.argmax(dim=1)
    return LMSummary(entropy, log_probs.gather(1, token[:, None])[:, 0], token)


class Weighed(NamedTuple):
    """What can be said of a source's voters before the language model has spoken.

    log_weights: each voter's log share of the vote, at each of the source's temperatures.
    features: columns of `query_features`.
    """

    voters: Voters
    log_weights: Float[Tensor, "component query k"]
    features: list[Float[Tensor, " query"]]
    weights: Float[Tensor, "query k"]
    best: Float[Tensor, " query"]


def weigh(source: GateInput, voters: Voters) -> Weighed:
    """Weigh a source's voters at each of its temperatures, and describe their vote."""
    log_weights = torch.stack(
        [
            neighbor_log_weights(voters.squared_distances, factor * source.temperature)
            for factor in TEMPERATURES
        ]
    )
    weights = log_weights[_MIDDLE].exp()
    distances = voters.squared_distances / source.temperature
    logs = distances.clamp(_LEAST_DISTANCE, _GREATEST_DISTANCE).log()
    ranks = [2**power for power in range(source.k.bit_length())]
    held = [min(rank, distances.shape[1]) for rank in ranks]
    features = [logs[:, rank - 1] for rank in held]

    new, votes = _count_votes(voters, weights)
    distinct = new.cumsum(dim=1).clamp_min(1)
    features += [distinct[:, rank - 1].log() for rank in held[1:]]
    best = votes.amax(dim=1)
    features += [best.clamp_min(_LEAST_SHARE).log(), torch.special.entr(votes).sum(dim=1)]
    return Weighed(voters, log_weights, features, weights, best)


def query_features(lm: LMSummary, weighed: Sequence[Weighed]) -> Float[Tensor, "query feature"]:
    """Return all that a gate sees of each query. weighed: the voters of each source."""
    columns = [lm.entropy, lm.log_prob]
    for one in weighed:
        own = (one.weights * (one.voters.tokens == lm.token[:, None])).sum(dim=1)
        same_favorite = own > one.best - _LEAST_SHARE
        columns += [*one.features, own.clamp_min(_LEAST_SHARE).log(), same_favorite.float()]
    return torch.stack(columns, dim=1)


def count_features(sources: Sequence[GateInput]) -> int:
    """Return how many features `query_features` gives."""
    nothing = torch.zeros(0)
    lm = LMSummary(nothing, nothing, nothing.long())
    voters = [Voters(torch.zeros(0, s.k), torch.zeros(0, s.k).long()) for s in sources]
    weighed = [weigh(s, v) for s, v in zip(sources, voters, strict=True)]
    return query_features(lm, weighed).shape[1]


def _count_votes(
    voters: Voters, weights: Float[Tensor, "query k"]
) -> tuple[Bool[Tensor, "query k"], Float[Tensor, "query k"]]:
    """Return where a token appears for the first time, and the sum of each token's weights.

    The sums stand in no particular place.
    """
    _, order, first, group = group_by_token(voters.tokens)  # the nearest of a token stays first
    new = torch.zeros_like(first).scatter_(1, order, first)
    votes = torch.zeros_like(weights).scatter_add_(1, group, weights.gather(1, order))
    return new & voters.squared_distances.isfinite(), votes
