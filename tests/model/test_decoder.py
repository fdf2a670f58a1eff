"""Reading ahead and taking it back, the cache with room, and fast products of few rows."""

import copy
import random

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from transformers import DynamicCache

from knnlm.model.decoding import Decoder
from knnlm.model.few_rows import FewRows
from knnlm.model.keyed_model import KeyedModel
from knnlm.model.roomy_cache import RoomyCache

SHARED = [name for name in FAMILIES if name != "mamba"]


@pytest.mark.parametrize("family", SHARED)
def test_what_is_taken_back_was_never_read(family: str) -> None:
    """Rows of a batch keep what they like of their pieces; each is as if it had been alone."""
    keyed = KeyedModel(FAMILIES[family](), name=family)
    rng = random.Random(family)
    texts = [[rng.randrange(2, 384) for _ in range(length)] for length in (66, 5, 1)]
    with keyed.capture() as captured:
        decoder = Decoder(keyed, captured)
        assert decoder.takes_back(128)
        parts = [decoder.read(torch.tensor(text), None, 1)[1] for text in texts]
        cached = decoder.join(parts)
        for _ in range(16):
            pieces = [[rng.randrange(2, 384) for _ in range(rng.randint(1, 4))] for _ in texts]
            step, cached = decoder.advance(pieces, cached)
            width = max(map(len, pieces))
            kept = [rng.randint(1, len(piece)) for piece in pieces]
            kept[0] = 1  # the longest text loses most, and so all rows are padded
            for row, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
                text += piece[: kept[row]]
                with torch.no_grad():
                    whole = keyed.model(input_ids=torch.tensor([text])).logits[0]
                own = step.log_probs[row * width : row * width + kept[row]]
                expected = torch.log_softmax(whole, dim=-1)[-kept[row] :]
                torch.testing.assert_close(own, expected, atol=2e-3, rtol=1e-3)
            cached = decoder.take_back(cached, [width - own for own in kept])
            assert cached.mask.sum(dim=1).tolist() == [len(text) for text in texts]
            assert bool((cached.mask.diff(dim=1) >= 0).all()), "without gaps"
            assert cached.mask.shape[1] < max(map(len, texts)) + 16


def test_a_recurrent_state_is_not_taken_back() -> None:
    keyed = KeyedModel(FAMILIES["mamba"](), name="mamba")
    with keyed.capture() as captured:
        assert not Decoder(keyed, captured).takes_back(1)


def states(time: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, 2, time, 4)


def test_a_cache_with_room_holds_what_any_cache_holds() -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    ours, theirs = RoomyCache(), DynamicCache()
    for _ in range(200):
        match rng.choice(["read", "read", "crop", "select", "copy"]):
            case "crop" if theirs.get_seq_length() > 5:
                for cache in (ours, theirs):
                    cache.crop(-3)
            case "select" if theirs.get_seq_length():
                rows = torch.tensor([rng.randrange(3) for _ in range(3)])
                for cache in (ours, theirs):
                    cache.batch_select_indices(rows)
            case "copy":
                ours = copy.deepcopy(ours)
            case _:
                time = rng.choice([1, 1, 2, 90])
                for layer in range(2):
                    new = states(time), states(time)
                    for one, other in zip(
                        ours.update(*new, layer), theirs.update(*new, layer), strict=True
                    ):
                        assert torch.equal(one, other)
    assert ours.get_seq_length() == theirs.get_seq_length() > 100


def test_what_was_read_is_not_copied() -> None:
    cache = RoomyCache()
    cache.update(states(10), states(10), 0)
    place = cache.layers[0].keys.data_ptr()
    for _ in range(20):
        cache.update(states(1), states(1), 0)
    assert cache.layers[0].keys.data_ptr() == place


def test_few_rows_are_multiplied_as_ever_but_for_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False))
    few = FewRows(model)
    for shape in ((1, 1, 24), (1, 2, 24), (2, 2, 24), (1, 3, 24), (1, 5, 24)):
        inputs = torch.randn(shape)
        with torch.no_grad():
            expected = model(inputs)
            with few.reading(shape[0] * shape[1]):
                changed = model(inputs)
        torch.testing.assert_close(changed, expected)
        assert changed.is_contiguous()
        if not 2 <= shape[0] * shape[1] <= 4:
            assert torch.equal(changed, expected)
    with pytest.raises(ZeroDivisionError), few.reading(2):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model), "the layers are as they were"
