"""Adaptive λ: what it says of each query, and that it leaves the LM where nobody votes."""

import json
from collections.abc import Sequence

import pytest
import torch
from conftest import refusal
from safetensors.torch import load, save
from torch import Tensor

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.features import (
    TEMPERATURES,
    GateInput,
    Voters,
    Weighed,
    count_features,
    query_features,
    summarize_lm,
    weigh,
)
from knnlm.mixture.gate import (
    LEAST_LM_WEIGHT,
    BucketedLambda,
    LearnedGate,
    network_log_weights,
)
from knnlm.mixture.interpolation import (
    Votes,
    interpolate,
    interpolate_vocabulary,
    neighbor_log_weights,
    sum_by_token,
)

VOCAB = 11
SOURCES = [GateInput(16, 2.0), GateInput(5, 1.0)]


def random_gate(
    sources: Sequence[GateInput] = SOURCES, networks: int = 3, seed: int = 0
) -> LearnedGate:
    """A gate whose weights differ widely from query to query."""
    generator = torch.Generator().manual_seed(seed)
    features, components = count_features(sources), 1 + len(TEMPERATURES) * len(sources)
    sizes = [(features, 8), (8, 8), (8, components)]
    parameters: list[Tensor] = []
    for inputs, outputs in sizes:
        parameters.append(torch.randn(networks, inputs, outputs, generator=generator))
        parameters.append(torch.randn(networks, 1, outputs, generator=generator))
    scale = torch.rand(features, generator=generator) + 0.5
    return LearnedGate(sources, torch.randn(features, generator=generator), scale, parameters)


def some_queries(queries: int = 40) -> tuple[Tensor, list[Voters], Tensor]:
    """LM log-probabilities, voters of both sources (some queries have none), targets."""
    generator = torch.Generator().manual_seed(7)
    lm = torch.log_softmax(torch.randn(queries, VOCAB, generator=generator), dim=1)
    voters = []
    for source in SOURCES:
        distances = torch.rand(queries, source.k, generator=generator).mul(9).sort(dim=1).values
        tokens = torch.randint(0, VOCAB, (queries, source.k), generator=generator)
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
    return [weigh(source, of_source) for source, of_source in zip(SOURCES, voters, strict=True)]


def test_the_gate_is_a_mixture_of_its_components() -> None:
    lm, voters, _ = some_queries()
    gate, summary = random_gate(), summarize_lm(lm)
    mixed = of_vocabulary(lm, gate(summary, voters)).double().exp()
    sources = weighed(voters)
    weights = gate.weights(query_features(summary, sources)).double()
    for query in range(len(lm)):
        expected = weights[query, 0] * lm[query].double().exp()
        column = 1
        for of_source, log_weights, *_ in sources:
            for component in log_weights:
                weight = weights[query, column]
                column += 1
                if not bool(of_source.present[query]):
                    expected = expected + weight * lm[query].double().exp()
                    continue
                for share, token in zip(component[query], of_source.tokens[query], strict=True):
                    expected[token] += weight * float(share.double().exp())
        torch.testing.assert_close(mixed[query], expected, atol=1e-6, rtol=1e-4)


def test_the_weights_are_the_mean_of_the_networks() -> None:
    gate = random_gate(networks=3)
    features = torch.randn(6, len(gate.mean), generator=torch.Generator().manual_seed(1))
    alone = [
        LearnedGate(SOURCES, gate.mean, gate.scale, [p[n : n + 1] for p in gate.parameters])
        for n in range(3)
    ]
    expected = torch.stack([one.weights(features) for one in alone]).mean(dim=0)
    torch.testing.assert_close(gate.weights(features), expected)
    assert float((alone[0].weights(features) - alone[1].weights(features)).abs().max()) > 0.1


def test_networks_weigh_alike_while_learning_and_afterwards() -> None:
    gate = random_gate(networks=3)
    features = torch.randn(6, len(gate.mean), generator=torch.Generator().manual_seed(1))
    standard = gate.standardize(features).expand(3, -1, -1)
    while_learning = network_log_weights(gate.parameters, standard).exp().mean(dim=0)
    torch.testing.assert_close(gate.weights(features), while_learning)


def test_tokens_summed_before_the_choice_or_after_it_agree() -> None:
    """Summed before: each token has its log p_kNN of every component, queries without votes too."""
    lm, voters, _ = some_queries()
    gate, summary, sources = random_gate(), summarize_lm(lm), weighed(voters)
    sums = [sum_by_token(one.log_weights, one.voters.tokens) for one in sources]
    before = gate.choose_by_token(summary, sources, sums)
    after = [one.by_token() for one in gate.choose(summary, sources)]
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
    assert not any(bool(of_source.present[nobody].any()) for of_source in voters)
    assert torch.equal(of_vocabulary(lm, votes)[nobody], lm[nobody])
    own = lm.gather(1, targets[:, None])[:, 0]
    assert torch.equal(of_targets(lm, votes, targets)[nobody], own[nobody])


def test_a_source_without_voters_leaves_its_weight_to_the_lm() -> None:
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
    gate.parameters[-1][:, :, 0] = -1e4
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
        alone = gate(summary.of(one), [of_source.of(one) for of_source in voters])
        for mine, ours in zip(alone, together, strict=True):
            torch.testing.assert_close(lmbda_of(mine)[0], lmbda_of(ours)[query])
            torch.testing.assert_close(mine.log_weights[0], ours.log_weights[query])


def test_a_gate_is_saved_as_tensors_and_json() -> None:
    gate = random_gate()
    description = json.loads(json.dumps(gate.describe()))
    again = LearnedGate.from_tensors(load(save(gate.to_tensors())), description)
    assert again.sources == gate.sources
    lm, voters, _ = some_queries()
    for mine, ours in zip(
        again(summarize_lm(lm), voters), gate(summarize_lm(lm), voters), strict=True
    ):
        assert torch.equal(lmbda_of(mine), lmbda_of(ours))
        assert torch.equal(mine.log_weights, ours.log_weights)
    with refusal(DatastoreCorruptError, "network.3 is missing", "tune the datastore again"):
        tensors = gate.to_tensors()
        del tensors["network.3"]
        LearnedGate.from_tensors(tensors, description)
    with refusal(DatastoreCorruptError, "must have", "features and 7 components", "and 4"):
        one = random_gate(SOURCES[:1])
        LearnedGate.from_tensors(one.to_tensors(), description)


def test_a_gate_sure_of_the_lm_gives_the_lm() -> None:
    lm, voters, targets = some_queries()
    gate = random_gate()
    gate.parameters[-1][:, :, 0] = 1e4
    votes = gate(summarize_lm(lm), voters)
    assert torch.equal(of_vocabulary(lm, votes), lm)
    own = lm.gather(1, targets[:, None])[:, 0]
    assert torch.equal(of_targets(lm, votes, targets), own)


def test_no_query_needs_no_votes() -> None:
    lm, voters, _ = some_queries()
    none = slice(0, 0)
    votes = random_gate()(summarize_lm(lm).of(none), [of_source.of(none) for of_source in voters])
    assert [own.log_weights.shape for own in votes] == [(0, 16), (0, 5)]
    assert [lmbda_of(own).shape for own in votes] == [(0,), (0,)]


def test_buckets_are_ranges_of_the_nearest_distance() -> None:
    buckets = BucketedLambda(torch.tensor([1.0, 4.0]), torch.tensor([0.9, 0.5, 0.1]))
    nearest = torch.tensor([0.0, 1.0, 1.5, 4.0, 4.5, 1e9, torch.inf])
    distances = torch.stack([nearest, nearest + 1], dim=1)
    assert buckets(distances).tolist() == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.1, 0.1, 0.0])


def test_one_bucket_is_the_paper_s_mixture() -> None:
    lm, voters, targets = some_queries()
    of_source = voters[0]
    lmbda = BucketedLambda(torch.empty(0), torch.tensor([0.25]))(of_source.squared_distances)
    weights = neighbor_log_weights(of_source.squared_distances, 2.0)
    adaptive = Votes(weights, of_source.tokens, lmbda, of_source.present)
    assert torch.equal(
        of_targets(lm, [adaptive], targets),
        of_targets(lm, [adaptive._replace(lmbda=0.25)], targets),
    )
