"""How a token is sampled from a distribution: the same token whoever else is in the batch."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from knnlm.rules import (
    check_frequency_penalty,
    check_logit_bias,
    check_min_p,
    check_presence_penalty,
    check_repetition_penalty,
    check_sampling_temperature,
    check_seed,
    check_top_k,
    check_top_p,
    check_whole,
)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the tokens of a completion are sampled.

    temperature: tokens are drawn from p^(1/temperature); 0 takes the likeliest, the first of
    equals. Then only some may be drawn: the top_k likeliest (0 for all), of these the likeliest
    that together reach top_p, and of these the ones at least min_p times as likely as the
    likeliest. seed: makes the draws repeatable.

    Before the temperature, the log-probabilities are changed, in this order: logit_bias is added,
    by token id; repetition_penalty multiplies those of every token in the prompt and the completion
    (and divides them if they are positive); frequency_penalty is subtracted as often as the token
    is in the completion, and presence_penalty once if it is. A token of probability 0 keeps it.

    Raises InvalidArgumentError.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sampling_temperature(self.temperature)
        check_top_p(self.top_p)
        check_seed(self.seed)
        check_top_k(self.top_k)
        check_min_p(self.min_p)
        check_presence_penalty(self.presence_penalty)
        check_frequency_penalty(self.frequency_penalty)
        check_repetition_penalty(self.repetition_penalty)
        for token, bias in self.logit_bias.items():
            check_whole("a token id of logit_bias", token, least=0, remedy="ids count from 0")
            check_logit_bias(bias)


class Sampler:
    """Chooses the tokens of one sample of a completion; `prompt`: the tokens before it."""

    def __init__(self, options: SamplingOptions, sample: int, prompt: Sequence[int]) -> None:
        self._options = options
        self._generator = seeded_generator(options.seed, sample)
        self._prompt = _ids(prompt) if options.repetition_penalty != 1.0 else _ids(())
        self._biased = _ids(options.logit_bias)
        self._bias = torch.tensor(list(options.logit_bias.values()), dtype=torch.float64)
        self._counts: Counter[int] = Counter()

    def next_token(self, log_probs: Float[Tensor, " vocab"]) -> int:
        """Choose a token that follows those chosen before; log_probs: in nats."""
        token = choose_token(self._changed(log_probs), self._options, self._generator)
        self._counts[token] += 1
        return token

    def _changed(self, log_probs: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        options = self._options
        penalties = (options.frequency_penalty, options.presence_penalty)
        if not (any(penalties) or options.repetition_penalty != 1.0 or options.logit_bias):
            return log_probs
        changed = log_probs.to("cpu", torch.float64, copy=True)
        changed[self._biased] += self._bias
        chosen = _ids(self._counts)
        if options.repetition_penalty != 1.0:
            seen = torch.cat([self._prompt, chosen])
            before, penalty = changed[seen], options.repetition_penalty
            changed[seen] = torch.where(before < 0, before * penalty, before / penalty)
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        changed[chosen] -= options.frequency_penalty * counts + options.presence_penalty
        return changed


def _ids(tokens: Iterable[int]) -> Int64[Tensor, " token"]:
    return torch.tensor(list(tokens), dtype=torch.int64)


def seeded_generator(seed: int, sample: int) -> torch.Generator:
    """Return the random numbers for one sample of a completion."""
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def choose_token(
    log_probs: Float[Tensor, " vocab"], options: SamplingOptions, generator: torch.Generator
) -> int:
    """Draw a token; `generator` is the sample's, see `seeded_generator`.

    log_probs: need not add up to 1; penalties and biases are in them already. Arithmetic is in
    float64 on the CPU. The token with the first of exponential arrival times with rates p is a draw
    from p (Gumbel-max). Of all ways to draw it is the least sensitive to the rounding of p, so that
    the answer hardly ever depends on the shape of the batch.
    """
    if options.temperature == 0.0:
        return int(log_probs.argmax())
    scores = log_probs.double().cpu()
    # the likeliest becomes 0, so that no temperature is too small for it
    probs = _allowed(torch.softmax((scores - scores.max()) / options.temperature, dim=0), options)
    arrivals = torch.empty_like(probs).exponential_(generator=generator)
    return int((probs / arrivals).argmax())


def _allowed(
    probs: Float64[Tensor, " vocab"], options: SamplingOptions
) -> Float64[Tensor, " vocab"]:
    """Return p with 0 for the tokens that may not be drawn: top_k, top_p, min_p in this order."""
    if options.top_k == 0 and options.top_p == 1.0 and options.min_p == 0.0:
        return probs
    ordered, tokens = probs.sort(descending=True, stable=True)
    if options.top_k > 0:
        ordered[options.top_k :] = 0.0
        ordered /= ordered.sum()
    kept = ordered >= options.min_p * ordered[0]
    if options.top_p < 1.0:
        # a token is kept while those before it do not reach top_p; the likeliest always is
        kept &= ordered.cumsum(dim=0) - ordered < options.top_p
        kept[0] = True
    return torch.zeros_like(probs).scatter_(0, tokens, ordered * kept)
