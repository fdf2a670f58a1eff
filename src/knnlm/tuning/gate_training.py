"""Fits what `adaptive` holds to tuning text whose true tokens are known; takes seconds.

Works on numbers of each token: its features, and what each component gave to the true token. No
neighbor is needed any more. Same numbers, same seed: same fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.mixture.features import (
    GateInput,
    LMSummary,
    Voters,
    query_features,
    weigh,
)
from knnlm.mixture.gate import (
    LEAST_LM_WEIGHT,
    BucketedLambda,
    LearnedGate,
    network_log_weights,
)
from knnlm.mixture.interpolation import target_knn_log_probs

_HIDDEN = 64
_NETWORKS = 5
_BATCH = 256
_EPOCHS = 12
_LEAST_STEPS, _MOST_STEPS = 600, 1500
_CHECKS = 20  # of the held-out parts, while training
_LEARNING_RATE = 3e-3
_WARM_UP = 0.1  # of all steps
_WEIGHT_DECAY = 1e-2
_AT_ONCE = 512
_BUCKETS = 16
_BISECTIONS = 30
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Examples:
    """What training needs of each token.

    log_probs: of the true token, the LM's first, then of each component of each source; −inf where
    a component gives it nothing. present: whether the source of each component has a voter.
    """

    features: Float[Tensor, "token feature"]
    log_probs: Float[Tensor, "token component"]
    present: Bool[Tensor, "token component-1"]

    def __len__(self) -> int:
        return len(self.features)


def make_examples(
    sources: Sequence[GateInput],
    lm: LMSummary,
    lm_log_probs: Float[Tensor, " token"],
    voters: Sequence[Voters],
    targets: Int[Tensor, " token"],
) -> Examples:
    """Return the examples of some tokens; `join_examples` puts several together."""
    features, log_probs, present = [], [], []
    for start in range(0, len(targets), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        those = [of_source.of(part) for of_source in voters]
        weighed = [weigh(s, v) for s, v in zip(sources, those, strict=True)]
        features.append(query_features(lm.of(part), weighed))
        columns, there = [lm_log_probs[part]], []
        for of_source in weighed:
            votes = of_source.voters.tokens == targets[part, None]
            columns += [target_knn_log_probs(one, votes) for one in of_source.log_weights]
            there += [of_source.voters.present] * len(of_source.log_weights)
        log_probs.append(torch.stack(columns, dim=1))
        present.append(torch.stack(there, dim=1))
    return Examples(torch.cat(features), torch.cat(log_probs), torch.cat(present))


def join_examples(parts: Sequence[Examples]) -> Examples:
    """Return the examples of consecutive parts of a text."""
    return Examples(
        torch.cat([part.features for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.present for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class FittedGate:
    """A gate, and what it gives to text that it was not fitted to.

    held_out_log_probs: of every token, under the network that did not learn from it.
    """

    gate: LearnedGate
    held_out_log_probs: Float[Tensor, " token"]


def fit_gate(sources: Sequence[GateInput], examples: Examples, seed: int = 0) -> FittedGate:
    """Train the networks of a gate with AdamW, each with a fifth of the text held out.

    A fifth is a block of consecutive tokens, as neighboring tokens are alike. Each network is kept
    as it was when it predicted its block best.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, features = examples.features.shape
    networks = min(_NETWORKS, tokens)
    scale, mean = torch.std_mean(examples.features, dim=0, correction=0)
    gate = LearnedGate(
        sources,
        mean,
        scale.clamp_min(1e-3),
        _initial(networks, features, examples.log_probs.shape[1], generator),
    )
    standard = gate.standardize(examples.features)
    held_out = torch.arange(tokens) * networks // tokens
    learning = [torch.nonzero(held_out != network)[:, 0] for network in range(networks)]
    if networks == 1:
        learning = [torch.arange(tokens)]
    least = min(len(own) for own in learning)
    batch = min(_BATCH, least)
    steps = min(max(_EPOCHS * least // batch, _LEAST_STEPS), _MOST_STEPS)
    parameters = [parameter.requires_grad_() for parameter in gate.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    best = [parameter.detach().clone() for parameter in parameters]
    best_log_probs = torch.full((tokens,), -torch.inf)
    orders = [torch.empty(0, dtype=torch.int64)] * networks
    for step in range(1, steps + 1):
        for network, own in enumerate(learning):
            if len(orders[network]) < batch:
                orders[network] = own[torch.randperm(len(own), generator=generator)]
        drawn = torch.stack([order[:batch] for order in orders])
        orders = [order[batch:] for order in orders]
        loss = -_mixed(parameters, standard[drawn], examples, drawn).mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % max(steps // _CHECKS, 1) == 0 or step == steps:
            _keep_best(parameters, best, standard, examples, held_out, best_log_probs)
    gate.parameters = best
    return FittedGate(gate, best_log_probs)


def _initial(
    networks: int, features: int, components: int, generator: torch.Generator
) -> list[Tensor]:
    """Return networks that give each component the same weight, whatever the features."""
    parameters = []
    for inputs, outputs in ((features, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, components)):
        spread = math.sqrt(1 / inputs) if outputs == _HIDDEN else 0.0
        matrix = torch.empty(networks, inputs, outputs)
        parameters += [
            matrix.uniform_(-1, 1, generator=generator).mul_(spread),
            torch.zeros(networks, 1, outputs),
        ]
    return parameters


def _rate(progress: float) -> float:
    """Return the learning rate's course: up in a line, down in a half cosine."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((progress - _WARM_UP) / (1 - _WARM_UP), 1.0)))


def _mixed(
    parameters: Sequence[Tensor],
    features: Float[Tensor, "network token feature"],
    examples: Examples,
    tokens: Int[Tensor, "network token"],
) -> Float[Tensor, "network token"]:
    """Return the true tokens' log p under each network's mixture."""
    log_weights = network_log_weights(parameters, features)
    log_probs, present = examples.log_probs[tokens], examples.present[tokens]
    # a component without voters leaves its weight to the LM
    lm_share = log_weights.clone()
    lm_share[..., 1:] = lm_share[..., 1:].masked_fill(present, -torch.inf)
    lm = lm_share.logsumexp(dim=-1) + log_probs[..., 0]
    others = (log_weights + log_probs)[..., 1:]  # −inf where there is no voter
    return torch.cat([lm[..., None], others], dim=-1).logsumexp(dim=-1)


@torch.no_grad()
def _keep_best(
    parameters: Sequence[Tensor],
    best: Sequence[Tensor],
    standard: Float[Tensor, "token feature"],
    examples: Examples,
    held_out: Int[Tensor, " token"],
    best_log_probs: Float[Tensor, " token"],
) -> None:
    """Keep each network that predicts its held-out block better than before, and what it gave."""
    for network in range(len(parameters[0])):
        block = torch.nonzero(held_out == network)[:, 0]
        own = [parameter[network : network + 1] for parameter in parameters]
        log_probs = _mixed(own, standard[block][None], examples, block[None])[0]
        if float(log_probs.mean()) > float(best_log_probs[block].mean()):
            best_log_probs[block] = log_probs
            for kept, now in zip(best, parameters, strict=True):
                kept[network] = now[network]


def fit_buckets(
    nearest: Float[Tensor, " token"],
    lm_log_probs: Float[Tensor, " token"],
    knn_log_probs: Float[Tensor, " token"],
    buckets: int = _BUCKETS,
) -> BucketedLambda:
    """Cut nearest squared distances into ranges of as many tokens each; find each one's best λ.

    Tokens without a neighbor (+inf) are left out. log p of a mixture is concave in λ, so that the
    best λ is where its slope is 0, or an end of [0, 1].
    """
    there = nearest.isfinite()
    nearest = nearest[there]
    if len(nearest) == 0:
        return BucketedLambda(torch.empty(0), torch.zeros(1))
    quantiles = torch.arange(1, buckets) / buckets
    edges = torch.unique(nearest.sort().values[(quantiles * len(nearest)).long()])
    bucket = torch.bucketize(nearest, edges)
    lm_probs = lm_log_probs[there].double().exp()
    difference = knn_log_probs[there].double().exp() - lm_probs
    low = torch.zeros(len(edges) + 1, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        slopes = difference / (lm_probs + middle[bucket] * difference).clamp_min(1e-300)
        rises = torch.zeros_like(low).index_add_(0, bucket, slopes) > 0
        low, high = middle.where(rises, low), high.where(rises, middle)
    lmbdas = ((low + high) / 2).clamp_max(1 - LEAST_LM_WEIGHT)
    # an end of [0, 1] is approached, not reached
    return BucketedLambda(edges, lmbdas.masked_fill(lmbdas < _NEGLIGIBLE, 0.0).float())
