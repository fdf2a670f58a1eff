"""The rules about numbers that callers give: each stands here once, for every entrance.

Each check returns the number as a plain int or float (NumPy's are numbers too, booleans and texts
are none) and raises InvalidArgumentError.
"""

import math
from numbers import Integral, Real

from knnlm.errors import InvalidArgumentError

MOST = 2**31 - 1
"""The greatest number of anything that may be asked for; tensors and FAISS hold it."""
LARGEST = 2**63 - 1
"""The greatest number of tokens, rows or bytes: int64, as in tensors and in SQLite."""
LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-30, 1e30
"""Beyond these, distances divided by T do not fit float32."""


def check_whole(
    name: str,
    number: object,
    *,
    least: int = 1,
    most: int = MOST,
    remedy: str = "choose a larger one",
) -> int:
    """Allow whole numbers from `least` to `most`; remedy: for those below."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise InvalidArgumentError(f"{name} must be a whole number, got {number!r}")
    whole = int(number)
    if whole < least:
        raise InvalidArgumentError(
            f"{name} must be at least {least}, got {_shown(whole)}: {remedy}"
        )
    if whole > most:
        raise InvalidArgumentError(
            f"{name} must be at most {most}, got {_shown(whole)}: choose a smaller one"
        )
    return whole


def check_real(name: str, number: object) -> float:
    """Allow every number that a float holds, NaN and infinities too."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise InvalidArgumentError(f"{name} must be a number, got {number!r}")
    try:
        return float(number)
    except OverflowError:
        raise InvalidArgumentError(f"{name} must be a number that a float can hold") from None


def _shown(whole: int) -> str:
    try:
        return str(whole)
    except ValueError:  # Python writes no longer ones
        return "one of more than 4,300 digits"


def check_k(k: object, name: str = "k") -> int:
    """Allow a number of neighbors: k ≥ 1."""
    return check_whole(name, k, remedy="ask for a neighbor")


def check_lmbda(lmbda: object) -> float:
    """Allow 0 ≤ λ ≤ 1."""
    number = check_real("lmbda (λ)", lmbda)
    if not 0.0 <= number <= 1.0:
        raise InvalidArgumentError(
            f"lmbda (λ) must lie in [0, 1], got {number}: 0 is the language model alone, 1 the "
            "neighbors alone"
        )
    return number


def check_temperature(temperature: object) -> float:
    """Allow 1e-30 ≤ T ≤ 1e30, for the neighbors' distances."""
    number = check_real("temperature", temperature)
    if not (number > 0.0 and math.isfinite(number)):
        raise InvalidArgumentError(
            f"temperature must be positive and finite, got {number}: 1 is the paper's"
        )
    if not LEAST_TEMPERATURE <= number <= GREATEST_TEMPERATURE:
        raise InvalidArgumentError(
            f"temperature must lie in [{LEAST_TEMPERATURE:g}, {GREATEST_TEMPERATURE:g}], got "
            f"{number}: 1 is the paper's"
        )
    return number


def check_recall(recall: object) -> float:
    """Allow 0 < recall ≤ 1."""
    number = check_real("recall", recall)
    if not 0.0 < number <= 1.0:
        raise InvalidArgumentError(f"recall must be above 0 and at most 1, got {number}: try 0.95")
    return number


def check_seed(seed: object) -> int:
    """Allow any int64."""
    return check_whole("seed", seed, least=-LARGEST - 1, most=LARGEST)


def check_sampling_temperature(temperature: object) -> float:
    """Allow 0, which takes the likeliest token, to 1e30."""
    number = check_real("sampling temperature", temperature)
    if not 0.0 <= number <= GREATEST_TEMPERATURE:
        raise InvalidArgumentError(
            f"sampling temperature must lie in [0, {GREATEST_TEMPERATURE:g}], got {number}: 1 "
            "samples from the mixture itself"
        )
    return number


def check_top_p(top_p: object) -> float:
    """Allow 0 ≤ top_p ≤ 1."""
    number = check_real("top_p", top_p)
    if not 0.0 <= number <= 1.0:
        raise InvalidArgumentError(f"top_p must lie in [0, 1], got {number}: 1 allows every token")
    return number
