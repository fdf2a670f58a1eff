"""Eight-bit codes of keys and queries: what a search reads of every candidate.

Knows arithmetic only. A key is centered, projected onto the leading principal directions, turned
at random within them (so that all coordinates are about as large) and rounded to 8 bits with a
step of its own. Half a squared distance, less half of |query − center|², is then about
half_norm − query_step · key_step · ⟨query code, key code⟩.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

_LARGEST_CODE = 127
_SAMPLE = 65_536


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of some keys or queries: codes · steps is about the turned, centered vector."""

    codes: Int8[Tensor, "n code_dim"]
    steps: Float[Tensor, " n"]
    half_norms: Float[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Effort:
    """How many candidates are looked at exactly.

    sample: the part of a list that is its head. oversampling: how many candidates are wanted for
    each neighbor, because scores only estimate. deviations: how far above the wanted number the
    rank in the sample is set, in standard deviations of that number in the sample.
    """

    sample: float = 1 / 16
    oversampling: float = 1.1
    deviations: float = 3.0


@dataclass(frozen=True, slots=True)
class Coder:
    """How vectors become codes. rotation: orthonormal rows."""

    center: Float[Tensor, " dim"]
    rotation: Float[Tensor, "code_dim dim"]

    @classmethod
    def fit(cls, keys: Float[Tensor, "n dim"], code_dim: int, seed: int) -> "Coder":
        """Fit the center and the leading directions to a sample of keys."""
        sample = keys[:_SAMPLE].float()
        center = sample.mean(dim=0) if len(sample) else sample.new_zeros(sample.shape[1])
        sample = sample - center
        directions = torch.linalg.eigh((sample.T @ sample).double()).eigenvectors
        leading = directions[:, -code_dim:].T
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(code_dim, code_dim, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(random).Q
        return cls(center, (turn @ leading).float().contiguous())

    def encode(self, vectors: Float[Tensor, "n dim"]) -> Codes:
        """Return the codes of float32 vectors."""
        centered = vectors - self.center
        turned = centered @ self.rotation.T
        largest = turned.abs().amax(dim=1)
        steps = largest.clamp_min(torch.finfo(torch.float32).tiny * 256) / _LARGEST_CODE
        codes = (turned / steps[:, None]).round_().to(torch.int8)
        return Codes(codes, steps, centered.square().sum(dim=1) / 2)
