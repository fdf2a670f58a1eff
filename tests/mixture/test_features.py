"""Features against slow loops over every voter."""

import math

import pytest
import torch
from conftest import refusal
from torch import Tensor

from knnlm.errors import InvalidArgumentError
from knnlm.mixture.features import TEMPERATURES, GateInput, count_features, query_features, weigh
from knnlm.mixture.interpolation import Voters
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.mixture.rows import select

VOCAB = 9


def some_voters(queries: int = 30, k: int = 21, seed: int = 0) -> Voters:
    """Voters with copies at distance 0, with fewer than k, and with none."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(queries, k, generator=generator).mul(40).sort(dim=1).values
    distances[:4, :2] = 0.0
    distances[4:8, 5:] = torch.inf
    distances[8:12] = torch.inf
    tokens = torch.randint(0, VOCAB, (queries, k), generator=generator)
    return Voters(distances, tokens)


def some_lm(queries: int = 30, seed: int = 1) -> LMSummary:
    generator = torch.Generator().manual_seed(seed)
    return summarize_lm(torch.log_softmax(torch.randn(queries, VOCAB, generator=generator), 1))


def features_of(gate_input: GateInput, voters: Voters, lm: LMSummary) -> Tensor:
    return query_features(lm, [weigh(gate_input, voters)])


def test_the_lm_in_three_numbers() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]).log()
    lm = summarize_lm(log_probs)
    torch.testing.assert_close(lm.entropy, torch.tensor([1.5 * math.log(2), 0.0]))
    torch.testing.assert_close(lm.log_prob, torch.tensor([math.log(0.5), 0.0]))
    assert lm.token.tolist() == [0, 3]


def test_components_are_softmaxes_at_several_temperatures() -> None:
    gate_input, voters = GateInput(21, 3.0), some_voters()
    weights = weigh(gate_input, voters).log_weights
    energies = [-voters.squared_distances.double() / (3.0 * factor) for factor in TEMPERATURES]
    for log_weights, energy in zip(weights, energies, strict=True):
        expected = torch.softmax(energy, dim=1).float().nan_to_num(nan=0.0)
        torch.testing.assert_close(log_weights.exp(), expected, atol=1e-6, rtol=1e-5)


def test_features_equal_a_slow_count() -> None:
    gate_input, voters, lm = GateInput(21, 3.0), some_voters(), some_lm()
    found = features_of(gate_input, voters, lm)
    weights = weigh(gate_input, voters).log_weights[1].double().exp()
    ranks = [1, 2, 4, 8, 16]
    for query in range(30):
        there = voters.squared_distances[query].isfinite()
        tokens = voters.tokens[query].tolist()
        own = weights[query]
        votes = [
            sum(w for w, t in zip(own.tolist(), tokens, strict=True) if t == y)
            for y in range(VOCAB)
        ]
        for_lm = votes[int(lm.token[query])]
        expected = [float(lm.entropy[query]), float(lm.log_prob[query])]
        for rank in ranks:
            distance = float(voters.squared_distances[query, rank - 1]) / 3.0
            expected.append(math.log(min(max(distance, 1e-2), 1e4)))
        for rank in ranks[1:]:
            distinct = {
                t for t, is_there in zip(tokens[:rank], there[:rank], strict=True) if is_there
            }
            expected.append(math.log(max(len(distinct), 1)))
        expected += [
            math.log(max(max(votes), 1e-4)),
            -sum(vote * math.log(vote) for vote in votes if vote > 0),
            math.log(max(for_lm, 1e-4)),
            float(for_lm > max(votes) - 1e-4),
        ]
        torch.testing.assert_close(found[query], torch.tensor(expected), atol=2e-5, rtol=1e-4)


def test_features_do_not_depend_on_the_scale_of_the_keys() -> None:
    voters, lm = some_voters(), some_lm()
    larger = Voters(voters.squared_distances * 1000, voters.tokens)
    one = features_of(GateInput(21, 3.0), voters, lm)
    other = features_of(GateInput(21, 3000.0), larger, lm)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 1024])
def test_any_number_of_voters_gives_finite_features(k: int) -> None:
    gate_input, lm = GateInput(k, 1.0), some_lm()
    found = features_of(gate_input, some_voters(k=k), lm)
    assert bool(found.isfinite().all())
    assert found.shape == (30, count_features([gate_input]))


def test_fewer_voters_than_asked_for_are_described_alike() -> None:
    voters, lm = some_voters(k=5), some_lm()
    assert features_of(GateInput(64, 2.0), voters, lm).shape == (
        30,
        count_features([GateInput(64, 2.0)]),
    )


def test_a_query_is_described_alike_alone_and_among_others() -> None:
    gate_input, voters, lm = GateInput(21, 3.0), some_voters(), some_lm()
    together = features_of(gate_input, voters, lm)
    for query in range(30):
        alone = slice(query, query + 1)
        found = features_of(gate_input, select(voters, alone), select(lm, alone))
        torch.testing.assert_close(found[0], together[query])


def test_inputs_have_rules() -> None:
    with refusal(InvalidArgumentError, "k must be at least 1, got 0"):
        GateInput(0, 1.0)
    with refusal(InvalidArgumentError, "temperature must be positive and finite, got 0.0"):
        GateInput(1, 0.0)
