"""The continuous cache (Grave et al. 2017): what followed states like this one earlier in the text.

Each sequence remembers its last `size` (key, value) pairs. They vote for the next token as stored
entries do, p_cache(y) ∝ Σ 1[v_i = y] exp(θ s(h, h_i)), and are a further component of the mixture.
Nothing is trained and nothing is stored; a sequence never sees another one's pairs.

The paper's s is the dot product. Hidden states of today's models share a large common part and
differ in length, both of which a dot product sees and a distance does not: s = −‖h − h_i‖² is the
default.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from knnlm.errors import InvalidArgumentError
from knnlm.index.protocol import Neighbors

SIMILARITIES = ("distance", "dot")

_BLOCK = 256  # queries that share one product with the pairs before them
_ABSENT = -1  # the value of a pair that is none


@dataclass(frozen=True, slots=True)
class CacheParameters:
    """How far back the cache remembers, and how sharply it chooses.

    size: pairs remembered (≥ 1). theta: θ in p_cache ∝ exp(θ s) (≥ 0; 0 counts each pair alike).
    similarity: s, "distance" (−‖h − h_i‖², so that θ is 1/T of p_kNN) or "dot" (h·h_i, the
    paper's).

    Raises InvalidArgumentError.
    """

    size: int
    theta: float
    similarity: str = "distance"

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not (self.theta >= 0.0 and math.isfinite(self.theta)):
            raise InvalidArgumentError(
                f"theta (θ) must be at least 0 and finite, got {self.theta}: 0 counts every "
                "remembered pair alike"
            )
        _check_similarity(self.similarity)


def _check_size(size: int) -> None:
    if size < 1:
        raise InvalidArgumentError(
            f"size must be at least 1, got {size}: leave the cache out to remember nothing"
        )


def _check_similarity(similarity: str) -> None:
    if similarity not in SIMILARITIES:
        raise InvalidArgumentError(
            f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}"
        )


@dataclass(frozen=True, slots=True)
class Recollection:
    """The remembered pairs as each query sees them, the oldest first.

    similarities: −∞ where there is no pair. values: the token that followed h_i; −1 where there is
    no pair. The last s columns are what a cache of size s would give.
    """

    similarities: Float[Tensor, "query pair"]
    values: Int[Tensor, "query pair"]

    def nearest(self, count: int) -> Neighbors:
        """Return the `count` most similar pairs as neighbors, the most similar first.

        Their rows are columns of this recollection, their squared distances −similarity.
        """
        similarities, columns = self.similarities.topk(min(count, self.values.shape[1]), dim=1)
        return Neighbors(-similarities, columns.masked_fill(similarities.isneginf(), -1))


def cache_log_weights(
    similarities: Float[Tensor, "query pair"], theta: float
) -> Float[Tensor, "query pair"]:
    """Return each pair's log share of the vote, log softmax(θ s).

    Grave et al. 2017, eq. 3. Queries without a pair are all −inf.
    """
    # the largest is subtracted before the product, which would cost digits of large keys
    absent = similarities.isneginf()
    largest = similarities.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
    energies = (similarities - largest).masked_fill(absent, 0.0) * theta
    energies = energies.masked_fill(absent, -torch.inf)
    return energies - energies.logsumexp(dim=1, keepdim=True).nan_to_num(neginf=0.0)


class ContinuousCache:
    """The last `size` pairs of each of `batch` sequences, which advance together.

    A pair's value is the input of the position after its key, so that the cache is fed with what
    the model reads: `recall(inputs, keys)`, in windows, in a prompt or one token at a time.
    """

    def __init__(
        self,
        size: int,
        dimension: int,
        *,
        similarity: str = "distance",
        batch: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_size(size)
        _check_similarity(similarity)
        self.size = size
        self.similarity = similarity
        self._center: Float[Tensor, "batch 1 dim"] | None = None
        self._keys = torch.zeros(batch, 0, dimension, device=device)
        self._values = torch.full((batch, 0), _ABSENT, device=device)
        # the newest key, whose value is the next input, is the last of the `_used` places
        self._used = 0
        self._newest_is_real = torch.zeros(batch, dtype=torch.bool, device=device)

    def recall(
        self,
        inputs: Int[Tensor, "batch time"],
        keys: Float[Tensor, "batch time dim"],
        real: Bool[Tensor, "batch time"] | None = None,
    ) -> Recollection:
        """Take in the next positions; return what each of them remembers, batch by batch.

        real: False where a position is padding, on a sequence's left; it is not remembered. A
        position's own key is no pair yet: its value is what is to be predicted.
        """
        time = inputs.shape[1]
        real = torch.ones_like(inputs, dtype=torch.bool) if real is None else real
        self._make_room(time)
        start, stop = self._used, self._used + time
        if start > 0:  # what followed the newest key is known now
            self._values[:, start - 1] = inputs[:, 0].where(self._newest_is_real, _ABSENT)
        self._keys[:, start:stop] = self._centered(keys.float())
        self._values[:, start : stop - 1] = inputs[:, 1:].where(real[:, :-1], _ABSENT)
        self._values[:, stop - 1] = _ABSENT
        self._newest_is_real, self._used = real[:, -1], stop
        width = min(self.size, stop)
        recalled = [
            self._recall(first, min(first + _BLOCK, stop), width)
            for first in range(start, stop, _BLOCK)
        ]
        similarities, values = (
            torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*recalled, strict=True)
        )
        return Recollection(similarities, values)

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Let sequence i go on from what sequence rows[i] was, as a beam search does."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._newest_is_real = self._newest_is_real[rows]
        if self._center is not None:
            self._center = self._center[rows]

    def _make_room(self, time: int) -> None:
        """Move the pairs still in reach to the front when the places run out."""
        places = self._values.shape[1]
        if self._used + time <= places:
            return
        kept = min(self._used, self.size)
        reach = slice(self._used - kept, self._used)
        spare = self.size + time  # so that one token at a time moves the pairs seldom
        self._keys = pad(self._keys[:, reach], (0, 0, 0, spare))
        self._values = pad(self._values[:, reach], (0, spare), value=_ABSENT)
        self._used = kept

    def _recall(
        self, first: int, stop: int, width: int
    ) -> tuple[Float[Tensor, "batch block pair"], Int[Tensor, "batch block pair"]]:
        """Return what the positions first … stop − 1 remember, `width` pairs each."""
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
        """Leave out what all keys share: it changes no distance, and costs digits."""
        if self.similarity == "dot":
            return keys
        if self._center is None:
            self._center = keys[:, -1:].clone()
        return keys - self._center
