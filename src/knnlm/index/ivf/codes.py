"""Eight-bit codes of keys and queries: what a search reads of every candidate.

Knows arithmetic only. A key is centered, projected onto the leading principal directions, turned
at random within them (so that all coordinates are about as large) and rounded to 8 bits with a
step of its own. Half a squared distance, less half of |query − center|², is then about
half_norm − query_step · key_step · ⟨query code, key code⟩.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

LARGEST_CODE = 127
LEAST_STEP = torch.finfo(torch.float32).tiny * 256 / LARGEST_CODE
ALIKENESS_OF_RESTS = 0.3  # the rests of neighbors are somewhat alike: their product is not 0
_SAMPLE = 65_536
_KEPT_VARIANCE = 0.95
# How far a query's scores may be off because codes are rounded, in its step · √half_norm. Rounding
# to a step is off by step / √12 on average; here that of query and key, taken to be about as long,
# both count, and three standard deviations.
MARGIN = 3.0 / math.sqrt(3)
SAMPLE_SHARE = 1 / 16
"""How much of each list is its head: a sample of its scores, which lie in random order."""
_DEVIATIONS = 3.0
_LARGEST_CODE_DIM = 1024


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of some keys or queries: codes · steps is about the turned, centered vector."""

    codes: Int8[Tensor, "n code_dim"]
    steps: Float[Tensor, " n"]
    half_norms: Float[Tensor, " n"]

    def margins(self) -> Float[Tensor, " n"]:
        """Return how far queries' scores may be off because codes are rounded."""
        return MARGIN * self.steps * self.half_norms.sqrt()


@dataclass(frozen=True, slots=True)
class Coder:
    """How vectors become codes.

    projection: onto the leading principal directions, then turned. rest: where the length of what
    lies outside these directions goes, turned alike.
    """

    center: Float[Tensor, " dim"]
    projection: Float[Tensor, "code_dim dim"]
    rest: Float[Tensor, " code_dim"]

    @property
    def code_dim(self) -> int:
        """How many dimensions codes have."""
        return len(self.projection)

    @classmethod
    def fit(cls, keys: Float[Tensor, "n dim"], code_dim: int | None, seed: int) -> "Coder":
        """Fit the center and the leading directions to a sample of keys.

        code_dim: None for as many directions, in steps of 64, as keep most of the variance.
        """
        sample = keys[:_SAMPLE].float()
        center = sample.mean(dim=0) if len(sample) else sample.new_zeros(sample.shape[1])
        sample = sample - center
        variances, directions = torch.linalg.eigh((sample.T @ sample).double())
        dim = len(variances)
        if code_dim is None:
            kept = variances.flip(0).cumsum(0) / variances.sum().clamp_min(1e-30)
            enough = int((kept < _KEPT_VARIANCE).sum()) + 1
            code_dim = min(-(-enough // 64) * 64, _LARGEST_CODE_DIM, dim)
        leading = code_dim if code_dim == dim else code_dim - 1
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(code_dim, code_dim, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(random).Q
        rest = turn[:, -1] if leading < code_dim else torch.zeros(code_dim)
        projection = turn[:, :leading] @ directions.T[dim - leading :]
        return cls(center, projection.float().contiguous(), rest.float().contiguous())

    def encode(self, vectors: Float[Tensor, "n dim"]) -> Codes:
        """Return the codes of float32 vectors."""
        centered = vectors - self.center
        return self.quantize(centered @ self.projection.T, centered.square().sum(dim=1))

    def quantize(
        self, turned: Float[Tensor, "n code_dim"], squared_norms: Float[Tensor, " n"]
    ) -> Codes:
        """Return the codes of projected vectors. squared_norms: of the whole centered vectors."""
        squared_rests = (squared_norms - turned.square().sum(dim=1)).clamp_min(0.0)
        turned = torch.addcmul(
            turned, (ALIKENESS_OF_RESTS * squared_rests).sqrt_()[:, None], self.rest
        )
        largest = turned.abs().amax(dim=1)
        steps = (largest / LARGEST_CODE).clamp_min(LEAST_STEP)
        codes = (turned / steps[:, None]).round_().to(torch.int8)
        return Codes(codes, steps, squared_norms / 2)


def bound_ranks(
    sampled: Int[Tensor, " query"], available: Int[Tensor, " query"], k: int, oversampling: float
) -> Int[Tensor, " query"]:
    """Return the rank of the sampled score that bounds the k-th best of all; −1: leave unbounded.

    sampled, available: how many candidates a query has in the sample and in all. oversampling: how
    many candidates are wanted for each neighbor, because scores only estimate. The rank is three
    standard deviations above the number of those that the sample is expected to hold.
    """
    share = sampled / available.clamp_min(1)
    wanted = oversampling * k * share
    ranks = (wanted + _DEVIATIONS * (wanted * (1 - share)).sqrt()).ceil().long()
    return ranks.masked_fill((ranks >= sampled) | (available <= 2 * k), -1)
