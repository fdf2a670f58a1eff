"""A mixture attached to unmodified models, against a loop that reads everything again per token."""

import contextlib
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from families import FAMILIES
from jaxtyping import Float
from stores import distinct_documents, slow_knn_probs
from torch import Tensor
from transformers import LogitsProcessor, Trainer, TrainingArguments, pipeline

import knnlm
from knnlm.attachment import attachment
from knnlm.attachment.attachment import attach
from knnlm.datastore.datastore import Datastore
from knnlm.errors import (
    AttachmentError,
    DatastoreChangedError,
    DatastoreMismatchError,
    InvalidArgumentError,
)
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel

K, LMBDA, TEMPERATURE = 12, 0.6, 10.0
GIVEN: dict[str, Any] = {"k": K, "lmbda": LMBDA, "temperature": TEMPERATURE}
PROMPTS = ["The nearest neighbors of", "A datastore", "What followed there is a guess at what"]
NEW = 6
_MODELS: dict[str, tuple[LanguageModel, Datastore]] = {}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attachment")


@pytest.fixture(params=FAMILIES)
def of_family(request: pytest.FixtureRequest, folder: Path) -> tuple[LanguageModel, Datastore]:
    return remembered(request.param, folder)


@pytest.fixture
def llama(folder: Path) -> tuple[LanguageModel, Datastore]:
    return remembered("llama", folder)


def remembered(family: str, folder: Path) -> tuple[LanguageModel, Datastore]:
    if family not in _MODELS:
        lm = LanguageModel(FAMILIES[family](), byte_tokenizer(), name=family)
        lm.model.generation_config.pad_token_id = 0
        store = build(folder / family, lm, distinct_documents(2), window=48, context=16)
        _MODELS[family] = lm, store
    return _MODELS[family]


def slow_log_probs(
    lm: LanguageModel, store: Datastore, tokens: Tensor, lmbda: float = LMBDA
) -> Float[Tensor, "time vocab"]:
    """The mixture after every position, in float64, entry by entry, from brute-force distances."""
    with torch.no_grad():
        lm_probs = torch.softmax(lm.model(tokens[None]).logits[0].double(), dim=-1)
    knn_probs = slow_knn_probs(lm, store, tokens[None], K, TEMPERATURE)[0]
    return torch.log(lmbda * knn_probs + (1 - lmbda) * lm_probs)


class SlowMixture(LogitsProcessor):  # type: ignore[misc]
    """Replaces what an unattached model says by the mixture, reading all tokens again each time."""

    def __init__(self, lm: LanguageModel, store: Datastore, padding: list[int]) -> None:
        self.lm, self.store, self.padding = lm, store, padding

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        beams = len(input_ids) // len(self.padding)
        rows = [
            slow_log_probs(self.lm, self.store, tokens[self.padding[number // beams] :])[-1]
            for number, tokens in enumerate(input_ids)
        ]
        return torch.stack(rows).to(scores.dtype)


def padded(lm: LanguageModel, prompts: list[str]) -> tuple[dict[str, Tensor], list[int]]:
    rows = [[lm.start_token, *tokens.tolist()] for tokens in lm.encode(prompts)]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * n + row for n, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(r) for n, r in zip(padding, rows, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}, padding


def generated(lm: LanguageModel, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    new: list[list[int]] = lm.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return torch.as_tensor(new).tolist()


WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "greedy": (PROMPTS[:1], {}),
    "no cache": (PROMPTS[:1], {"use_cache": False}),
    "padded batch": (PROMPTS, {}),
    "beams": (PROMPTS[:2], {"num_beams": 3}),
    "sampling": (PROMPTS[:2], {"do_sample": True, "top_k": 0}),
    "static cache": (PROMPTS[:1], {"cache_implementation": "static"}),
    "prompt lookup": (PROMPTS[:1], {"prompt_lookup_num_tokens": 3}),
    "assisted": (PROMPTS[:1], {"assistant_model": tiny_llama(seed=7)}),
    "drafts": (PROMPTS[:1], {}),
    "drafts, padded batch": (PROMPTS, {}),
    "drafts, sampling": (PROMPTS[:1], {"do_sample": True, "top_k": 0}),
}
RECURRENT = {"static cache", "prompt lookup", "assisted"}  # a state cannot be taken back


@pytest.mark.usefixtures("eager_drafts")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_equals_the_slow_loop(
    of_family: tuple[LanguageModel, Datastore], way: str
) -> None:
    lm, store = of_family
    if lm.name == "mamba" and way in RECURRENT:
        pytest.skip("transformers cannot do this with a recurrent state")
    prompts, options = WAYS[way]
    inputs, padding = padded(lm, prompts)
    plain = way in ("static cache", "prompt lookup", "assisted", "no cache")
    expected = generated(
        lm,
        inputs,
        logits_processor=[SlowMixture(lm, store, padding)],
        **({} if plain else options),
    )
    with attach(lm.model, store, **GIVEN) as attachment:
        if way.startswith("drafts"):
            options = options | {"custom_generate": attachment.with_drafts}
        assert generated(lm, inputs, **options) == expected
    if way == "greedy":
        assert generated(lm, inputs) != expected, "the datastore must matter here"
    assert not lm.model._forward_hooks


@pytest.mark.usefixtures("eager_drafts")
def test_drafts_take_fewer_passes(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    for prompts in (PROMPTS[:1], PROMPTS):
        inputs, _ = padded(lm, prompts)
        passes: list[int] = []
        with attach(lm.model, store, **GIVEN | {"lmbda": 0.9}) as attachment:
            hook = lm.model.register_forward_hook(lambda *_, own=passes: own.append(1))
            plain = generated(lm, inputs, max_new_tokens=40)
            count = len(passes)
            options = {"custom_generate": attachment.with_drafts, "max_new_tokens": 40}
            assert generated(lm, inputs, **options) == plain
            hook.remove()
        assert len(passes) - count < count - 3


class Recorded:
    """Exact search that counts its queries."""

    def __init__(self, store: Datastore) -> None:
        self.exact = ExactIndex(store)
        self.queries: list[int] = []

    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        self.queries.append(len(queries))
        return self.exact.search(queries, k)


def test_only_kept_positions_are_searched(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    inputs, padding = padded(lm, PROMPTS)
    length = inputs["input_ids"].shape[1]
    index = Recorded(store)
    with attach(lm.model, store, index=index, **GIVEN):
        with torch.no_grad():
            everything = lm.model(**inputs).logits
        for keep, kept in [
            (1, slice(length - 1, length)),
            (4, slice(length - 4, length)),
            (0, slice(0, length)),
            (torch.tensor([length - 3, length - 1]), [length - 3, length - 1]),
        ]:
            with torch.no_grad():
                some = lm.model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(some, everything[:, kept], atol=1e-5, rtol=1e-5)
            assert index.queries[-1] == len(PROMPTS) * some.shape[1]
        index.queries.clear()
        lm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert index.queries == [len(PROMPTS)] * 3, "one a sequence and step, the prompt's too"
    for row, count in enumerate(padding):
        tokens = inputs["input_ids"][row, count:]
        expected = slow_log_probs(lm, store, tokens)
        torch.testing.assert_close(everything[row, count:].double(), expected, atol=1e-3, rtol=1e-3)


class _Refusing:
    def search(self, queries: Float[Tensor, "query dim"], k: int) -> Neighbors:
        raise DatastoreChangedError("compacted meanwhile")


def test_a_search_beside_the_head_fails_like_any_other(
    llama: tuple[LanguageModel, Datastore],
) -> None:
    lm, store = llama
    inputs, _ = padded(lm, PROMPTS[:1])
    threads, settings = threading.active_count(), torch.get_num_threads()
    with attach(lm.model, store, index=_Refusing(), **GIVEN):
        for tokens in (inputs["input_ids"][:, :1], inputs["input_ids"]):
            with pytest.raises(DatastoreChangedError, match="compacted meanwhile"):
                lm.model(tokens)
    assert threading.active_count() == threads, "an attachment's thread ends with it"
    assert torch.get_num_threads() == settings


def test_a_tuple_instead_of_an_output(of_family: tuple[LanguageModel, Datastore]) -> None:
    lm, store = of_family
    inputs, _ = padded(lm, PROMPTS[:1])
    labels = inputs["input_ids"]
    with attach(lm.model, store, **GIVEN), torch.no_grad():
        for extra in ({}, {"labels": labels}):
            whole = lm.model(**inputs, **extra)
            parts = lm.model(**inputs, **extra, return_dict=False)
            assert isinstance(parts, tuple)
            assert torch.equal(parts[1 if extra else 0], whole.logits)
            if extra:
                assert torch.equal(parts[0], whole.loss)
        # harnesses give the tokens by position
        assert torch.equal(lm.model(inputs["input_ids"]).logits, whole.logits)


def test_the_loss_is_the_mixtures(of_family: tuple[LanguageModel, Datastore]) -> None:
    lm, store = of_family
    inputs, _ = padded(lm, PROMPTS[2:])
    tokens = inputs["input_ids"]
    labels = tokens.clone()
    labels[0, :3] = -100
    log_probs = slow_log_probs(lm, store, tokens[0])
    nats = -log_probs[:-1].gather(1, tokens[0, 1:, None])[2:, 0]
    with torch.no_grad():
        alone = lm.model(**inputs, labels=labels).loss
        with attach(lm.model, store, **GIVEN):
            loss = lm.model(**inputs, labels=labels).loss
            assert loss.item() == pytest.approx(nats.mean().item(), rel=1e-4)
            shared = lm.model(**inputs, labels=labels, num_items_in_batch=torch.tensor(5)).loss
            assert shared.item() == pytest.approx(nats.sum().item() / 5, rel=1e-4)
    assert loss.item() != pytest.approx(alone.item(), rel=1e-3)


def test_what_routing_adds_to_the_loss_stays(folder: Path) -> None:
    lm, store = remembered("mixtral", folder)
    inputs, _ = padded(lm, PROMPTS[:1])
    given = inputs | {"labels": inputs["input_ids"]}
    with torch.no_grad(), attach(lm.model, store, **GIVEN):
        plain = lm.model(**given).loss
        for return_dict in (True, False):
            routed = lm.model(**given, output_router_logits=True, return_dict=return_dict)
            added = (routed[0] - plain) / routed[1]
            assert added.item() == pytest.approx(lm.model.router_aux_loss_coef, rel=1e-3)


def test_gradients_reach_the_model_through_the_lm(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    inputs, _ = padded(lm, PROMPTS[:1])
    tokens = inputs["input_ids"]
    weight = lm.model.get_input_embeddings().weight
    with attach(lm.model, store, **GIVEN):
        loss = lm.model(**inputs, labels=tokens).loss
        (gradient,) = torch.autograd.grad(loss, weight)
    # the same by hand: neighbors are constants
    log_probs = torch.log_softmax(lm.model(**inputs).logits[0].double(), dim=-1)
    knn = slow_log_probs(lm, store, tokens[0], lmbda=1.0).exp()
    mixed = torch.log(LMBDA * knn + (1 - LMBDA) * log_probs.exp())
    by_hand = -mixed[:-1].gather(1, tokens[0, 1:, None]).mean()
    (expected,) = torch.autograd.grad(by_hand, weight)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
    with attach(lm.model, store, **GIVEN), torch.no_grad():
        assert not lm.model(**inputs, labels=tokens).loss.requires_grad


def test_a_bfloat16_model(folder: Path) -> None:
    lm = LanguageModel(FAMILIES["llama"]().to(torch.bfloat16), byte_tokenizer(), name="bf16")
    store = build(folder / "bf16", lm, distinct_documents(2), window=48, context=16)
    inputs, _ = padded(lm, PROMPTS[:1])
    tokens = inputs["input_ids"][0]
    with attach(lm.model, store, **GIVEN), torch.no_grad():
        logits = lm.model(**inputs).logits
        lm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert logits.dtype == torch.float32, "bfloat16 has no digits for log-probabilities"
    expected = slow_log_probs(lm, store, tokens)
    torch.testing.assert_close(logits[0].double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, len(tokens)), atol=1e-5, rtol=0)


def test_without_weight_outputs_are_the_models_own(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    inputs, _ = padded(lm, PROMPTS)
    with torch.no_grad():
        own = lm.model(**inputs, labels=inputs["input_ids"])
        with attach(lm.model, store, lmbda=0.0):
            same = lm.model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(same.logits, own.logits)
    assert torch.equal(same.loss, own.loss)


def test_several_datastores(llama: tuple[LanguageModel, Datastore], tmp_path: Path) -> None:
    lm, store = llama
    other = build(tmp_path / "o", lm, distinct_documents(4)[3:], window=48, context=16)
    inputs, _ = padded(lm, PROMPTS[:1])
    given: dict[str, Any] = {"k": [K, 5], "lmbda": [0.3, 0.4], "temperature": TEMPERATURE}
    with attach(lm.model, [store, other], **given), torch.no_grad():
        logits = lm.model(**inputs).logits
    expected = knnlm.KNNLM(lm, [store, other], **given).log_probs(inputs["input_ids"])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    with refusal(InvalidArgumentError, "must add up to at most 1, got 0.7 + 0.7 = 1.4"):
        attach(lm.model, [store, other], lmbda=0.7)


def test_attaching_and_detaching_twice(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    inputs, _ = padded(lm, PROMPTS[:1])
    with torch.no_grad():
        own = lm.model(**inputs).logits
        attachment = attach(lm.model, store, **GIVEN)
        mixed = lm.model(**inputs).logits
        assert not torch.equal(mixed, own)
        with refusal(AttachmentError, "model 'LlamaForCausalLM' already has a datastore attached:"):
            attach(lm.model, store)
        with refusal(AttachmentError, "already has a datastore attached"):
            knnlm.KNNLM(lm, store, k=3).generate("x")
        assert torch.equal(lm.model(**inputs).logits, mixed), "the first one stays"
        attachment.detach()
        assert torch.equal(lm.model(**inputs).logits, own)
        with refusal(AttachmentError, "was already detached from model 'LlamaForCausalLM'"):
            attachment.detach()
        with attach(lm.model, store, **GIVEN) as again:
            assert torch.equal(lm.model(**inputs).logits, mixed)
            again.detach()  # early, which the end of the block forgives
        assert torch.equal(lm.model(**inputs).logits, own)
        with contextlib.suppress(ZeroDivisionError), attach(lm.model, store, **GIVEN):
            raise ZeroDivisionError
        assert torch.equal(lm.model(**inputs).logits, own), "detached by an error, too"
    assert not lm.model._forward_hooks


def test_a_wrong_datastore_is_refused_and_nothing_attached(
    llama: tuple[LanguageModel, Datastore], folder: Path
) -> None:
    _, store = llama
    other = tiny_llama(seed=1)
    with refusal(DatastoreMismatchError, f"{store.path} was built with llama (weights ", "not wi"):
        attach(other, store)
    gpt2_lm, _ = remembered("gpt2", folder)
    with refusal(DatastoreMismatchError, f"{store.path} was built with llama (weights "):
        attach(gpt2_lm.model, store)
    with refusal(InvalidArgumentError, "store must be a datastore or several, got none"):
        attach(other, [])
    with refusal(InvalidArgumentError, "k must be at most the number of entries"):
        attach(_MODELS["llama"][0].model, store, k=10**6)
    assert not other._forward_hooks
    assert not _MODELS["llama"][0].model._forward_hooks


def test_an_attached_model_can_be_forgotten(folder: Path) -> None:
    """Nothing outlives the model and its attachment."""
    _, store = remembered("llama", folder)
    lm = LanguageModel(FAMILIES["llama"](), byte_tokenizer(), name="llama")
    attach(lm.model, store, **GIVEN)
    before = len(attachment._ATTACHED)
    del lm
    gc.collect()
    assert len(attachment._ATTACHED) == before - 1


def test_a_text_generation_pipeline(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    writer = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    prompt = lm.tokenizer.bos_token + PROMPTS[0]
    own = writer(prompt, **options)[0]["generated_text"]
    with attach(lm.model, store, **GIVEN):
        text = writer(prompt, **options)[0]["generated_text"]
    assert (
        text
        == prompt + knnlm.KNNLM(lm, store, **GIVEN).generate(PROMPTS[0], max_new_tokens=NEW).text
    )
    assert text != own


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number]
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def test_trainer_evaluate(llama: tuple[LanguageModel, Datastore], tmp_path: Path) -> None:
    lm, store = llama
    tokens = lm.encode([PROSE * 2])[0][:100]
    rows = [torch.tensor([lm.start_token, *tokens[n : n + 24].tolist()]) for n in (0, 24, 48, 72)]
    options = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(model=lm.model, args=options, eval_dataset=Rows(rows))
    own = trainer.evaluate()["eval_loss"]
    with attach(lm.model, store, **GIVEN):
        loss = trainer.evaluate()["eval_loss"]
    nats = [
        -slow_log_probs(lm, store, row)[:-1].gather(1, row[1:, None]).mean().item() for row in rows
    ]
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    assert own != pytest.approx(loss, rel=1e-3)


def test_a_compiled_model(llama: tuple[LanguageModel, Datastore]) -> None:
    lm, store = llama
    inputs, _ = padded(lm, PROMPTS[:1])
    with torch.no_grad(), attach(lm.model, store, **GIVEN):
        expected = lm.model(**inputs).logits
        compiled: Any = torch.compile(lm.model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
