"""The rules of k, λ and temperature."""

import math

import pytest

from knnlm.errors import InvalidArgumentError
from knnlm.mixture.parameters import Parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"lmbda": -0.1}, r"lmbda \(λ\) must lie in \[0, 1\], got -0.1"),
        ({"lmbda": 1.01}, r"lmbda \(λ\) must lie in \[0, 1\], got 1.01"),
        ({"lmbda": math.nan}, "got nan"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.inf}, "got inf"),
        ({"temperature": math.nan}, "got nan"),
    ],
)
def test_refusals(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Parameters(**arguments)  # type: ignore[arg-type]


def test_the_limits_are_allowed() -> None:
    assert Parameters(k=1, lmbda=0.0).lmbda == 0.0
    assert Parameters(lmbda=1.0).lmbda == 1.0
