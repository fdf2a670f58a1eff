"""p_kNN and the mixture against the original implementations and against slow arithmetic."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knnlm.mixture.interpolation import (
    TargetVotes,
    Votes,
    interpolate,
    interpolate_vocabulary,
    neighbor_log_weights,
    target_knn_log_probs,
)

ORACLE = Path(__file__).parents[1] / "data" / "original_scores.npz"
LOG_ZERO = -10_000.0


def dense_knn_log_probs(log_weights: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """log p_kNN over the vocabulary: the mixture at λ = 1, −inf for a query without neighbors."""
    nothing = torch.full((len(tokens), vocab_size), -torch.inf)
    everywhere = torch.ones(len(tokens))
    return interpolate_vocabulary(nothing, [Votes(log_weights, tokens, everywhere).by_token()])


@pytest.fixture(scope="module")
def oracle() -> Mapping[str, Tensor]:
    with np.load(ORACLE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def as_log_zero(log_probs: Tensor) -> Tensor:
    return log_probs.clamp_min(LOG_ZERO)


def energies(oracle: Mapping[str, Tensor], precision: str, function: str) -> Tensor:
    """What stands in the exponent, negated, for each of the original's `knn_sim_func`."""
    queries, rows = oracle["queries"], oracle[f"faiss_ids_{precision}"]
    keys = oracle["keys"] if precision == "fp32" else oracle["keys"].half().float()
    if function == "do_not_recomp_l2":
        return oracle[f"faiss_dists_{precision}"]
    if function == "l2":
        return (queries[:, None] - keys[rows]).square().sum(dim=-1)
    return -(queries[:, None] * keys[rows]).sum(dim=-1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("function", ["l2", "do_not_recomp_l2", "dot"])
def test_sparse_scores_equal_the_originals(
    oracle: Mapping[str, Tensor], precision: str, function: str
) -> None:
    targets = oracle["targets"]
    votes = oracle["values"][oracle[f"faiss_ids_{precision}"]] == targets[:, None]
    weights = neighbor_log_weights(energies(oracle, precision, function), temperature=1.0)
    knn = target_knn_log_probs(weights, votes)
    scored = targets != oracle["pad"]
    expected = oracle[f"knn_log_prob_{precision}_{function}"]
    assert int(scored.sum()) > 100
    assert bool((expected[scored] > LOG_ZERO).any()), "the oracle must have neighbors that vote"
    # the original clips log 0, so a −inf and a very small probability both read −10000 there
    torch.testing.assert_close(as_log_zero(knn)[scored], expected[scored], atol=1e-5, rtol=1e-5)

    lm = oracle["lm_log_probs"].gather(1, targets[:, None])[:, 0]
    everywhere = torch.ones(len(targets))
    for lmbda in (0.25, 0.65):
        mixed = interpolate(lm, [TargetVotes(knn, lmbda * everywhere)])
        expected = oracle[f"combined_{precision}_{function}_lambda{lmbda}"]
        torch.testing.assert_close(mixed[scored], expected[scored], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1, 10])
def test_dense_scores_equal_knn_transformers(
    oracle: Mapping[str, Tensor], temperature: int
) -> None:
    weights = neighbor_log_weights(energies(oracle, "fp32", "do_not_recomp_l2"), temperature)
    values = oracle["values"][oracle["faiss_ids_fp32"]]
    knn = dense_knn_log_probs(weights, values, int(oracle["vocab_size"]))
    expected = oracle[f"full_knn_log_probs_T{temperature}"]
    assert bool((expected > LOG_ZERO).any())
    # that code adds probabilities in float32, where less than e^-103 is 0; ours have logarithms
    underflowed = (expected == LOG_ZERO) & knn.isfinite()
    assert bool((knn[underflowed] < -103.0).all())
    knn = knn.masked_fill(underflowed, -torch.inf)
    torch.testing.assert_close(as_log_zero(knn), expected, atol=1e-5, rtol=1e-5)

    component = Votes(weights, values, torch.full((len(values),), 0.25))
    mixed = interpolate_vocabulary(oracle["lm_log_probs"], [component.by_token()])
    expected = oracle[f"full_interpolated_T{temperature}_lambda0.25"]
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def random_neighbors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    """Distances with duplicates and absences, their values, LM log-probabilities, vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(40, 24, generator=generator).mul(30).sort(dim=1).values
    distances[:5, :3] = 0.0
    distances[5:10, 12:] = torch.inf
    distances[10:15] = torch.inf
    distances[15:20] += 5_000.0  # exp(−d) underflows
    values = torch.randint(0, 50, (40, 24), generator=generator)
    lm = torch.log_softmax(torch.randn(40, 50, generator=generator), dim=-1)
    return distances, values, lm, 50


def test_dense_equals_float64_arithmetic() -> None:
    distances, values, _, vocab_size = random_neighbors()
    knn = dense_knn_log_probs(neighbor_log_weights(distances, 2.0), values, vocab_size)
    for query in range(len(distances)):
        d = distances[query].double()
        if not bool(d.isfinite().any()):
            assert bool(knn[query].isneginf().all())
            continue
        weights = torch.exp(-(d - d.min()) / 2.0)
        expected = torch.zeros(vocab_size, dtype=torch.float64)
        for weight, value in zip(weights, values[query].tolist(), strict=True):
            expected[value] += weight
        expected /= weights.sum()
        torch.testing.assert_close(knn[query].double().exp(), expected, atol=1e-6, rtol=1e-5)


def test_sparse_equals_dense() -> None:
    distances, values, _, vocab_size = random_neighbors(1)
    weights = neighbor_log_weights(distances, 3.0)
    dense = dense_knn_log_probs(weights, values, vocab_size)
    for target in range(vocab_size):
        votes = (values == target) & distances.isfinite()
        sparse = target_knn_log_probs(weights, votes)
        torch.testing.assert_close(sparse, dense[:, target], atol=1e-5, rtol=1e-5)


def test_probabilities_sum_to_one() -> None:
    distances, values, lm, vocab_size = random_neighbors(2)
    present = distances.isfinite().any(dim=1)
    weights = neighbor_log_weights(distances, 1.0)
    knn = dense_knn_log_probs(weights, values, vocab_size)
    ones = torch.ones(len(lm))
    torch.testing.assert_close(knn.exp().sum(dim=1)[present], ones[present], atol=1e-5, rtol=0)
    for lmbda in (0.0, 0.3, 1.0):
        mixed = interpolate_vocabulary(
            lm, [Votes(weights, values, lmbda * present.float()).by_token()]
        )
        torch.testing.assert_close(mixed.exp().sum(dim=1), ones, atol=1e-5, rtol=0)


def test_the_ends_of_lmbda_are_exact() -> None:
    distances, values, lm, vocab_size = random_neighbors(3)
    present = distances.isfinite().any(dim=1)
    weights = neighbor_log_weights(distances, 1.0)
    knn = dense_knn_log_probs(weights, values, vocab_size)
    assert torch.equal(
        interpolate_vocabulary(lm, [Votes(weights, values, 0.0 * present.float()).by_token()]), lm
    )
    at_one = interpolate_vocabulary(lm, [Votes(weights, values, present.float()).by_token()])
    assert torch.equal(at_one[present], knn[present])
    assert torch.equal(at_one[~present], lm[~present]), "without a neighbor, p is p_LM"
    for target in range(vocab_size):
        alone, own = lm[:, target], knn[:, target]
        assert torch.equal(interpolate(alone, [TargetVotes(own, 0.0 * present.float())]), alone)
        one = interpolate(alone, [TargetVotes(own, present.float())])
        assert torch.equal(one, own.where(present, alone))


def test_lmbda_and_temperature_may_differ_by_query() -> None:
    distances, values, lm, _ = random_neighbors(4)
    present = distances.isfinite().any(dim=1)
    lmbda, temperature = torch.linspace(0, 1, len(lm)), torch.linspace(0.5, 9, len(lm))
    weights = neighbor_log_weights(distances, temperature[:, None])
    mixed = interpolate_vocabulary(lm, [Votes(weights, values, lmbda * present.float()).by_token()])
    for query, (weight, own) in enumerate(zip(lmbda.tolist(), temperature.tolist(), strict=True)):
        one = slice(query, query + 1)
        own_weights = neighbor_log_weights(distances[one], own)
        alone = interpolate_vocabulary(
            lm[one], [Votes(own_weights, values[one], weight * present[one].float()).by_token()]
        )
        torch.testing.assert_close(mixed[query], alone[0])


def test_gradients_count_a_token_of_many_votes_once() -> None:
    distances, values, lm, _ = random_neighbors(7)
    values = values % 5  # many neighbors vote alike
    weights, present = neighbor_log_weights(distances, 2.0), distances.isfinite().any(dim=1)
    knn = dense_knn_log_probs(weights, values, lm.shape[1])
    logits = lm.clone().requires_grad_()
    mixed = interpolate_vocabulary(
        logits, [Votes(weights, values, 0.4 * present.float()).by_token()]
    )
    (gradient,) = torch.autograd.grad(mixed.square().sum(), logits)
    lmbda = 0.4 * present[:, None].float()
    plain = torch.log(lmbda * knn.exp() + (1 - lmbda) * logits.exp())
    (expected,) = torch.autograd.grad(plain.square().sum(), logits)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_several_components_equal_float64_arithmetic() -> None:
    distances, values, lm, vocab_size = random_neighbors(5)
    other_distances, other_values, _, _ = random_neighbors(6)
    other_distances = other_distances.roll(7, dims=0)  # absent elsewhere
    parts = []
    expected = lm.double().exp()
    for d, v, lmbda in [(distances, values, 0.3), (other_distances, other_values, 0.5)]:
        weights, present = neighbor_log_weights(d, 2.0), d.isfinite().any(dim=1)
        knn = dense_knn_log_probs(weights, v, vocab_size)
        parts.append(Votes(weights, v, lmbda * present.float()))
        weight = lmbda * present[:, None].double()
        expected = expected + weight * (knn.double().exp() - lm.double().exp())
    mixed = interpolate_vocabulary(lm, [part.by_token() for part in parts])
    torch.testing.assert_close(mixed.double().exp(), expected, atol=1e-6, rtol=1e-5)
    reversed_mixed = interpolate_vocabulary(lm, [part.by_token() for part in parts[::-1]])
    torch.testing.assert_close(mixed, reversed_mixed, atol=1e-5, rtol=1e-5)
    assert torch.equal(interpolate_vocabulary(lm, []), lm)
    none = [part._replace(lmbda=torch.zeros(len(lm))) for part in parts]
    assert torch.equal(interpolate_vocabulary(lm, [part.by_token() for part in none]), lm)


def test_lmbdas_that_add_up_to_one_but_for_a_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    lm = torch.log_softmax(torch.randn(30, 50, generator=generator), dim=-1)[:, 0]
    part = TargetVotes(lm, torch.full((30,), 0.1))
    mixed = interpolate(lm, [part._replace(lmbda=torch.full((30,), 0.7)), part, part, part])
    torch.testing.assert_close(mixed, lm, atol=1e-6, rtol=1e-6)


def test_a_small_temperature_keeps_the_digits_of_large_distances() -> None:
    distances = torch.tensor([[30_000.0, 30_000.0625]])
    difference = neighbor_log_weights(distances, 0.1)[0].diff().item()
    assert difference == pytest.approx(-0.625, rel=1e-5)


def test_distances_far_beyond_float32_exponents_keep_their_order() -> None:
    distances = torch.tensor([[1e6, 1e6 + 200.0]])
    values = torch.tensor([[3, 4]])
    knn = dense_knn_log_probs(neighbor_log_weights(distances, 1.0), values, 5)
    assert knn[0, 3].item() == pytest.approx(0.0)
    assert knn[0, 4].item() == pytest.approx(-200.0), "in log space, not 0 rounded away"
