"""Training a gate on text whose true tokens are known; takes seconds.

Needs only numbers for each token: its features, and what each component gave to the true token.
Equal numbers and an equal seed give an equal gate.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.mixture.features import GateInput, query_features, weigh
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.interpolation import Voters, target_knn_log_probs
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.rows import join, select
from knnlm.progress import Advance

_HIDDEN = 64
_NETWORKS = 5
_BATCH = 256
_EPOCHS = 12
_LEAST_STEPS, _MOST_STEPS = 600, 1500
_CHECKS = 20  # how often the held-out blocks are predicted while training
_LEARNING_RATE = 3e-3
_WARM_UP = 0.1  # of all steps
_WEIGHT_DECAY = 1e-2
_TOKENS_AT_ONCE = 512


class Examples(NamedTuple):
    """The numbers for each token that training needs.

    log_probs: of the true token, the LM's first, then of each component of each input; −inf where a
    component gives it nothing. present: whether the input of each component has a voter.
    """

    features: Float[Tensor, "token feature"]
    log_probs: Float[Tensor, "token component"]
    present: Bool[Tensor, "token component-1"]


def make_examples(
    inputs: Sequence[GateInput],
    lm: LMSummary,
    lm_log_probs: Float[Tensor, " token"],
    voters: Sequence[Voters],
    targets: Int[Tensor, " token"],
    *,
    advance: Advance | None = None,
) -> Examples:
    """Return an example for each token. voters: of each input. advance: told of tokens done."""
    parts = []
    for start in range(0, len(targets), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        weighed = [weigh(i, select(own, part)) for i, own in zip(inputs, voters, strict=True)]
        log_probs, present = [lm_log_probs[part]], []
        for own in weighed:
            votes = own.voters.tokens == targets[part, None]
            log_probs += [target_knn_log_probs(weights, votes) for weights in own.log_weights]
            present += [own.voters.present] * len(own.log_weights)
        features = query_features(select(lm, part), weighed)
        parts.append(Examples(features, torch.stack(log_probs, dim=1), torch.stack(present, dim=1)))
        if advance is not None:
            advance(len(features))
    return join(parts)


def fit_gate(
    inputs: Sequence[GateInput], examples: Examples, seed: int = 0
) -> tuple[LearnedGate, Float[Tensor, " token"]]:
    """Train the networks of a gate with AdamW, each with a fifth of the text held out.

    A fifth is a block of consecutive tokens, as neighboring tokens are alike. Each network is kept
    as it was when it predicted its block best. Also returns log p of every true token, under the
    network that did not learn from it.
    """
    generator = torch.Generator().manual_seed(seed)
    gate = _untrained(inputs, examples, generator)
    standard = gate.standardize(examples.features)
    best = _BestNetworks(gate, standard, examples)
    learning = [torch.nonzero(~held_out)[:, 0] for held_out in best.held_out]
    if len(learning) == 1:  # a text of one token
        learning = [torch.zeros(1, dtype=torch.int64)]
    least = min(len(tokens) for tokens in learning)
    batch = min(_BATCH, least)
    steps = min(max(_EPOCHS * least // batch, _LEAST_STEPS), _MOST_STEPS)
    gate.requires_grad_()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    for step, drawn in enumerate(islice(_batches(learning, batch, generator), steps), start=1):
        loss = -_log_probs(gate, standard, examples, drawn).mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % max(steps // _CHECKS, 1) == 0 or step == steps:
            best.update(gate)
    return best.gate, best.log_probs


def _untrained(
    inputs: Sequence[GateInput], examples: Examples, generator: torch.Generator
) -> LearnedGate:
    """Return a gate that gives each component the same weight, whatever the features."""
    tokens, features = examples.features.shape
    components = examples.log_probs.shape[1]
    network = []
    for inner, outer in ((features, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, components)):
        spread = math.sqrt(1 / inner) if outer == _HIDDEN else 0.0
        matrix = torch.empty(min(_NETWORKS, tokens), inner, outer)
        network += [
            matrix.uniform_(-1, 1, generator=generator).mul_(spread),
            torch.zeros(len(matrix), 1, outer),
        ]
    scale, mean = torch.std_mean(examples.features, dim=0, correction=0)
    return LearnedGate(inputs, mean, scale.clamp_min(1e-3), network)


def _rate(progress: float) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((progress - _WARM_UP) / (1 - _WARM_UP), 1.0)))


def _batches(
    learning: Sequence[Int[Tensor, " _"]], batch: int, generator: torch.Generator
) -> Iterator[Int[Tensor, "network batch"]]:
    """Yield a batch for each network from the tokens it learns from, in ever new random orders."""
    orders = [tokens[:0] for tokens in learning]
    while True:
        for network, tokens in enumerate(learning):
            if len(orders[network]) < batch:
                orders[network] = tokens[torch.randperm(len(tokens), generator=generator)]
        yield torch.stack([order[:batch] for order in orders])
        orders = [order[batch:] for order in orders]


def _log_probs(
    gate: LearnedGate,
    standard: Float[Tensor, "token feature"],
    examples: Examples,
    tokens: Int[Tensor, "network some"],
) -> Float[Tensor, "network some"]:
    """Return the true tokens' log p under each network's mixture. tokens: for each network."""
    log_weights = gate.network_log_weights(standard[tokens])
    log_probs, present = examples.log_probs[tokens], examples.present[tokens]
    # a component without voters leaves its weight to the LM
    lm_share = log_weights.clone()
    lm_share[..., 1:] = lm_share[..., 1:].masked_fill(present, -torch.inf)
    lm = lm_share.logsumexp(dim=-1) + log_probs[..., 0]
    others = (log_weights + log_probs)[..., 1:]  # −inf where there is no voter
    return torch.cat([lm[..., None], others], dim=-1).logsumexp(dim=-1)


class _BestNetworks:
    """Each network of a gate as it was when it predicted its held-out block best.

    held_out: which tokens each network does not learn from. log_probs: of the true tokens, under
    the network that did not learn from them.
    """

    def __init__(
        self, gate: LearnedGate, standard: Float[Tensor, "token feature"], examples: Examples
    ) -> None:
        self.gate = copy.deepcopy(gate)
        tokens = len(standard)
        self.log_probs = torch.full((tokens,), -torch.inf)
        block = torch.arange(tokens) * gate.networks // tokens
        self.held_out = [block == network for network in range(gate.networks)]
        self._standard = standard
        self._examples = examples

    @torch.no_grad()
    def update(self, gate: LearnedGate) -> None:
        """Take the networks that predict their held-out blocks better than those kept so far."""
        for network, held_out in enumerate(self.held_out):
            tokens = torch.nonzero(held_out)[:, 0]
            own = gate.alone(network)
            log_probs = _log_probs(own, self._standard, self._examples, tokens[None])[0]
            if float(log_probs.mean()) > float(self.log_probs[tokens].mean()):
                self.log_probs[tokens] = log_probs
                for kept, now in zip(self.gate.network, gate.network, strict=True):
                    kept[network] = now[network]
