"""The three numbers of a kNN-LM, and their rules."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knnlm.rules import check_k, check_lmbda, check_temperature


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
        # plain numbers, as JSON knows them
        object.__setattr__(self, "k", check_k(self.k))
        object.__setattr__(self, "lmbda", check_lmbda(self.lmbda))
        object.__setattr__(self, "temperature", check_temperature(self.temperature))


def parameters_to_dict(parameters: Sequence[Parameters]) -> dict[str, Any] | list[dict[str, Any]]:
    """Return plain values for JSON: one object for one datastore, a list for several."""
    plain = [asdict(each) for each in parameters]
    return plain[0] if len(plain) == 1 else plain
