"""Codes of keys and queries, in 8 or 4 bits a number: what a search reads of every candidate.

Knows arithmetic only. A key is centered, projected onto the leading principal directions, turned
at random within them (so that all coordinates are about as large) and rounded to 8 or 4 bits with
a step of its own. Half a squared distance, less half of |query − center|², is then about
half_norm − query_step · key_step · ⟨query code, key code⟩. Queries always have 8 bits.

Four-bit codes are the odd numbers from −15 to 15, two in each byte. Of 64 bytes, 128 directions in
4 bits find more of the nearest keys than 64 directions in 8 bits.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

LARGEST_CODE = 127
LARGEST_PACKED_CODE = 15
LEAST_STEP = torch.finfo(torch.float32).tiny * 256 / LARGEST_CODE
ALIKENESS_OF_RESTS = 0.3  # the rests of neighbors are somewhat alike: their product is not 0
_SAMPLE = 65_536
_KEPT_VARIANCE = 0.85
# How far a query's scores may be off because codes are rounded, in its step · √half_norm. Rounding
# to a step is off by step / √12 on average; here that of query and key, taken to be about as long,
# both count, and three standard deviations.
MARGIN = 3.0 / math.sqrt(3)
SAMPLE_SHARE = 1 / 16
"""How much of each list is its head: a sample of its scores, which lie in random order."""
_DEVIATIONS = 3.0
_LARGEST_CODE_DIM = 1024


@dataclass(frozen=True, slots=True)
class CodeShape:
    """How large the codes of keys are.

    dimensions: None for as many, in steps of 64, as keep most of the variance; an odd number
    becomes the next even one where two codes are packed in a byte. bits: of each number, 8 or 4.
    """

    dimensions: int | None = None
    bits: int = 8


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of some keys or queries: codes · steps is about the turned, centered vector.

    codes: of 8 bits, or of 4 bits and packed, two in each byte; see `unpacked`.
    """

    codes: Int8[Tensor, "n code_dim"] | UInt8[Tensor, "n half_code_dim"]
    steps: Float[Tensor, " n"]
    half_norms: Float[Tensor, " n"]

    def margins(self) -> Float[Tensor, " n"]:
        """Return how far queries' scores may be off because codes are rounded."""
        return MARGIN * self.steps * self.half_norms.sqrt()


@dataclass(frozen=True, slots=True)
class Coder:
    """How vectors become codes.

    projection: onto the leading principal directions, then turned. rest: where the length of what
    lies outside these directions goes, turned alike. bits: 8 or 4, of each number of a key's code.
    """

    center: Float[Tensor, " dim"]
    projection: Float[Tensor, "code_dim dim"]
    rest: Float[Tensor, " code_dim"]
    bits: Int[Tensor, ""]

    @property
    def code_dim(self) -> int:
        """How many dimensions codes have."""
        return len(self.projection)

    def no_codes(self, keys: int) -> Tensor:
        """Return an array for the codes of some keys, without contents."""
        if int(self.bits) == 8:
            return torch.empty(keys, self.code_dim, dtype=torch.int8)
        return torch.empty(keys, self.code_dim // 2, dtype=torch.uint8)

    @classmethod
    def fit(cls, keys: Float[Tensor, "n dim"], shape: CodeShape, seed: int) -> "Coder":
        """Fit the center and the leading directions to a sample of keys."""
        sample = keys[:_SAMPLE].float()
        center = sample.mean(dim=0) if len(sample) else sample.new_zeros(sample.shape[1])
        sample = sample - center
        variances, directions = torch.linalg.eigh((sample.T @ sample).double())
        dim = len(variances)
        code_dim = shape.dimensions
        if code_dim is None:
            kept = variances.flip(0).cumsum(0) / variances.sum().clamp_min(1e-30)
            enough = int((kept < _KEPT_VARIANCE).sum()) + 1
            code_dim = min(-(-enough // 64) * 64, _LARGEST_CODE_DIM, dim)
        code_dim += code_dim % 2 if shape.bits == 4 else 0
        leading = min(dim, code_dim - (code_dim != dim))
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(code_dim, code_dim, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(random).Q
        rest = turn[:, -1] if leading < code_dim else torch.zeros(code_dim)
        projection = turn[:, :leading] @ directions.T[dim - leading :]
        number = torch.tensor(shape.bits)
        return cls(center, projection.float().contiguous(), rest.float().contiguous(), number)

    def encode(self, vectors: Float[Tensor, "n dim"]) -> Codes:
        """Return the 8-bit codes of float32 vectors, such as queries."""
        turned, half_norms = self._turned(vectors)
        steps = (turned.abs().amax(dim=1) / LARGEST_CODE).clamp_min(LEAST_STEP)
        codes = (turned / steps[:, None]).round_().to(torch.int8)
        return Codes(codes, steps, half_norms)

    def encode_keys(self, keys: Float[Tensor, "n dim"]) -> Codes:
        """Return the codes that are stored of float32 keys, packed where they have 4 bits."""
        if int(self.bits) == 8:
            return self.encode(keys)
        turned, half_norms = self._turned(keys)
        largest = turned.abs().amax(dim=1, keepdim=True)
        # as many even intervals as there are codes, from −largest to largest
        intervals = (largest / (LARGEST_PACKED_CODE + 1)).clamp_min(LEAST_STEP) * 2
        numbers = (turned / intervals).floor_().clamp_(-8, 7)
        codes = 2 * numbers + 1
        # the step that makes a key's product with itself right
        steps = turned.square().sum(dim=1) / (turned * codes).sum(dim=1).clamp_min(LEAST_STEP)
        numbers = (numbers + 8).to(torch.uint8)
        return Codes(numbers[:, ::2] | numbers[:, 1::2] << 4, steps, half_norms)

    def _turned(
        self, vectors: Float[Tensor, "n dim"]
    ) -> tuple[Float[Tensor, "n code_dim"], Float[Tensor, " n"]]:
        """Return the turned vectors, and half the squared norms of the whole centered ones."""
        centered = vectors - self.center
        turned, squared_norms = centered @ self.projection.T, centered.square().sum(dim=1)
        squared_rests = (squared_norms - turned.square().sum(dim=1)).clamp_min(0.0)
        lengths = (ALIKENESS_OF_RESTS * squared_rests).sqrt_()
        return torch.addcmul(turned, lengths[:, None], self.rest), squared_norms / 2


def unpacked(codes: Int8[Tensor, "n _"] | UInt8[Tensor, "n _"]) -> Int8[Tensor, "n code_dim"]:
    """Return 4-bit codes as the odd numbers that they stand for, and 8-bit codes as they are."""
    if codes.dtype == torch.int8:
        return codes
    numbers = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    return (2 * numbers.to(torch.int8)) - LARGEST_PACKED_CODE


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
