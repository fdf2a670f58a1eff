"""One token from a distribution, the same one whoever else is in the batch."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def seeded_generator(seed: int, sample: int) -> torch.Generator:
    """Return the random numbers of one of a request's samples."""
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def choose_token(
    log_probs: Float[Tensor, " vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> int:
    """Draw a token from p^(1/temperature), cut to the likeliest that together reach `top_p`.

    temperature = 0 takes the likeliest, of equals the first. Arithmetic is in float64 on the CPU.
    The token with the first of exponential arrival times with rates p is a draw from p
    (Gumbel-max): of all ways to draw, the one that the rounding of p sways least, so that the
    answer hardly ever depends on the shape of the batch.
    """
    if temperature == 0.0:
        return int(log_probs.argmax())
    scaled = log_probs.double().cpu() / temperature
    probs = torch.softmax(scaled, dim=0)
    if top_p < 1.0:
        ordered, tokens = probs.sort(descending=True, stable=True)
        # kept as long as those before it do not suffice; the likeliest always
        kept = ordered.cumsum(dim=0) - ordered < top_p
        kept[0] = True
        probs = torch.zeros_like(probs).scatter_(0, tokens, ordered * kept)
    arrivals = torch.empty_like(probs).exponential_(generator=generator)
    return int((probs / arrivals).argmax())
