"""How a token is sampled from a distribution: the same token whoever else is in the batch."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.rules import check_sampling_temperature, check_seed, check_top_p


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the tokens of a completion are sampled.

    temperature: tokens are drawn from p^(1/temperature); 0 takes the likeliest, the first of
    equals. top_p: only the likeliest tokens that together reach it may be drawn. seed: makes the
    draws repeatable.

    Raises InvalidArgumentError.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling_temperature(self.temperature)
        check_top_p(self.top_p)
        check_seed(self.seed)


def seeded_generator(seed: int, sample: int) -> torch.Generator:
    """Return the random numbers for one sample of a completion."""
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def choose_token(
    log_probs: Float[Tensor, " vocab"], options: SamplingOptions, generator: torch.Generator
) -> int:
    """Draw a token; `generator` is the sample's, see `seeded_generator`.

    Arithmetic is in float64 on the CPU. The token with the first of exponential arrival times with
    rates p is a draw from p (Gumbel-max). Of all ways to draw it is the least sensitive to the
    rounding of p, so that the answer hardly ever depends on the shape of the batch.
    """
    if options.temperature == 0.0:
        return int(log_probs.argmax())
    scaled = log_probs.double().cpu() / options.temperature
    probs = torch.softmax(scaled, dim=0)
    if options.top_p < 1.0:
        ordered, tokens = probs.sort(descending=True, stable=True)
        # a token is kept while those before it do not reach top_p; the likeliest always is
        kept = ordered.cumsum(dim=0) - ordered < options.top_p
        kept[0] = True
        probs = torch.zeros_like(probs).scatter_(0, tokens, ordered * kept)
    arrivals = torch.empty_like(probs).exponential_(generator=generator)
    return int((probs / arrivals).argmax())
