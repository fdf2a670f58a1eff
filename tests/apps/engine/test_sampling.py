"""Drawing tokens: what may be drawn, how often, and that chance depends on the seed alone."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from knnlm.apps.engine.sampling import Sampler, SamplingOptions, choose_token, seeded_generator
from knnlm.errors import InvalidArgumentError

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


VOCAB = 40
OPTIONS: dict[str, Callable[[random.Random], Any]] = {
    "temperature": lambda chance: chance.choice([0.0, 0.3, 1.0, 1.7]),
    "top_k": lambda chance: chance.choice([0, 1, 5, VOCAB, 10**6]),
    "top_p": lambda chance: chance.choice([0.0, chance.random(), 1.0]),
    "min_p": lambda chance: chance.choice([0.0, chance.random() / 3, 1.0]),
    "presence_penalty": lambda chance: chance.uniform(-2, 2),
    "frequency_penalty": lambda chance: chance.uniform(-2, 2),
    "repetition_penalty": lambda chance: chance.choice([0.7, 1.0, 1.3, 1e-6, 1e6]),
    "logit_bias": lambda chance: {
        token: chance.choice([-100, 100, chance.uniform(-3, 3)])
        for token in chance.sample(range(VOCAB), chance.randint(0, 4))
    },
}


def reference_probs(
    log_probs: list[float], options: SamplingOptions, prompt: list[int], generated: list[int]
) -> list[float]:
    """Return the probability of drawing each token, step by step in plain Python."""
    scores = list(log_probs)
    for token, bias in options.logit_bias.items():
        scores[token] += bias
    for token in range(len(scores)):
        if token in prompt or token in generated:
            positive = scores[token] > 0
            scores[token] *= options.repetition_penalty ** (-1 if positive else 1)
        scores[token] -= options.frequency_penalty * generated.count(token)
        scores[token] -= options.presence_penalty * (token in generated)
    by_score = sorted(range(len(scores)), key=lambda token: -scores[token])
    if options.temperature == 0:
        return [float(token == by_score[0]) for token in range(len(scores))]
    weights = [math.exp((score - max(scores)) / options.temperature) for score in scores]
    allowed = by_score[: options.top_k] if options.top_k else by_score
    whole = sum(weights[token] for token in allowed)
    reached = 0.0
    kept: list[int] = []
    for token in allowed:
        first = not kept
        if first or (
            (options.top_p == 1 or reached < options.top_p)
            and weights[token] >= options.min_p * weights[by_score[0]]
        ):
            kept.append(token)
        reached += weights[token] / whole
    total = sum(weights[token] for token in kept)
    return [weights[token] / total * (token in kept) for token in range(len(scores))]


@pytest.mark.parametrize("number", range(200))
def test_options_do_what_a_plain_reference_does(number: int) -> None:
    """Each option alone, then any of them together, over twelve tokens of a completion."""
    chance = random.Random(number)
    torch.manual_seed(number)
    names = list(OPTIONS)
    some = (
        [names[number % len(names)]]
        if number < 64
        else chance.sample(names, chance.randint(2, len(names)))
    )
    options = SamplingOptions(seed=number, **{name: OPTIONS[name](chance) for name in some})
    prompt = [chance.randrange(VOCAB) for _ in range(9)]
    sampler = Sampler(options, 1, prompt)
    generator = seeded_generator(number, 1)
    generated: list[int] = []
    for _ in range(12):
        log_probs = torch.log_softmax(2 * torch.randn(VOCAB), dim=0)
        log_probs[chance.sample(range(VOCAB), 3)] = -math.inf  # tokens that nobody predicts
        probs = torch.tensor(
            reference_probs(log_probs.tolist(), options, prompt, generated), dtype=torch.float64
        )
        assert float(probs.sum()) == pytest.approx(1.0)
        if options.temperature == 0:
            expected = int(probs.argmax())
        else:
            arrivals = torch.empty_like(probs).exponential_(generator=generator)
            expected = int((probs / arrivals).argmax())
        before = log_probs.clone()
        assert sampler.next_token(log_probs) == expected
        assert torch.equal(log_probs, before), "what is reported stays as it is"
        generated.append(expected)


@pytest.mark.parametrize("number", range(20))
def test_options_are_those_of_transformers(number: int) -> None:
    chance = random.Random(number)
    torch.manual_seed(number)
    log_probs = torch.log_softmax(2 * torch.randn(1, VOCAB, dtype=torch.float64), dim=1)
    prompt = [chance.randrange(VOCAB) for _ in range(9)]
    options = SamplingOptions(
        temperature=chance.uniform(0.3, 2),
        top_k=chance.randint(1, VOCAB),
        top_p=chance.uniform(0.1, 1),
        min_p=chance.uniform(0, 0.3),
        repetition_penalty=chance.uniform(0.5, 2),
        logit_bias={token: chance.uniform(-3, 3) for token in chance.sample(range(VOCAB), 3)},
    )
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], b] for token, b in options.logit_bias.items()]),
            RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            TemperatureLogitsWarper(options.temperature),
            TopKLogitsWarper(options.top_k),
            TopPLogitsWarper(options.top_p),
            MinPLogitsWarper(options.min_p),
        ]
    )
    theirs: Any = processors(torch.tensor([prompt]), log_probs.clone())
    probs = torch.softmax(theirs[0], dim=0)
    for sample in range(20):
        generator = seeded_generator(0, sample)
        arrivals = torch.empty_like(probs).exponential_(generator=generator)
        sampler = Sampler(options, sample, prompt)
        assert sampler.next_token(log_probs[0]) == int((probs / arrivals).argmax())


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e30])
def test_no_temperature_is_too_small_or_too_large(temperature: float) -> None:
    options = SamplingOptions(temperature=temperature, logit_bias={3: 100, 1: -100})
    token = Sampler(options, 0, []).next_token(LOG_PROBS)
    assert token == 3 if temperature < 1 else token in {0, 1, 3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be at least 0, got -1: 0 allows every token"),
        ({"min_p": 1.5}, "min_p must lie in [0, 1], got 1.5: 0 allows every token"),
        ({"presence_penalty": 2.1}, "presence_penalty must lie in [-2, 2], got 2.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must lie in [-2, 2], got nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must lie in [1e-06, 1e+06], got 0"),
        ({"logit_bias": {3: 101}}, "logit_bias must lie in [-100, 100], got 101"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be at least 0, got -1"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        SamplingOptions(**options)
