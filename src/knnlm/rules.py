"""The rules about numbers that callers give: each stands here once, for every entrance.

Booleans and texts are no numbers. Each check raises InvalidArgumentError.
"""

import math
from numbers import Integral, Real

from knnlm.errors import InvalidArgumentError

LARGEST = 2**63 - 1  # int64, as in tensors and in SQLite
# Beyond these, distances divided by T do not fit float32.
LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-30, 1e30


def check_whole(
    name: str, number: object, least: int = 1, most: int = LARGEST, remedy: str = ""
) -> None:
    """Refuse all but whole numbers from `least` to `most`; remedy: ends the message."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise InvalidArgumentError(f"{name} must be a whole number, got {number!r}")
    if int(number) < least:
        raise InvalidArgumentError(f"{name} must be at least {least}, got {number}{remedy}")
    if int(number) > most:
        raise InvalidArgumentError(f"{name} must be at most {most}, got {number}")


def check_real(name: str, number: object) -> float:
    """Return a number, NaN and infinities included, as a float."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise InvalidArgumentError(f"{name} must be a number, got {number!r}")
    return float(number)


def check_k(k: object) -> None:
    """K ≥ 1."""
    check_whole("k", k, remedy=": ask for a neighbor")


def check_lmbda(lmbda: object) -> None:
    """0 ≤ λ ≤ 1."""
    if not 0.0 <= check_real("lmbda (λ)", lmbda) <= 1.0:
        raise InvalidArgumentError(
            f"lmbda (λ) must lie in [0, 1], got {lmbda}: 0 is the language model alone, 1 the "
            "neighbors alone"
        )


def check_temperature(temperature: object) -> None:
    """1e-30 ≤ T ≤ 1e30, for the neighbors' distances."""
    number = check_real("temperature", temperature)
    if not (number > 0.0 and math.isfinite(number)):
        raise InvalidArgumentError(
            f"temperature must be positive and finite, got {temperature}: 1 is the paper's"
        )
    if not LEAST_TEMPERATURE <= number <= GREATEST_TEMPERATURE:
        raise InvalidArgumentError(
            f"temperature must lie in [{LEAST_TEMPERATURE:g}, {GREATEST_TEMPERATURE:g}], got "
            f"{temperature}: 1 is the paper's"
        )


def check_recall(recall: object) -> None:
    """0 < recall ≤ 1."""
    if not 0.0 < check_real("recall", recall) <= 1.0:
        raise InvalidArgumentError(f"recall must be above 0 and at most 1, got {recall}: try 0.95")


def check_seed(seed: object) -> None:
    """Any int64."""
    check_whole("seed", seed, -LARGEST - 1)


def check_sampling_temperature(temperature: object) -> None:
    """0, which takes the likeliest token, or from 1e-30 to 1e30."""
    number = check_real("sampling temperature", temperature)
    if number != 0.0 and not LEAST_TEMPERATURE <= number <= GREATEST_TEMPERATURE:
        raise InvalidArgumentError(
            f"sampling temperature must be 0 or lie in [{LEAST_TEMPERATURE:g}, "
            f"{GREATEST_TEMPERATURE:g}], got {temperature}: 1 samples from the mixture "
            "itself"
        )


def check_top_p(top_p: object) -> None:
    """0 ≤ top_p ≤ 1."""
    if not 0.0 <= check_real("top_p", top_p) <= 1.0:
        raise InvalidArgumentError(f"top_p must lie in [0, 1], got {top_p}: 1 allows every token")


def check_sampling(temperature: object, top_p: object, seed: object) -> None:
    """Check how tokens are sampled; None stands for a default."""
    for value, check in [
        (temperature, check_sampling_temperature),
        (top_p, check_top_p),
        (seed, check_seed),
    ]:
        if value is not None:
            check(value)
