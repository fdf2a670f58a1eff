"""Rules about numbers: every entrance gives the same verdict on the same value."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from index_contract import clustered, store_of
from pydantic import ValidationError
from typer.testing import CliRunner

import knnlm
from knnlm.apps.cli.main import app
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.server.schema import CompletionRequest
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreCorruptError, InvalidArgumentError
from knnlm.index.backend import IndexOptions
from knnlm.index.exact import ExactIndex
from knnlm.index.queries import held_out_queries
from knnlm.knn_lm import KNNLM
from knnlm.mixture.by_distance import BucketedLambda
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.features import GateInput
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.stored import TunedMixture
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.retriever import choose_parameters
from knnlm.text.windows import Windowing

ENTRIES = 40
VALUES: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -1e-9,
    0,
    0.0,
    1e-45,
    0.5,
    1,
    1.0,
    np.int64(7),
    np.float32(0.25),
    1.5,
    7,
    1e39,
    2**31,
    2**63,
    10**400,
    "1",
    True,
    [],
    None,
]


FLOATS = {"lmbda", "temperature", "sampling", "top_p", "recall"}


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.int64) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    return is_whole(value) or isinstance(value, float | np.float32)


RULES: dict[str, Callable[[Any], bool]] = {
    "k": lambda value: is_whole(value) and 1 <= value < 2**31,
    "lmbda": lambda value: is_real(value) and 0 <= value <= 1,
    "temperature": lambda value: is_real(value) and 1e-30 <= value <= 1e30,
    "sampling": lambda value: is_real(value) and 0 <= value <= 1e30,
    "top_p": lambda value: is_real(value) and 0 <= value <= 1,
    "min_p": lambda value: is_real(value) and 0 <= value <= 1,
    "penalty": lambda value: is_real(value) and -2 <= value <= 2,
    "repetition": lambda value: is_real(value) and 1e-6 <= value <= 1e6,
    "bias": lambda value: is_real(value) and -100 <= value <= 100,
    "seed": lambda value: is_whole(value) and -(2**63) <= value < 2**63,
    "size": lambda value: is_whole(value) and 1 <= value < 2**31,
    "amount": lambda value: is_whole(value) and 1 <= value < 2**63,
    "recall": lambda value: is_real(value) and 0 < value <= 1,
    "natural": lambda value: is_whole(value) and 0 <= value < 2**31,
}


@pytest.fixture(autouse=True)
def _no_type_checks() -> Iterator[None]:
    """Let values of wrong types reach the rules, as outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    store = store_of(tmp_path_factory.mktemp("rules") / "s", clustered(ENTRIES).half())
    yield store
    store.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> KNNLM:
    lm = LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny")
    path = tmp_path_factory.mktemp("rules") / "s"
    made = knnlm.build(path, lm, [knnlm.Document("d", "a text " * 40)], window=64, context=16)
    return KNNLM(lm, made, k=4, lmbda=0.5, temperature=1.0)


def stored(store: Datastore, **changed: Any) -> None:
    """Read default parameters from a catalog that holds a value."""
    parameters = {"k": 4, "lmbda": 0.5, "temperature": 1.0} | changed
    parameters = json.loads(json.dumps(parameters, default=float))
    try:
        write_parameters(store, parameters)
        assert store.parameters is not None
    except DatastoreCorruptError as error:
        raise InvalidArgumentError(str(error)) from error
    finally:
        write_parameters(store, None)


def write_parameters(store: Datastore, parameters: dict[str, Any] | None) -> None:
    catalog = Catalog(store.path)
    with catalog.transaction(entries_change=False):
        catalog.set("parameters", parameters)
    catalog.close()


def stored_mixture(votes: dict[str, Any], lmbdas: tuple[Any, ...] = (0.5,)) -> None:
    """Read a tuned mixture that holds a value."""
    described = TunedMixture(CacheParameters(8, Parameters()), (0.5,)).to_dict()
    described["cache"]["votes"] |= votes
    described["lmbdas"] = list(lmbdas)
    try:
        TunedMixture.from_dict(described)
    except DatastoreCorruptError as error:
        raise InvalidArgumentError(str(error)) from error


def requested(**fields: Any) -> None:
    try:
        CompletionRequest.model_validate({"prompt": "x", **fields})
    except ValidationError as error:
        raise InvalidArgumentError(str(error)) from error


ENTRANCES: list[tuple[str, str, Callable[[Datastore, Any], Any]]] = [
    ("k", "Parameters", lambda _, value: Parameters(k=value)),
    ("k", "choose_parameters", lambda store, value: choose_parameters(store, k=[value])),
    ("k", "IndexOptions", lambda _, value: IndexOptions(k=value)),
    ("k", "GateInput", lambda _, value: GateInput(value, 1.0)),
    ("k", "ExactIndex", lambda store, value: ExactIndex(store).search(clustered(2), value)),
    ("k", "catalog", lambda store, value: stored(store, k=value)),
    ("k", "mixture", lambda _, value: stored_mixture({"k": value})),
    ("k", "server", lambda _, value: requested(k=value)),
    ("lmbda", "Parameters", lambda _, value: Parameters(lmbda=value)),
    ("lmbda", "choose", lambda store, value: choose_parameters(store, lmbda=[value])),
    ("lmbda", "catalog", lambda store, value: stored(store, lmbda=value)),
    ("lmbda", "mixture", lambda _, value: stored_mixture({}, (value,))),
    ("lmbda", "cache", lambda _, value: stored_mixture({"lmbda": value})),
    ("lmbda", "server", lambda _, value: requested(lmbda=value)),
    ("temperature", "Parameters", lambda _, value: Parameters(temperature=value)),
    ("temperature", "choose", lambda store, value: choose_parameters(store, temperature=[value])),
    ("temperature", "GateInput", lambda _, value: GateInput(3, value)),
    ("temperature", "catalog", lambda store, value: stored(store, temperature=value)),
    ("temperature", "server", lambda _, value: requested(knn_temperature=value)),
    ("sampling", "SamplingOptions", lambda _, value: SamplingOptions(temperature=value)),
    ("sampling", "server", lambda _, value: requested(temperature=value)),
    ("top_p", "SamplingOptions", lambda _, value: SamplingOptions(top_p=value)),
    ("top_p", "server", lambda _, value: requested(top_p=value)),
    ("natural", "SamplingOptions", lambda _, value: SamplingOptions(top_k=value)),
    ("natural", "server", lambda _, value: requested(top_k=value)),
    ("min_p", "SamplingOptions", lambda _, value: SamplingOptions(min_p=value)),
    ("min_p", "server", lambda _, value: requested(min_p=value)),
    ("penalty", "SamplingOptions", lambda _, value: SamplingOptions(presence_penalty=value)),
    ("penalty", "server", lambda _, value: requested(presence_penalty=value)),
    ("penalty", "SamplingOptions", lambda _, value: SamplingOptions(frequency_penalty=value)),
    ("penalty", "server", lambda _, value: requested(frequency_penalty=value)),
    ("repetition", "SamplingOptions", lambda _, value: SamplingOptions(repetition_penalty=value)),
    ("repetition", "server", lambda _, value: requested(repetition_penalty=value)),
    ("bias", "SamplingOptions", lambda _, value: SamplingOptions(logit_bias={3: value})),
    (
        "bias",
        "server",
        lambda _, value: None if value is None else requested(logit_bias={"3": value}),
    ),
    ("natural", "passage", lambda store, value: store.passage(3, before=value)),
    ("natural", "passage", lambda store, value: store.passage(3, after=value)),
    ("seed", "SamplingOptions", lambda _, value: SamplingOptions(seed=value)),
    ("seed", "IndexOptions", lambda _, value: IndexOptions(seed=value)),
    ("seed", "server", lambda _, value: requested(seed=value)),
    ("size", "CacheParameters", lambda _, value: CacheParameters(value, Parameters())),
    ("size", "Windowing", lambda _, value: Windowing(window=value, context=0)),
    ("amount", "max_tokens", lambda _, value: Limits(max_tokens=value)),
    ("amount", "max_queue", lambda _, value: Limits(max_queue=value)),
    ("recall", "IndexOptions", lambda _, value: IndexOptions(recall=value)),
]
# what an entrance refuses by a limit of its own, or takes to be the default
PROTOCOL = {"server": 2.0}


def verdict(call: Callable[[Any, Any], Any], subject: Datastore | KNNLM, value: Any) -> bool:
    try:
        call(subject, value)
    except InvalidArgumentError:
        return False
    return True


@pytest.mark.parametrize(
    ("rule", "entrance", "call"), ENTRANCES, ids=[f"{rule} {name}" for rule, name, _ in ENTRANCES]
)
def test_every_entrance_gives_the_same_verdict(
    store: Datastore, rule: str, entrance: str, call: Callable[[Datastore, Any], Any]
) -> None:
    for value in VALUES:
        if value is None and entrance in {"choose_parameters", "choose", "server", "catalog"}:
            continue  # the default
        if isinstance(value, np.generic) and entrance in {"server", "catalog", "mixture", "cache"}:
            continue  # JSON has no such numbers
        if isinstance(value, list) and entrance == "server":
            continue  # one value for each datastore
        expected = RULES[rule](value)
        if entrance == "choose_parameters" and expected:
            expected = value <= ENTRIES
        if rule == "sampling" and entrance == "server":
            expected &= is_real(value) and value <= PROTOCOL["server"]
        assert verdict(call, store, value) == expected, (value, expected)


RULES_OF_GENERATE = {
    "max_new_tokens": "size",
    "seed": "seed",
    "temperature": "sampling",
    "top_k": "natural",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition",
}


@pytest.mark.parametrize(("name", "rule"), RULES_OF_GENERATE.items())
def test_generate_refuses_the_same(model: KNNLM, name: str, rule: str) -> None:
    for value in VALUES:
        if value is None or (name == "max_new_tokens" and RULES["size"](value)):
            continue
        options = {"max_new_tokens": 1, "do_sample": True, name: value}
        try:
            model.generate("a", **options)
        except InvalidArgumentError:
            assert not RULES[rule](value), value
        else:
            assert RULES[rule](value), value


TEXT = [knnlm.Document("d", "a text " * 40)]
LIBRARY: dict[str, tuple[str, Callable[[KNNLM, Any], Any]]] = {
    "KNNLM k": ("k", lambda model, value: KNNLM(model.lm, store_in(model), k=value)),
    "KNNLM lmbda": ("lmbda", lambda model, value: KNNLM(model.lm, store_in(model), lmbda=value)),
    "attach temperature": (
        "temperature",
        lambda model, value: knnlm.attach(
            model.lm.model, store_in(model), temperature=value
        ).detach(),
    ),
    "build window": ("size", lambda model, value: built(model, window=value, context=0)),
    "build context": ("natural", lambda model, value: built(model, window=64, context=value)),
    "build max_entries": ("amount", lambda model, value: built(model, max_entries=value)),
    "build_index k": ("k", lambda model, value: knnlm.build_index(store_in(model), k=value)),
    "build_index nprobe": (
        "size",
        lambda model, value: knnlm.build_index(store_in(model), nprobe=value),
    ),
    "build_index recall": (
        "recall",
        lambda model, value: knnlm.build_index(store_in(model), recall=value),
    ),
    "build_index seed": (
        "seed",
        lambda model, value: knnlm.build_index(store_in(model), seed=value),
    ),
    "tune max_k": ("k", lambda model, value: knnlm.tune(model, TEXT, max_k=value)),
    "tune max_tokens": (
        "amount",
        lambda model, value: knnlm.tune(model, TEXT, max_k=2, max_tokens=value),
    ),
    "perplexity max_tokens": (
        "amount",
        lambda model, value: model.perplexity(TEXT, max_tokens=value),
    ),
    "queries max_tokens": (
        "amount",
        lambda model, value: held_out_queries(model.lm, store_in(model), TEXT, value),
    ),
    "explain sources": ("natural", lambda model, value: model.explain("a", sources=value)),
    "explain before": ("natural", lambda model, value: model.explain("a", before=value)),
    "explain after": ("natural", lambda model, value: model.explain("a", after=value)),
}


def store_in(model: KNNLM) -> Datastore:
    return model.retrievers[0].store


def built(model: KNNLM, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = knnlm.build(Path(folder) / "s", model.lm, TEXT, **options)
        assert Datastore(store.path).windowing == store.windowing
        store.close()


@pytest.mark.parametrize("entrance", LIBRARY)
def test_the_library_gives_the_same_verdict(model: KNNLM, entrance: str) -> None:
    rule, call = LIBRARY[entrance]
    limits = {"KNNLM k": len(store_in(model)), "build window": 256, "build context": 63}
    for value in VALUES:
        if value is None or isinstance(value, list):
            continue  # the default, and one value for each datastore
        expected = RULES[rule](value) and value <= limits.get(entrance, math.inf)
        assert verdict(call, model, value) == expected, value


@pytest.mark.parametrize("flag", [0, 1, "yes", "False", np.True_, [True]])
def test_flags_are_bools(model: KNNLM, tmp_path: Path, flag: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="control_tokens must be True or False, got"):
        Windowing(control_tokens=flag)
    for path in (tmp_path / "new", store_in(model).path):
        with pytest.raises(InvalidArgumentError, match="control_tokens must be True or False, got"):
            knnlm.build(path, model.lm, TEXT, control_tokens=flag)


def test_numbers_of_numpy_become_plain_ones(model: KNNLM) -> None:
    """So that they can be stored."""
    four: Any = np.int32(4)
    quarter: Any = np.float32(0.25)
    chosen = knnlm.tune(model, TEXT, max_k=four, max_tokens=four * 10)
    chosen.save(store_in(model), [])
    json.dumps(chosen.to_dict())
    given = Parameters(four, quarter, quarter)
    assert [type(number) for number in astuple(given)] == [int, float, float]
    for plain in (Windowing(four, four - 1), CacheParameters(four, given)):
        json.dumps(asdict(plain))


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "--k": ("k", ["eval", "s", "t.txt"]),
    "--lmbda": ("lmbda", ["eval", "s", "t.txt", "--k", "2"]),
    "--temperature": ("temperature", ["eval", "s", "t.txt", "--k", "2"]),
    "--max-tokens": ("amount", ["eval", "s", "t.txt", "--k", "2"]),
    "--window": ("size", ["eval", "s", "t.txt", "--k", "2", "--context", "0"]),
    "--context": ("natural", ["eval", "s", "t.txt", "--k", "2", "--window", "64"]),
    "--sampling-temperature": (
        "sampling",
        ["generate", "s", "a", "--k", "2", "--max-new-tokens", "1"],
    ),
    "--top-p": ("top_p", ["generate", "s", "a", "--k", "2", "--max-new-tokens", "1", "--sample"]),
    "--seed": ("seed", ["generate", "s", "a", "--k", "2", "--max-new-tokens", "1"]),
    "--max-new-tokens": ("size", ["generate", "s", "a", "--k", "2"]),
    "--recall": ("recall", ["index", "s"]),
    "--nprobe": ("size", ["index", "s"]),
    "--max-k": ("k", ["tune", "s", "t.txt", "--max-tokens", "20"]),
    "--max-entries": ("amount", ["build", "s", "t.txt"]),
}
NUMERALS = [
    *("nan", "inf", "-inf", "-1", "-1e-9", "0", "1e-45", "0.5", "1", "1.5", "7", "1e39"),
    *("2147483648", "9223372036854775808", "1" + "0" * 400, "x", "", "true"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny").save(folder / "tiny")
    lm = LanguageModel.load(str(folder / "tiny"))
    knnlm.build(folder / "s", lm, TEXT, window=64, context=16).close()
    (folder / "t.txt").write_text("a text " * 9)
    return folder


@pytest.mark.parametrize("option", COMMANDS)
def test_the_command_line_gives_the_same_verdict(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(workspace)
    lm = LanguageModel.load(str(workspace / "tiny"))
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: lm)
    rule, arguments = COMMANDS[option]
    entries = len(Datastore(workspace / "s"))
    limits = {"--k": entries, "--window": 256, "--context": 63, "--max-new-tokens": 200}
    for numeral in NUMERALS:
        value: Any = None
        for kind in (int, float) if rule in FLOATS else (int,):
            with suppress(ValueError):
                value = kind(numeral)
                break
        expected = RULES[rule](value) and value <= limits.get(option, math.inf)
        result = CliRunner().invoke(app, [*arguments, f"{option}={numeral}"])
        assert (result.exit_code == 0) == expected, (numeral, result.output)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1, math.inf])
def test_stored_lmbdas_by_distance(bad: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"lmbda \(λ\) must lie in \[0, 1\]"):
        BucketedLambda(torch.tensor([1.0]), torch.tensor([0.5, bad]))


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**31, 2**63 - 1])
def test_every_seed_builds_an_index(tmp_path: Path, seed: int) -> None:
    store = store_of(tmp_path / "s", clustered(500).half())
    knnlm.build_index(store, "ivf", k=4, seed=seed)
