"""Adaptive λ: what it says of each query, and that it leaves the LM where nobody votes."""

import json
from collections.abc import Sequence

import pytest
import torch
from conftest import refusal
from safetensors.torch import load, save
from torch import Tensor

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.by_distance import BucketedLambda
from knnlm.mixture.features import (
    TEMPERATURES,
    GateInput,
    Weighed,
    count_features,
    query_features,
    weigh,
)
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.interpolation import (
    LEAST_LM_WEIGHT,
    Voters,
    Votes,
    interpolate,
    interpolate_vocabulary,
    neighbor_log_weights,
    sum_by_token,
)
from knnlm.mixture.lm_summary import summarize_lm
from knnlm.mixture.rows import select

VOCAB = 11
INPUTS = [GateInput(16, 2.0), GateInput(5, 1.0)]


def random_gate(
    inputs: Sequence[GateInput] = INPUTS, networks: int = 3, seed: int = 0
) -> LearnedGate:
    """A gate whose weights differ widely from query to query."""
    generator = torch.Generator().manual_seed(seed)
    features, components = count_features(inputs), 1 + len(TEMPERATURES) * len(inputs)
    sizes = [(features, 8), (8, 8), (8, components)]
    network: list[Tensor] = []
    for inner, outer in sizes:
        network.append(torch.randn(networks, inner, outer, generator=generator))
        network.append(torch.randn(networks, 1, outer, generator=generator))
    scale = torch.rand(features, generator=generator) + 0.5
    return LearnedGate(inputs, torch.randn(features, generator=generator), scale, network)


def some_queries(queries: int = 40) -> tuple[Tensor, list[Voters], Tensor]:
    """LM log-probabilities, voters of both inputs (some queries have none), targets."""
    generator = torch.Generator().manual_seed(7)
    lm = torch.log_softmax(torch.randn(queries, VOCAB, generator=generator), dim=1)
    voters = []
    for gate_input in INPUTS:
        distances = torch.rand(queries, gate_input.k, generator=generator).mul(9).sort(dim=1).values
        tokens = torch.randint(0, VOCAB, (queries, gate_input.k), generator=generator)
        voters.append(Voters(distances, tokens))
    voters[0].squared_distances[:8] = torch.inf
    voters[1].squared_distances[4:12] = torch.inf
    voters[0].squared_distances[12:16, 3:] = torch.inf
    return lm, voters, torch.randint(0, VOCAB, (queries,), generator=generator)


def of_targets(lm: Tensor, votes: list[Votes], targets: Tensor) -> Tensor:
    components = [one.for_targets(targets) for one in votes]
    return interpolate(lm.gather(1, targets[:, None])[:, 0], components)


def of_vocabulary(lm: Tensor, votes: list[Votes]) -> Tensor:
    return interpolate_vocabulary(lm, [one.by_token() for one in votes])


def lmbda_of(votes: Votes) -> Tensor:
    assert isinstance(votes.lmbda, Tensor)
    return votes.lmbda


def weighed(voters: list[Voters]) -> list[Weighed]:
    return [weigh(gate_input, own) for gate_input, own in zip(INPUTS, voters, strict=True)]


def test_the_gate_is_a_mixture_of_its_components() -> None:
    lm, voters, _ = some_queries()
    gate, summary = random_gate(), summarize_lm(lm)
    mixed = of_vocabulary(lm, gate(summary, voters)).double().exp()
    weighed_inputs = weighed(voters)
    weights = gate.weights(query_features(summary, weighed_inputs)).double()
    for query in range(len(lm)):
        expected = weights[query, 0] * lm[query].double().exp()
        column = 1
        for own, log_weights, *_ in weighed_inputs:
            for component in log_weights:
                weight = weights[query, column]
                column += 1
                if not bool(own.present[query]):
                    expected = expected + weight * lm[query].double().exp()
                    continue
                for share, token in zip(component[query], own.tokens[query], strict=True):
                    expected[token] += weight * float(share.double().exp())
        torch.testing.assert_close(mixed[query], expected, atol=1e-6, rtol=1e-4)


def test_the_weights_are_the_mean_of_the_networks() -> None:
    gate = random_gate(networks=3)
    features = torch.randn(6, len(gate.mean), generator=torch.Generator().manual_seed(1))
    alone = [gate.alone(network) for network in range(3)]
    expected = torch.stack([one.weights(features) for one in alone]).mean(dim=0)
    torch.testing.assert_close(gate.weights(features), expected)
    assert float((alone[0].weights(features) - alone[1].weights(features)).abs().max()) > 0.1


def test_networks_weigh_alike_while_learning_and_afterwards() -> None:
    gate = random_gate(networks=3)
    features = torch.randn(6, len(gate.mean), generator=torch.Generator().manual_seed(1))
    standard = gate.standardize(features).expand(3, -1, -1)
    while_learning = gate.network_log_weights(standard).exp().mean(dim=0)
    torch.testing.assert_close(gate.weights(features), while_learning)


def test_tokens_summed_before_the_choice_or_after_it_agree() -> None:
    """Summed before: each token has its log p_kNN of every component, queries without votes too."""
    lm, voters, _ = some_queries()
    gate, summary, inputs = random_gate(), summarize_lm(lm), weighed(voters)
    sums = [sum_by_token(one.log_weights, one.voters.tokens) for one in inputs]
    before = gate.choose_by_token(summary, inputs, sums)
    after = [one.by_token() for one in gate.choose(summary, inputs)]
    for one, other in zip(before, after, strict=True):
        for column, expected in zip(one, other, strict=True):
            torch.testing.assert_close(column, expected)


def test_one_target_and_the_whole_vocabulary_agree() -> None:
    lm, voters, _ = some_queries()
    votes = random_gate()(summarize_lm(lm), voters)
    whole = of_vocabulary(lm, votes)
    for token in range(VOCAB):
        targets = torch.full((len(lm),), token)
        found = of_targets(lm, votes, targets)
        torch.testing.assert_close(found, whole[:, token], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.exp().sum(dim=1), torch.ones(len(lm)), atol=1e-5, rtol=0)


def test_a_query_without_voters_keeps_the_lm_to_the_bit() -> None:
    lm, voters, targets = some_queries()
    votes = random_gate()(summarize_lm(lm), voters)
    nobody = slice(4, 8)
    assert not any(bool(own.present[nobody].any()) for own in voters)
    assert torch.equal(of_vocabulary(lm, votes)[nobody], lm[nobody])
    own = lm.gather(1, targets[:, None])[:, 0]
    assert torch.equal(of_targets(lm, votes, targets)[nobody], own[nobody])


def test_an_input_without_voters_leaves_its_weight_to_the_lm() -> None:
    lm, voters, _ = some_queries()
    gate, summary = random_gate(), summarize_lm(lm)
    votes = gate(summary, voters)
    weights = gate.weights(query_features(summary, weighed(voters)))
    only_second, only_first = slice(0, 4), slice(8, 12)
    first = len(TEMPERATURES)
    assert bool((lmbda_of(votes[0])[only_second] == 0).all())
    assert bool((lmbda_of(votes[1])[only_first] == 0).all())
    torch.testing.assert_close(
        lmbda_of(votes[1])[only_second], weights[only_second, 1 + first :].sum(1)
    )
    torch.testing.assert_close(
        lmbda_of(votes[0])[only_first], weights[only_first, 1 : 1 + first].sum(1)
    )


def test_the_lm_is_never_silenced() -> None:
    gate = random_gate()
    gate.network[-1][:, :, 0] = -1e4
    weights = gate.weights(torch.randn(5, len(gate.mean)))
    torch.testing.assert_close(weights[:, 0], torch.full((5,), LEAST_LM_WEIGHT))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))


def test_features_far_from_all_that_was_seen_change_no_more_than_the_farthest() -> None:
    gate = random_gate()
    far = gate.mean + 6 * gate.scale
    weights = gate.weights(torch.stack([far, far * 1e6 + 1e9]))
    assert torch.equal(weights[0], weights[1])


def test_many_queries_are_weighed_as_one() -> None:
    lm, voters, _ = some_queries(1200)  # more than are held at once
    gate, summary = random_gate(), summarize_lm(lm)
    together = gate(summary, voters)
    for query in (0, 511, 512, 1199):
        one = slice(query, query + 1)
        alone = gate(select(summary, one), [select(own, one) for own in voters])
        for mine, ours in zip(alone, together, strict=True):
            torch.testing.assert_close(lmbda_of(mine)[0], lmbda_of(ours)[query])
            torch.testing.assert_close(mine.log_weights[0], ours.log_weights[query])


def test_a_gate_is_saved_as_tensors_and_json() -> None:
    gate = random_gate()
    stored = json.loads(json.dumps(gate.to_dict()))
    again = LearnedGate.from_dict(stored, load(save(gate.state_dict())))
    assert again.inputs == gate.inputs
    lm, voters, _ = some_queries()
    for mine, ours in zip(
        again(summarize_lm(lm), voters), gate(summarize_lm(lm), voters), strict=True
    ):
        assert torch.equal(lmbda_of(mine), lmbda_of(ours))
        assert torch.equal(mine.log_weights, ours.log_weights)
    with refusal(DatastoreCorruptError, "network.3 is missing", "tune the datastore again"):
        tensors = gate.state_dict()
        del tensors["network.3"]
        LearnedGate.from_dict(stored, tensors)
    with refusal(DatastoreCorruptError, "must have", "features and 7 components", "and 4"):
        one = random_gate(INPUTS[:1])
        LearnedGate.from_dict(stored, one.state_dict())


def test_a_gate_stored_when_inputs_were_called_sources_is_read() -> None:
    gate = random_gate()
    stored = {"sources": gate.to_dict()["inputs"]}
    assert LearnedGate.from_dict(stored, gate.state_dict()).inputs == gate.inputs


def test_a_gate_stays_where_it_is_when_it_is_needed_elsewhere() -> None:
    gate = random_gate()
    assert gate.on("cpu") is gate
    copied = gate.on("meta")
    assert (copied.mean.device.type, copied.network[0].device.type) == ("meta", "meta")
    assert (gate.mean.device.type, gate.network[0].device.type) == ("cpu", "cpu")


def test_a_gate_sure_of_the_lm_gives_the_lm() -> None:
    lm, voters, targets = some_queries()
    gate = random_gate()
    gate.network[-1][:, :, 0] = 1e4
    votes = gate(summarize_lm(lm), voters)
    assert torch.equal(of_vocabulary(lm, votes), lm)
    own = lm.gather(1, targets[:, None])[:, 0]
    assert torch.equal(of_targets(lm, votes, targets), own)


def test_no_query_needs_no_votes() -> None:
    lm, voters, _ = some_queries()
    none = slice(0, 0)
    votes = random_gate()(select(summarize_lm(lm), none), [select(own, none) for own in voters])
    assert [own.log_weights.shape for own in votes] == [(0, 16), (0, 5)]
    assert [lmbda_of(own).shape for own in votes] == [(0,), (0,)]


def test_buckets_are_ranges_of_the_nearest_distance() -> None:
    buckets = BucketedLambda(torch.tensor([1.0, 4.0]), torch.tensor([0.9, 0.5, 0.1]))
    nearest = torch.tensor([0.0, 1.0, 1.5, 4.0, 4.5, 1e9, torch.inf])
    distances = torch.stack([nearest, nearest + 1], dim=1)
    assert buckets(distances).tolist() == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.1, 0.1, 0.0])


def test_one_bucket_is_the_paper_s_mixture() -> None:
    lm, voters, targets = some_queries()
    own = voters[0]
    lmbda = BucketedLambda(torch.empty(0), torch.tensor([0.25]))(own.squared_distances)
    weights = neighbor_log_weights(own.squared_distances, 2.0)
    adaptive = Votes(weights, own.tokens, lmbda)
    assert torch.equal(
        of_targets(lm, [adaptive], targets),
        of_targets(lm, [adaptive._replace(lmbda=0.25 * own.present.float())], targets),
    )
