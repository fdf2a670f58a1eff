"""The rules about numbers that callers give: each stands here once, for every entrance.

Each check returns the number as a plain int or float (NumPy's are numbers too, booleans and texts
are none) and raises InvalidArgumentError.
"""

import math
import re
from numbers import Integral, Real

from knnlm.errors import InvalidArgumentError

MOST = 2**31 - 1
"""The greatest number of anything that may be asked for; tensors and FAISS hold it."""
LARGEST = 2**63 - 1
"""The greatest number of tokens, rows or bytes: int64, as in tensors and in SQLite."""
_DAY_SECONDS = 86_400
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


def check_flag(name: str, flag: object) -> bool:
    """Allow True and False, and nothing that only counts as one of them."""
    if not isinstance(flag, bool):
        raise InvalidArgumentError(f"{name} must be True or False, got {flag!r}")
    return flag


def check_real(name: str, number: object) -> float:
    """Allow every number that a float holds, NaN and infinities too."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise InvalidArgumentError(f"{name} must be a number, got {number!r}")
    try:
        return float(number)
    except OverflowError:
        raise InvalidArgumentError(f"{name} must be a number that a float can hold") from None


def check_between(name: str, number: object, least: float, most: float, *, meaning: str) -> float:
    """Allow numbers from `least` to `most`; meaning: of some of them, for the message."""
    real = check_real(name, number)
    if not least <= real <= most:
        raise InvalidArgumentError(
            f"{name} must lie in [{least:g}, {most:g}], got {real}: {meaning}"
        )
    return real


def _shown(whole: int) -> str:
    try:
        return str(whole)
    except ValueError:  # Python writes no longer ones
        return "one of more than 4,300 digits"


def check_k(k: object, name: str = "k") -> int:
    """Allow a number of neighbors: k ≥ 1."""
    return check_whole(name, k, remedy="ask for a neighbor")


def check_positive_seconds(name: str, seconds: object) -> float:
    """Allow a time above 0 s, and at most a day."""
    number = check_real(name, seconds)
    if not 0.0 < number <= _DAY_SECONDS:
        raise InvalidArgumentError(
            f"{name} must be above 0 and at most {_DAY_SECONDS} s, got {number}: try 5"
        )
    return number


def check_lmbda(lmbda: object) -> float:
    """Allow 0 ≤ λ ≤ 1."""
    meaning = "0 is the language model alone, 1 the neighbors alone"
    return check_between("lmbda (λ)", lmbda, 0.0, 1.0, meaning=meaning)


def check_share(name: str, share: object) -> float:
    """Allow 0 ≤ share ≤ 1."""
    return check_between(name, share, 0.0, 1.0, meaning="0 is none of the searches, 1 all")


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


def check_lease(lease: object) -> float:
    """Allow 1 to 1e9 seconds."""
    return check_between("lease", lease, 1.0, 1e9, meaning="seconds that a worker may be silent")


def check_memory(memory: object) -> int:
    """Allow a number of bytes, or a text such as 8GiB, 500 MB or 1.5g, from 1 MiB on."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", memory.lower())
        if match is None:
            raise InvalidArgumentError(
                f"memory must be a number of bytes such as 8GiB or 500MB, got {memory!r}"
            )
        number, prefix, binary = match.groups()
        base = 1024 if binary else 1000
        memory = int(float(number) * base ** " kmgt".index(prefix or " "))
    return check_whole("memory", memory, least=1 << 20, most=LARGEST, remedy="give more bytes")


def shown_bytes(number: float) -> str:
    """Return a number of bytes as people read it, as `check_memory` does."""
    for prefix in ("k", "M", "G"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {prefix}B"
    return f"{number / 1000:.3g} TB"


def shown_seconds(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def check_seed(seed: object) -> int:
    """Allow any int64."""
    return check_whole("seed", seed, least=-LARGEST - 1, most=LARGEST)


def check_sampling_temperature(temperature: object) -> float:
    """Allow 0, which takes the likeliest token, to 1e30."""
    meaning = "1 samples from the mixture itself"
    return check_between(
        "sampling temperature", temperature, 0.0, GREATEST_TEMPERATURE, meaning=meaning
    )


def check_top_p(top_p: object) -> float:
    """Allow 0 ≤ top_p ≤ 1."""
    return check_between("top_p", top_p, 0.0, 1.0, meaning="1 allows every token")


def check_top_k(top_k: object) -> int:
    """Allow a number of tokens, and 0 for all of them."""
    return check_whole("top_k", top_k, least=0, remedy="0 allows every token")


def check_min_p(min_p: object) -> float:
    """Allow 0 ≤ min_p ≤ 1."""
    return check_between("min_p", min_p, 0.0, 1.0, meaning="0 allows every token")


def check_presence_penalty(penalty: object) -> float:
    """Allow −2 to 2, in nats, as OpenAI does."""
    return check_between("presence_penalty", penalty, -2.0, 2.0, meaning="0 changes nothing")


def check_frequency_penalty(penalty: object) -> float:
    """Allow −2 to 2, in nats, as OpenAI does."""
    return check_between("frequency_penalty", penalty, -2.0, 2.0, meaning="0 changes nothing")


def check_repetition_penalty(penalty: object) -> float:
    """Allow 1e-6 to 1e6, by which log-probabilities are multiplied."""
    return check_between("repetition_penalty", penalty, 1e-6, 1e6, meaning="1 changes nothing")


def check_logit_bias(bias: object) -> float:
    """Allow −100 to 100, in nats, as OpenAI does."""
    return check_between("logit_bias", bias, -100.0, 100.0, meaning="0 changes nothing")
