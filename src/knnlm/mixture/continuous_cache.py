"""The continuous cache (Grave et al. 2017): the text read so far votes for the next token.

Each sequence remembers its last `size` (key, value) pairs, which vote as stored entries do:
p_cache(y) ∝ Σ 1[v_i = y] exp(θ s(h, h_i)). The paper's s is the dot product. The hidden states of
today's models have a large part in common and differ in length; both affect a dot product and not a
distance, so s = −‖h − h_i‖² is the default. A pair counts as an entry at squared distance −s, with
T = 1/θ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from knnlm.choices import Similarity, parse_choice
from knnlm.mixture.interpolation import Voters
from knnlm.mixture.parameters import Parameters
from knnlm.rules import check_whole

_BLOCK = 256  # queries that share one product with the pairs before them
_REWINDABLE = 64  # positions that can be taken back without loss
_ABSENT = -1  # stands for the value where there is no pair


@dataclass(frozen=True, slots=True)
class CacheParameters:
    """How far back the cache remembers, and how its pairs vote.

    size: how many pairs are remembered (≥ 1). votes: k, the number of most similar pairs that vote;
    their weight λ; and T = 1/θ. similarity: "distance" (−‖h − h_i‖²) or "dot" (h·h_i, the paper's).

    Raises InvalidArgumentError.
    """

    size: int
    votes: Parameters
    similarity: str = Similarity.distance

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _check(self.size, self.similarity))


def _check(size: int, similarity: str) -> int:
    parse_choice(Similarity, "similarity", similarity)
    return check_whole("size", size, remedy="leave the cache out to remember nothing")


class CacheNeighbors(NamedTuple):
    """The remembered pairs that vote for the token after each query, the most similar first.

    squared_distances: −s, +inf where there is no pair. tokens: the token that followed the pair's
    key, −1 where there is no pair. ages: how many positions before the query the pair's key was.
    """

    squared_distances: Float[Tensor, "query k"]
    tokens: Int[Tensor, "query k"]
    ages: Int[Tensor, "query k"]

    @property
    def voters(self) -> Voters:
        """The pairs as voters."""
        return Voters(self.squared_distances, self.tokens)


class CacheView(NamedTuple):
    """The remembered pairs as each query sees them, the oldest first.

    similarities: −∞ where there is no pair. values: the token that followed h_i; −1 where there is
    no pair. A cache of a smaller size s gives the last s columns.
    """

    similarities: Float[Tensor, "query pair"]
    values: Int[Tensor, "query pair"]

    def nearest(self, count: int, size: int | None = None) -> CacheNeighbors:
        """Return the `count` most similar pairs, among the last `size` where that is given."""
        first = 0 if size is None else max(self.values.shape[1] - size, 0)
        recent = self.similarities[:, first:]
        similarities, columns = recent.topk(min(count, recent.shape[1]), dim=1)
        values = self.values[:, first:].gather(1, columns)
        return CacheNeighbors(-similarities, values, recent.shape[1] - columns)


def join_cache_neighbors(parts: Sequence[CacheNeighbors]) -> CacheNeighbors:
    """Join the neighbors of consecutive queries, filled up to one width with absent pairs."""
    width = max(part.tokens.shape[1] for part in parts)
    columns = []
    for column, absent in zip(zip(*parts, strict=True), (torch.inf, _ABSENT, 0), strict=True):
        padded = [pad(part, (0, width - part.shape[1]), value=absent) for part in column]
        columns.append(torch.cat(padded))
    return CacheNeighbors(*columns)


class ContinuousCache:
    """The last `size` pairs of each of `batch` sequences, which advance together.

    A pair's value is the input of the position after its key, so the cache reads along with the
    model: `read(inputs, keys)`, window by window, a prompt at once or one token at a time.
    """

    def __init__(
        self,
        size: int,
        dimension: int,
        *,
        similarity: str = Similarity.distance,
        batch: int = 1,
        device: torch.device | str = "cpu",
        position: int = 0,
    ) -> None:
        _check(size, similarity)
        self.size = size
        self.similarity = similarity
        self._center: Float[Tensor, "batch 1 dim"] | None = None
        self._keys = torch.zeros(batch, 0, dimension, device=device)
        self._values = torch.full((batch, 0), _ABSENT, device=device)
        self._real = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        # the newest key, whose value is the next input, is the last of the `_used` places
        self._used = 0
        self.position = position
        """How many positions each sequence has, including those before the first `read`."""

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self._values)

    def read(
        self,
        inputs: Int[Tensor, "batch time"],
        keys: Float[Tensor, "batch time dim"],
        real: Bool[Tensor, "batch time"] | None = None,
    ) -> CacheView:
        """Read the next positions; return the pairs that each of them sees, row by row.

        real: False where a position is padding, on a sequence's left; it is not remembered. A
        position's own key is no pair yet: its value is the token to predict.
        """
        self.remember(inputs, keys, real)
        start, stop = self._used - inputs.shape[1], self._used
        width = min(self.size, stop)
        blocks = [
            self._compare(first, min(first + _BLOCK, stop), width)
            for first in range(start, stop, _BLOCK)
        ]
        similarities, values = (
            torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*blocks, strict=True)
        )
        return CacheView(similarities, values)

    def remember(
        self,
        inputs: Int[Tensor, "batch time"],
        keys: Float[Tensor, "batch time dim"],
        real: Bool[Tensor, "batch time"] | None = None,
    ) -> None:
        """Read the next positions without comparing them with the pairs before; see `read`."""
        time = inputs.shape[1]
        real = torch.ones_like(inputs, dtype=torch.bool) if real is None else real
        self._make_room(time)
        start, stop = self._used, self._used + time
        if start > 0:  # the newest key's value is known now
            self._values[:, start - 1] = inputs[:, 0].where(self._real[:, start - 1], _ABSENT)
        self._keys[:, start:stop] = self._centered(keys.float())
        self._values[:, start : stop - 1] = inputs[:, 1:].where(real[:, :-1], _ABSENT)
        self._values[:, stop - 1] = _ABSENT
        self._real[:, start:stop] = real
        self._used = stop
        self.position += time

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Continue sequence rows[i] as sequence i, as a beam search does."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._real = self._real[rows]
        if self._center is not None:
            self._center = self._center[rows]

    def rewind(self, positions: int) -> None:
        """Take back the last positions, as assisted decoding does with rejected tokens.

        All pairs are remembered again as long as at most 64 positions are taken back.
        """
        self._used = max(self._used - positions, 0)
        self.position -= positions

    def _make_room(self, time: int) -> None:
        """Move the pairs that are still remembered to the front when the places run out."""
        places = self._values.shape[1]
        if self._used + time <= places:
            return
        kept = min(self._used, self.size + _REWINDABLE)
        reach = slice(self._used - kept, self._used)
        spare = self.size + time  # so that one token at a time moves the pairs seldom
        self._keys = pad(self._keys[:, reach], (0, 0, 0, spare))
        self._values = pad(self._values[:, reach], (0, spare), value=_ABSENT)
        self._real = pad(self._real[:, reach], (0, spare))
        self._used = kept

    def _compare(
        self, first: int, stop: int, width: int
    ) -> tuple[Float[Tensor, "batch block pair"], Int[Tensor, "batch block pair"]]:
        """Return similarities and values of the `width` pairs before positions first … stop − 1."""
        reach = slice(max(first - width, 0), stop - 1)
        missing = max(width - first, 0)
        queries, keys = self._keys[:, first:stop], self._keys[:, reach]
        similarities = queries @ keys.mT
        if self.similarity == "distance":
            norms = keys.square().sum(dim=2)[:, None] + queries.square().sum(dim=2)[:, :, None]
            similarities = (2 * similarities - norms).clamp_max(0.0)
        similarities = pad(similarities, (missing, 0)).contiguous()
        values = pad(self._values[:, reach], (missing, 0), value=_ABSENT)
        # query i sees the columns i … i + width − 1: rows of a diagonal band, without a copy
        batch, block, columns = similarities.shape
        band = similarities.as_strided((batch, block, width), (block * columns, columns + 1, 1))
        seen = values.unfold(1, width, 1)  # (batch, block, width)
        return band.masked_fill(seen == _ABSENT, -torch.inf), seen

    def _centered(self, keys: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Subtract a common point: it changes no distance, and would cost digits."""
        if self.similarity == "dot":
            return keys
        if self._center is None:
            self._center = keys[:, -1:].clone()
        return keys - self._center
