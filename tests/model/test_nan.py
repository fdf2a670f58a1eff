"""A model that gives NaN is named as such at every entrance, and never answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, refusal, tiny_llama

import knnlm
from knnlm.errors import NonFiniteKeysError, UnsupportedModelError
from knnlm.index.queries import held_out_queries
from knnlm.knn_lm import KNNLM
from knnlm.model.language_model import LanguageModel

DOCUMENTS = [knnlm.Document("d", "The nearest neighbors of a hidden state. " * 8)]
# after the keys, in one logit only, and in the keys themselves
BREAKS: dict[str, Callable[[LanguageModel], torch.Tensor]] = {
    "after the keys": lambda lm: lm.model.model.layers[-1].mlp.down_proj.weight,
    "in the head": lambda lm: lm.model.lm_head.weight[7:8],
    "in the keys": lambda lm: lm.model.model.layers[-1].post_attention_layernorm.weight[None],
}
USES: dict[str, Callable[[KNNLM], object]] = {
    "perplexity": lambda model: model.perplexity(DOCUMENTS),
    "generate": lambda model: model.generate("hi", max_new_tokens=2),
    "sample": lambda model: model.generate("hi", max_new_tokens=2, do_sample=True, seed=0),
    "explain": lambda model: model.explain("hi"),
    "tune": lambda model: knnlm.tune(model, DOCUMENTS, max_k=8),
    "log_probs": lambda model: model.log_probs(torch.tensor([[0, 5, 6]])),
}


def fresh() -> LanguageModel:
    return LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny")


def break_it(lm: LanguageModel, where: str, weight: float = torch.nan) -> None:
    with torch.no_grad():
        BREAKS[where](lm)[0, 0] = weight


# an infinite weight of the head may be a token that is never to come
BROKEN = [(where, torch.nan) for where in BREAKS] + [
    (where, torch.inf) for where in BREAKS if where != "in the head"
]


@pytest.mark.parametrize(("where", "weight"), BROKEN)
@pytest.mark.parametrize("lmbda", [0.5, 0.0])
def test_nan_is_noticed_at_every_entrance(
    tmp_path: Path, where: str, weight: float, lmbda: float
) -> None:
    lm = fresh()
    store = knnlm.build(tmp_path / "s", lm, DOCUMENTS, window=32, context=8)
    model = KNNLM(lm, store, k=4, lmbda=lmbda, temperature=1.0)
    break_it(lm, where, weight)
    for use in USES.values():
        with refusal(UnsupportedModelError, "model 'tiny' must give numbers", "NaN", "float32"):
            use(model)


@pytest.mark.parametrize(("where", "weight"), [pair for pair in BROKEN if pair[0] != "in the head"])
def test_nan_is_noticed_where_keys_alone_are_read(
    tmp_path: Path, where: str, weight: float
) -> None:
    lm = fresh()
    store = knnlm.build(tmp_path / "s", lm, DOCUMENTS, window=32, context=8)
    store.check_model(lm)
    break_it(lm, where, weight)
    with refusal(UnsupportedModelError, "model 'tiny' must give numbers", "NaN"):
        held_out_queries(lm, store, DOCUMENTS)
    # keys that are NaN are refused with the name of their document
    error = NonFiniteKeysError if where == "in the keys" else UnsupportedModelError
    with pytest.raises(error):
        knnlm.build(tmp_path / "t", lm, DOCUMENTS, window=32, context=8)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("lmbda", [0.5, 0.0])
def test_nan_is_noticed_in_an_attached_model(tmp_path: Path, lmbda: float) -> None:
    lm = fresh()
    store = knnlm.build(tmp_path / "s", lm, DOCUMENTS, window=32, context=8)
    tokens = torch.tensor([[0, 5, 6]])
    with knnlm.attach(lm.model, store, k=4, lmbda=lmbda, temperature=1.0):
        lm.model(tokens)
        break_it(lm, "in the head")
        with pytest.raises(UnsupportedModelError, match="gives NaN"):
            lm.model(tokens)
