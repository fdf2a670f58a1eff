"""Fits to text whose best mixture is known, or can be found by trying."""

import math

import pytest
import torch
from torch import Tensor

from knnlm.evaluation.tally import share_hurt
from knnlm.mixture.features import TEMPERATURES, GateInput, count_features
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.interpolation import TargetVotes, Voters, interpolate, target_knn_log_probs
from knnlm.mixture.lm_summary import summarize_lm
from knnlm.mixture.rows import join, select
from knnlm.tuning.by_distance import fit_buckets
from knnlm.tuning.gate_training import Examples, fit_gate, make_examples

VOCAB = 11
INPUT = GateInput(8, 2.0)
COMPONENTS = 1 + len(TEMPERATURES)


def text_of_two_kinds(tokens: int = 3000, seed: int = 0) -> Examples:
    """Examples whose first feature tells whether the LM or the first component is right."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, count_features([INPUT]), generator=generator)
    log_probs = torch.full((tokens, COMPONENTS), math.log(0.01))
    neighbors_know = features[:, 0] > 0
    log_probs[:, 0] = torch.where(neighbors_know, math.log(0.01), math.log(0.8))
    log_probs[:, 1] = torch.where(neighbors_know, math.log(0.8), -torch.inf)
    return Examples(features, log_probs, torch.ones(tokens, COMPONENTS - 1, dtype=torch.bool))


def mixed(gate: LearnedGate, examples: Examples) -> Tensor:
    weights = gate.weights(examples.features).double()
    return (weights * examples.log_probs.double().exp()).sum(dim=1).log()


def test_a_gate_learns_when_to_ask_the_neighbors() -> None:
    gate, held_out_log_probs = fit_gate([INPUT], text_of_two_kinds())
    best_fixed = -math.log(0.81 / 2)
    assert float(-held_out_log_probs.mean()) < 0.5 * best_fixed
    unseen = text_of_two_kinds(seed=1)
    assert float(-mixed(gate, unseen).mean()) < 0.5 * best_fixed
    weights = gate.weights(unseen.features)
    sure = unseen.features[:, 0].abs() > 0.5
    neighbors_know = unseen.features[:, 0] > 0
    assert bool((weights[sure & neighbors_know, 1] > 0.8).all())
    assert bool((weights[sure & ~neighbors_know, 0] > 0.8).all())


def test_what_cannot_be_learned_looks_no_better_held_out() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = 400
    log_probs = torch.randn(tokens, COMPONENTS, generator=generator).mul(2).sub(3)
    noise = torch.randn(tokens, count_features([INPUT]), generator=generator)
    present = torch.ones(tokens, COMPONENTS - 1, dtype=torch.bool)
    gate, held_out_log_probs = fit_gate([INPUT], Examples(noise, log_probs, present))
    equal_shares = (log_probs.logsumexp(dim=1) - math.log(COMPONENTS)).mean()
    learned = mixed(gate, Examples(noise, log_probs, present)).mean()
    assert float(learned) > float(equal_shares), "a gate knows the text it learned from"
    assert float(held_out_log_probs.mean()) < float(equal_shares) + 0.02


def test_the_same_seed_gives_the_same_gate() -> None:
    examples = text_of_two_kinds(500)
    state = torch.get_rng_state()
    (one, held_out), (again, held_out_again) = (
        fit_gate([INPUT], examples, seed=3) for _ in range(2)
    )
    other, _ = fit_gate([INPUT], examples, seed=4)
    assert torch.equal(torch.get_rng_state(), state), "torch's own random numbers are left alone"
    for mine, same in zip(one.network, again.network, strict=True):
        assert torch.equal(mine, same)
    assert not torch.equal(one.network[0], other.network[0])
    assert torch.equal(held_out, held_out_again)
    assert not any(parameter.requires_grad for parameter in one.parameters())


@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_any_amount_of_text_gives_a_gate(tokens: int) -> None:
    examples = text_of_two_kinds(tokens)
    gate, held_out_log_probs = fit_gate([INPUT], examples)
    assert held_out_log_probs.shape == (tokens,)
    assert bool(held_out_log_probs.isfinite().all())
    torch.testing.assert_close(gate.weights(examples.features).sum(1), torch.ones(tokens))


def test_training_sees_what_the_mixture_gives() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = [INPUT, GateInput(4, 1.0)]
    lm = torch.log_softmax(torch.randn(700, VOCAB, generator=generator), dim=1)
    targets = torch.randint(0, VOCAB, (700,), generator=generator)
    voters = [
        Voters(
            torch.rand(700, i.k, generator=generator).mul(9).sort(dim=1).values,
            torch.randint(0, VOCAB, (700, i.k), generator=generator),
        )
        for i in inputs
    ]
    voters[0].squared_distances[:9] = torch.inf
    voters[1].squared_distances[5:20] = torch.inf
    summary, own = summarize_lm(lm), lm.gather(1, targets[:, None])[:, 0]
    examples = make_examples(inputs, summary, own, voters, targets)
    halves = [
        make_examples(
            inputs, select(summary, h), own[h], [select(v, h) for v in voters], targets[h]
        )
        for h in (slice(0, 320), slice(320, 700))
    ]
    joined = join(halves)
    torch.testing.assert_close(joined.features, examples.features)
    torch.testing.assert_close(joined.log_probs, examples.log_probs)
    assert torch.equal(joined.present, examples.present)

    gate, held_out_log_probs = fit_gate(inputs, examples)
    networks = gate.networks
    alone = [gate.alone(network) for network in range(networks)]
    # each token under the network that did not learn from it, by way of the evaluation
    for network, one in enumerate(alone):
        block = slice(
            math.ceil(700 * network / networks), math.ceil(700 * (network + 1) / networks)
        )
        there = [select(o, block) for o in voters]
        by_evaluation = interpolate(
            own[block],
            [
                TargetVotes(
                    target_knn_log_probs(v.log_weights, o.tokens == targets[block, None]),
                    v.lmbda,
                )
                for v, o in zip(one(select(summary, block), there), there, strict=True)
            ],
        )
        torch.testing.assert_close(held_out_log_probs[block], by_evaluation, atol=1e-4, rtol=1e-4)


def test_buckets_have_the_best_lmbda_of_their_range() -> None:
    generator = torch.Generator().manual_seed(6)
    nearest = torch.rand(2000, generator=generator).mul(10)
    lm = torch.rand(2000, generator=generator).clamp_min(1e-3).log()
    knn = torch.rand(2000, generator=generator).sub(nearest / 20).clamp_min(0.0).log()
    knn[nearest < 2] = lm[nearest < 2] + 0.1  # always better: all of the weight
    knn[nearest > 8] = -torch.inf  # never right: none of it
    nearest[:50] = torch.inf
    buckets = fit_buckets(nearest, lm, knn, buckets=10)
    assert len(buckets.edges) == 9
    chosen = buckets(nearest[:, None])
    assert bool((chosen[:50] == 0).all())
    grid = torch.arange(0, 1000) / 1000
    number = torch.bucketize(nearest, buckets.edges)
    for bucket in range(10):
        inside = (number == bucket) & nearest.isfinite()
        gains = torch.log(
            (1 - grid)[:, None] * lm[inside].exp() + grid[:, None] * knn[inside].exp()
        ).mean(dim=1)
        best = float(grid[gains.argmax()])
        assert float(buckets.lmbdas[bucket]) == pytest.approx(best, abs=2e-3)
    assert float(buckets.lmbdas[-1]) == 0.0
    assert float(buckets.lmbdas[0]) == pytest.approx(0.999)


def test_buckets_of_equal_distances_and_of_none() -> None:
    lm, knn = torch.full((6,), math.log(0.1)), torch.full((6,), math.log(0.3))
    same = fit_buckets(torch.full((6,), 2.0), lm, knn)
    assert float(same(torch.tensor([[2.0]]))) == pytest.approx(0.999)
    none = fit_buckets(torch.full((6,), torch.inf), lm, knn)
    assert none(torch.tensor([[2.0], [torch.inf]])).tolist() == [0.0, 0.0]


def test_tokens_hurt() -> None:
    lm = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    assert share_hurt(torch.tensor([-1.05, -1.2, -0.1, -9.0]), lm) == 0.5
