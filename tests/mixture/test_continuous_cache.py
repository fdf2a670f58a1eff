"""The continuous cache against a loop over every pair, however the text arrives."""

import math

import pytest
import torch
from conftest import refusal
from torch import Tensor

from knnlm.choices import Similarity
from knnlm.errors import InvalidArgumentError
from knnlm.mixture.continuous_cache import (
    CacheParameters,
    CacheView,
    ContinuousCache,
    join_cache_neighbors,
)
from knnlm.mixture.interpolation import (
    Votes,
    interpolate_vocabulary,
    neighbor_log_weights,
    target_knn_log_probs,
)
from knnlm.mixture.parameters import Parameters

VOCAB = 12
DIMENSION = 5


def text(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, keys and targets of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (length + 1,), generator=generator)
    return tokens[:-1], torch.randn(length, DIMENSION, generator=generator), tokens[1:]


def brute_force(
    keys: Tensor, targets: Tensor, size: int, theta: float, similarity: str
) -> list[dict[int, float] | None]:
    """p_cache of every position, pair by pair in float64; None where nothing is remembered."""
    answers: list[dict[int, float] | None] = []
    dot = (keys.double() @ keys.double().T).tolist()
    distance = (-torch.cdist(keys.double(), keys.double()).square()).tolist()
    similarities = {"dot": dot, "distance": distance}[similarity]
    tokens = targets.tolist()
    for now in range(len(keys)):
        votes: dict[int, float] = {}
        for earlier in range(max(0, now - size), now):
            token = tokens[earlier]
            votes[token] = votes.get(token, 0.0) + math.exp(theta * similarities[now][earlier])
        total = sum(votes.values())
        answers.append({token: vote / total for token, vote in votes.items()} if votes else None)
    return answers


def assert_equal_to_brute_force(
    view: CacheView,
    keys: Tensor,
    targets: Tensor,
    size: int,
    theta: float,
    similarity: str = "distance",
) -> None:
    weights = neighbor_log_weights(-view.similarities, 1 / theta)
    present = view.values >= 0
    nothing = torch.full((len(keys), VOCAB), -torch.inf)
    component = Votes(weights, view.values.clamp_min(0), present.any(dim=1).float())
    dense = interpolate_vocabulary(nothing, [component.by_token()]).exp()
    votes = (view.values == targets[:, None]) & present
    sparse = target_knn_log_probs(weights, votes).exp()
    expected = torch.zeros(len(keys), VOCAB)
    for now, answer in enumerate(brute_force(keys, targets, size, theta, similarity)):
        assert bool(present[now].any()) == (answer is not None)
        for token, probability in (answer or {}).items():
            expected[now, token] = probability
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=0)
    own = expected.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(sparse, own, atol=1e-5, rtol=0)
    assert bool(weights[~present.any(dim=1)].isneginf().all())


def in_pieces(cache: ContinuousCache, inputs: Tensor, keys: Tensor, sizes: list[int]) -> CacheView:
    """Read a sequence piece by piece; the columns of the shorter recollections are absent pairs."""
    parts = [
        cache.read(piece[None], of_keys[None])
        for piece, of_keys in zip(torch.split(inputs, sizes), torch.split(keys, sizes), strict=True)
    ]
    width = max(part.values.shape[1] for part in parts)
    missing = [(width - part.values.shape[1], 0) for part in parts]
    pad = torch.nn.functional.pad
    return CacheView(
        torch.cat(
            [pad(p.similarities, m, value=-torch.inf) for p, m in zip(parts, missing, strict=True)]
        ),
        torch.cat([pad(p.values, m, value=-1) for p, m in zip(parts, missing, strict=True)]),
    )


@pytest.mark.parametrize("size", [1, 7, 300, 1000])
@pytest.mark.parametrize("theta", [1e-3, 0.7])
@pytest.mark.parametrize("similarity", list(Similarity))
def test_equal_to_brute_force(size: int, theta: float, similarity: str) -> None:
    inputs, keys, targets = text(600)  # several blocks of queries
    cache = ContinuousCache(size, DIMENSION, similarity=similarity)
    view = cache.read(inputs[None], keys[None])
    assert_equal_to_brute_force(view, keys, targets, size, theta, similarity)


@pytest.mark.parametrize("size", [1, 5, 40, 500])
@pytest.mark.parametrize("pieces", [[300], [1] * 300, [100, 1, 1, 98, 60, 40], [299, 1]])
def test_windows_and_single_steps_carry_on(size: int, pieces: list[int]) -> None:
    inputs, keys, targets = text(300, seed=1)
    view = in_pieces(ContinuousCache(size, DIMENSION), inputs, keys, pieces)
    assert_equal_to_brute_force(view, keys, targets, size, 0.5)


def test_no_query_sees_its_own_target_or_a_later_one() -> None:
    inputs, keys, _ = text(40, seed=2)
    view = ContinuousCache(40, DIMENSION).read(inputs[None], keys[None])
    for now in range(40):
        changed = inputs.clone()
        changed[now + 1 :] = VOCAB + 1
        again = ContinuousCache(40, DIMENSION).read(changed[None], keys[None])
        assert torch.equal(again.values[: now + 1], view.values[: now + 1])
        assert torch.equal(again.similarities[: now + 1], view.similarities[: now + 1])


def test_sequences_of_a_batch_never_meet() -> None:
    rows = [text(50, seed) for seed in (3, 4, 5)]
    inputs, keys = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    cache = ContinuousCache(20, DIMENSION, batch=3)
    together = [cache.read(inputs[:, :30], keys[:, :30])]
    together += [cache.read(inputs[:, t : t + 1], keys[:, t : t + 1]) for t in range(30, 50)]
    for row, (_, own_keys, targets) in enumerate(rows):
        parts = [
            part.similarities.reshape(3, -1, part.similarities.shape[1])[row] for part in together
        ]
        values = [part.values.reshape(3, -1, part.values.shape[1])[row] for part in together]
        view = CacheView(torch.cat(parts), torch.cat(values))
        assert_equal_to_brute_force(view, own_keys, targets, 20, 0.5)


@pytest.mark.parametrize("cut", [3, 7, 20])  # within, right after and beyond the padding
def test_padding_on_the_left_is_never_remembered(cut: int) -> None:
    inputs, keys, targets = text(30, seed=6)
    padding = 7
    padded = torch.cat([torch.zeros(padding, dtype=torch.int64), inputs])
    padded_keys = torch.cat([torch.full((padding, DIMENSION), 2.0), keys])
    real = torch.arange(padding + 30) >= padding
    cache = ContinuousCache(100, DIMENSION)
    view = cache.read(padded[None, :cut], padded_keys[None, :cut], real[None, :cut])
    tail = cache.read(padded[None, cut:], padded_keys[None, cut:], real[None, cut:])
    width = tail.values.shape[1]
    pad = torch.nn.functional.pad
    missing = (width - view.values.shape[1], 0)
    own = CacheView(
        torch.cat([pad(view.similarities, missing, value=-torch.inf), tail.similarities])[padding:],
        torch.cat([pad(view.values, missing, value=-1), tail.values])[padding:],
    )
    assert_equal_to_brute_force(own, keys, targets, 100, 0.5)


def test_beams_go_on_from_the_sequence_that_they_continue() -> None:
    one, other = text(12, 7), text(12, 8)
    cache = ContinuousCache(8, DIMENSION, batch=2)
    cache.read(torch.stack([one[0], other[0]]), torch.stack([one[1], other[1]]))
    cache.reorder(torch.tensor([1, 1]))
    following = torch.tensor([[3], [4]]), torch.randn(2, 1, DIMENSION)
    view = cache.read(*following)
    for row in range(2):
        expected = torch.cat([other[0][-7:], following[0][row]])
        assert torch.equal(view.values[row], expected)
        remembered = -(other[1][-8:] - following[1][row, 0]).square().sum(dim=1)
        torch.testing.assert_close(view.similarities[row], remembered)


def test_memory_is_bounded_by_the_size() -> None:
    cache = ContinuousCache(10, DIMENSION)
    inputs, keys, _ = text(1000, seed=9)
    for step in range(1000):
        cache.read(inputs[None, step : step + 1], keys[None, step : step + 1])
        assert cache._values.shape[1] <= 2 * 10 + 65
        assert cache._keys.shape[1] <= 2 * 10 + 65


def test_the_last_columns_are_a_smaller_cache() -> None:
    inputs, keys, _ = text(100, seed=10)
    large = ContinuousCache(60, DIMENSION).read(inputs[None], keys[None])
    small = ContinuousCache(9, DIMENSION).read(inputs[None], keys[None])
    assert torch.equal(large.values[:, -9:], small.values)
    torch.testing.assert_close(large.similarities[:, -9:], small.similarities)


def test_distances_of_keys_with_a_large_common_part_keep_their_digits() -> None:
    inputs, keys, _ = text(50, seed=11)
    near = ContinuousCache(50, DIMENSION).read(inputs[None], keys[None])
    far = ContinuousCache(50, DIMENSION).read(inputs[None], keys[None] + 1000.0)
    torch.testing.assert_close(far.similarities, near.similarities, atol=5e-3, rtol=0)


def test_the_nearest_pairs_come_first() -> None:
    inputs, keys, _ = text(30, seed=12)
    view = ContinuousCache(30, DIMENSION).read(inputs[None], keys[None])
    nearest = view.nearest(4)
    for now in range(30):
        expected = (keys[:now] - keys[now]).square().sum(dim=1).sort()
        held = min(now, 4)
        torch.testing.assert_close(nearest.squared_distances[now, :held], expected.values[:held])
        assert bool(nearest.squared_distances[now, held:].isposinf().all())
        assert bool((nearest.tokens[now, held:] == -1).all())
        assert torch.equal(nearest.tokens[now, :held], inputs[1:][expected.indices[:held]])
        assert torch.equal(nearest.ages[now, :held], now - expected.indices[:held])


def test_the_nearest_of_a_smaller_cache() -> None:
    inputs, keys, _ = text(60, seed=13)
    of_many = ContinuousCache(50, DIMENSION).read(inputs[None], keys[None]).nearest(6, size=9)
    of_few = ContinuousCache(9, DIMENSION).read(inputs[None], keys[None]).nearest(6)
    for got, expected in zip(of_many, of_few, strict=True):
        assert torch.equal(got[10:], expected[10:])


def test_what_is_taken_back_was_never_there() -> None:
    inputs, keys, _ = text(80, seed=14)
    other_inputs, other_keys, _ = text(80, seed=15)
    straight, winding = ContinuousCache(20, DIMENSION), ContinuousCache(20, DIMENSION)
    for start in range(0, 80, 5):
        piece = slice(start, start + 5)
        expected = straight.read(inputs[None, piece], keys[None, piece])
        winding.read(other_inputs[None, :7], other_keys[None, :7])
        winding.rewind(7)
        got = winding.read(inputs[None, piece], keys[None, piece])
        assert winding.position == straight.position == start + 5
        assert torch.equal(got.nearest(20).tokens[:, :15], expected.nearest(20).tokens[:, :15])


def test_consecutive_recollections_of_several_widths() -> None:
    inputs, keys, _ = text(30, seed=16)
    cache = ContinuousCache(20, DIMENSION)
    parts = [
        cache.read(inputs[None, part], keys[None, part]).nearest(20)
        for part in (slice(0, 4), slice(4, 30))
    ]
    whole = ContinuousCache(20, DIMENSION).read(inputs[None], keys[None]).nearest(20)
    joined = join_cache_neighbors(parts)
    torch.testing.assert_close(joined.squared_distances, whole.squared_distances)
    assert torch.equal(joined.tokens, whole.tokens)


def test_parameters_have_rules() -> None:
    with refusal(InvalidArgumentError, "size must be at least 1, got 0"):
        CacheParameters(0, Parameters())
    with refusal(InvalidArgumentError, "similarity must be one of", "got 'cosine'"):
        CacheParameters(10, Parameters(), "cosine")
    with refusal(InvalidArgumentError, "size must be at least 1, got 0"):
        ContinuousCache(0, 3)
    with refusal(InvalidArgumentError, "similarity must be one of", "got 'cosine'"):
        ContinuousCache(1, 3, similarity="cosine")
