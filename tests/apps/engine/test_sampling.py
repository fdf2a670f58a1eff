"""Drawing tokens: what may be drawn, how often, and that chance depends on the seed alone."""

import pytest
import torch

from knnlm.apps.engine.sampling import SamplingOptions, choose_token, seeded_generator

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25])
LOG_PROBS = PROBS.log()


def draws(temperature: float, top_p: float, count: int = 40_000) -> torch.Tensor:
    generator = seeded_generator(0, 0)
    options = SamplingOptions(temperature, top_p)
    tokens = [choose_token(LOG_PROBS, options, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / count


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"),
    [
        (1.0, 1.0, [0, 1, 3, 4]),
        (0.5, 1.0, [0, 1, 3, 4]),
        (2.0, 1.0, [0, 1, 3, 4]),
        (1.0, 0.96, [0, 1, 3, 4]),
        (1.0, 0.9, [1, 3, 4]),
        (1.0, 0.69, [1, 3]),
        (1.0, 0.4, [1]),
        (1.0, 0.0, [1]),
        (0.5, 0.79, [1, 3]),
    ],
)
def test_frequencies_are_the_probabilities(
    temperature: float, top_p: float, kept: list[int]
) -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = PROBS[kept].double() ** (1 / temperature)
    expected /= expected.sum()
    found = draws(temperature, top_p)
    deviation = (expected * (1 - expected) / 40_000).sqrt()
    assert bool((found[expected == 0] == 0).all()), "never drawn"
    assert bool(((found - expected).abs() <= 5 * deviation).all())


def test_temperature_0_takes_the_likeliest_and_of_equals_the_first() -> None:
    generator = seeded_generator(0, 0)
    options = SamplingOptions(temperature=0.0)
    assert choose_token(LOG_PROBS, options, generator) == 1
    assert choose_token(torch.tensor([-2.0, -1.0, -1.0]), options, generator) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-300])
def test_a_small_temperature_is_almost_none(temperature: float) -> None:
    assert draws(temperature, 1.0, count=200)[1] == 1.0


def test_one_seed_one_sequence() -> None:
    def sequence(seed: int, sample: int) -> list[int]:
        generator = seeded_generator(seed, sample)
        return [choose_token(torch.zeros(300), SamplingOptions(), generator) for _ in range(8)]

    assert sequence(3, 0) == sequence(3, 0)
    different = {tuple(sequence(*which)) for which in [(3, 0), (3, 1), (4, 0), (-3, 0), (2**62, 5)]}
    assert len(different) == 5


@pytest.mark.parametrize("seed", range(50))
def test_rounding_sways_no_draw(seed: int) -> None:
    """What another shape of the batch does to 50,000 probabilities."""
    torch.manual_seed(seed)
    log_probs = torch.log_softmax(3 * torch.randn(50_000), dim=0)
    rounded = log_probs + 1e-6 * torch.randn(50_000)
    one = choose_token(log_probs, SamplingOptions(), seeded_generator(seed, 0))
    assert one == choose_token(rounded, SamplingOptions(), seeded_generator(seed, 0))
