"""The three numbers of a kNN-LM, and their rules."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knnlm.choices import check_number
from knnlm.errors import InvalidArgumentError

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
"""Beyond these, squared distances divided by T overflow float32."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many neighbors vote, how sharply, and how much their vote counts.

    k: neighbors retrieved for each token (≥ 1).
    lmbda: the weight λ of p_kNN in p = λ p_kNN + (1 − λ) p_LM (Khandelwal et al. 2020, eq. 3).
    temperature: T in p_kNN ∝ exp(−d²/T), in units of squared distance (1e-30 to 1e30; the paper's
    is 1).

    Raises InvalidArgumentError.
    """

    k: int = 1024
    lmbda: float = 0.25
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_k(self.k)
        if not 0.0 <= self.lmbda <= 1.0:
            raise InvalidArgumentError(
                f"lmbda (λ) must lie in [0, 1], got {self.lmbda}: 0 is the language model alone, "
                "1 the neighbors alone"
            )
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise InvalidArgumentError(
                f"temperature must be positive and finite, got {self.temperature}: 1 is the paper's"
            )
        check_number("temperature", self.temperature, LEAST_TEMPERATURE, MOST_TEMPERATURE)


def check_k(k: int, argument: str = "k") -> None:
    """Raise InvalidArgumentError for a number of neighbors that nobody can ask for."""
    check_number(argument, k, 1, remedy="ask for a neighbor" if k < 1 else "ask for fewer")


def parameters_to_dict(parameters: Sequence[Parameters]) -> dict[str, Any] | list[dict[str, Any]]:
    """Return plain values for JSON: one object for one datastore, a list for several."""
    plain = [asdict(each) for each in parameters]
    return plain[0] if len(plain) == 1 else plain
