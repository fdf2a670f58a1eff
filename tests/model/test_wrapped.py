"""Models in wrappers are the models that they wrap."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from torch import Tensor, nn
from transformers import PreTrainedModel

import knnlm
from knnlm.errors import DatastoreMismatchError, InvalidArgumentError, UnsupportedModelError
from knnlm.model.language_model import LanguageModel

TOKENS = torch.tensor([[0, 5, 6, 9]])


class Adapter(nn.Module):
    """Looks like PEFT's model, which is not installed here."""

    def __init__(self, model: PreTrainedModel, is_prompt_learning: bool = False) -> None:
        super().__init__()
        self.base_model = model
        self.active_peft_config = type("Config", (), {"is_prompt_learning": is_prompt_learning})()

    def get_base_model(self) -> nn.Module:
        result: nn.Module = self.base_model
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def whole(model: Any) -> Any:
    return compiled(model)


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def decoder(model: Any) -> Any:
    model.model = compiled(model.model)
    return model


def last_layer(model: Any) -> Any:
    model.model.layers[-1] = compiled(model.model.layers[-1])
    return model


def forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


def parallel(model: Any) -> Any:
    return nn.DataParallel(model)


def parallel_compiled(model: Any) -> Any:
    return nn.DataParallel(compiled(model))


WRAPPERS = [whole, in_place, decoder, last_layer, forward, parallel, parallel_compiled, Adapter]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> knnlm.Datastore:
    lm = LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny")
    path = tmp_path_factory.mktemp("wrapped") / "s"
    return knnlm.build(path, lm, [knnlm.Document("a", PROSE)])


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("was_called", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_attached_to_and_left_as_it_was(
    wrap: Callable[[Any], Any], was_called: bool, store: knnlm.Datastore
) -> None:
    plain = tiny_llama()
    own = logits(plain)
    with knnlm.attach(plain, store, k=4):
        mixed = logits(plain)
    model = wrap(tiny_llama())
    if was_called:
        logits(model)
    for _ in range(2):
        with knnlm.attach(model, store, k=4):
            torch.testing.assert_close(logits(model), mixed)
        torch.testing.assert_close(logits(model), own)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_models_keys_are_the_models(
    wrap: Callable[[Any], Any], store: knnlm.Datastore
) -> None:
    model = wrap(tiny_llama())
    logits(model)
    lm = LanguageModel(model, byte_tokenizer())
    store.check_model(lm)
    assert torch.equal(lm.keys(TOKENS), LanguageModel(tiny_llama(), byte_tokenizer()).keys(TOKENS))


def test_what_holds_no_model_is_refused(store: knnlm.Datastore) -> None:
    for thing in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))):
        with refusal(InvalidArgumentError, "model must be a transformers PreTrainedModel, got "):
            knnlm.attach(thing, store)


def test_wrappers_that_change_what_is_read_are_refused(store: knnlm.Datastore) -> None:
    with refusal(UnsupportedModelError, "must read the tokens that it is given"):
        knnlm.attach(Adapter(tiny_llama(), is_prompt_learning=True), store)
    split = nn.DataParallel(tiny_llama())
    split.device_ids = [0, 1]
    with refusal(UnsupportedModelError, "must compute on one device", "give its .module"):
        knnlm.attach(split, store)


def test_an_adapters_weights_are_other_weights(store: knnlm.Datastore) -> None:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential()
    attention.q_proj.base_layer = tiny_llama().model.layers[0].self_attn.q_proj
    with refusal(DatastoreMismatchError, "was built with tiny (weights ", "take the adapter off"):
        knnlm.attach(Adapter(model), store)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_weights_name_a_precision_that_rounds_otherwise(
    dtype: torch.dtype, store: knnlm.Datastore
) -> None:
    model = tiny_llama().to(dtype)
    if dtype == torch.bfloat16:
        knnlm.attach(model, store).detach()
        return
    with refusal(
        DatastoreMismatchError, "float16 only rounds", "than float32: load it with dtype float32"
    ):
        knnlm.attach(model, store)
    with refusal(DatastoreMismatchError, "load that model or build another datastore"):
        knnlm.attach(tiny_llama(seed=1), store)
