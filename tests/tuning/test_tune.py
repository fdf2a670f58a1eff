"""Tuning: the sweep against `evaluate` and against slow arithmetic, and what becomes of it."""

import json
import math
import struct
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import PROSE, refusal
from stores import distinct_documents

from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreWriteError, InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing
from knnlm.tuning.held_out import TargetNeighbors, read_held_out
from knnlm.tuning.plot import plot_tuning
from knnlm.tuning.sweep import Sweep, Trial, sweep
from knnlm.tuning.tune import Tuning, tune
from knnlm.tuning.weights import fit_lmbdas

HELD_OUT = [Document("held", PROSE[60:300] + "Something else."), Document("out", "A memory is.")]


@pytest.fixture(scope="session")
def model(llama_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> KNNLM:
    path = tmp_path_factory.mktemp("tuning") / "store"
    return KNNLM(llama_lm, build(path, llama_lm, distinct_documents(3), window=48, context=16))


@pytest.fixture(scope="session")
def tuning(model: KNNLM) -> Tuning:
    return tune(model, HELD_OUT, max_k=50)


def all_trials(found: Sweep) -> list[Trial]:
    return [*found.by_k, *found.by_lmbda, *found.by_temperature]


def test_trials_equal_an_evaluation_with_their_parameters(model: KNNLM, tuning: Tuning) -> None:
    (chosen,) = tuning.parameters
    (found,) = tuning.sweeps
    assert chosen.lmbda > 0
    best = Trial(chosen.k, chosen.lmbda, chosen.temperature, tuning.knn_perplexity)
    for trial in [best, *found.by_k, *found.by_lmbda[::9], *found.by_temperature[::3]]:
        report = KNNLM(
            model.lm,
            model.retrievers[0].store,
            k=trial.k,
            lmbda=trial.lmbda,
            temperature=trial.temperature,
        ).perplexity(HELD_OUT)
        assert report.knn.perplexity == pytest.approx(trial.perplexity, rel=1e-5), trial
        assert report.lm.perplexity == pytest.approx(tuning.lm_perplexity, rel=1e-6)
        assert report.tokens == tuning.tokens


def test_the_chosen_setting_is_the_best_that_was_tried(tuning: Tuning) -> None:
    (chosen,) = tuning.parameters
    (found,) = tuning.sweeps
    assert tuning.knn_perplexity < tuning.lm_perplexity
    for trials in (found.by_k, found.by_lmbda, found.by_temperature):
        best = min(trials, key=lambda trial: trial.perplexity)
        assert best.perplexity == tuning.knn_perplexity
        assert (best.k, best.lmbda, best.temperature) == (
            chosen.k,
            chosen.lmbda,
            chosen.temperature,
        )
    assert [trial.k for trial in found.by_k] == [1, 2, 4, 8, 16, 32, 50]
    lmbdas = [trial.lmbda for trial in found.by_lmbda]
    assert lmbdas == [step / 100 for step in range(1, 100)]
    temperatures = [trial.temperature for trial in found.by_temperature]
    assert temperatures == sorted(set(temperatures))
    assert len(temperatures) >= 15


def test_windows_and_limits_are_those_of_evaluation(model: KNNLM) -> None:
    windowing = Windowing(20, 4)
    found = tune(model, HELD_OUT, max_k=8, windowing=windowing, max_tokens=70)
    (p,) = found.parameters
    report = KNNLM(
        model.lm, model.retrievers[0].store, k=p.k, lmbda=p.lmbda, temperature=p.temperature
    ).perplexity(HELD_OUT, windowing=windowing, max_tokens=70)
    assert found.tokens == report.tokens == 70
    assert report.knn.perplexity == pytest.approx(found.knn_perplexity, rel=1e-5)
    assert report.lm.perplexity == pytest.approx(found.lm_perplexity, rel=1e-6)


def test_max_k_beyond_the_datastore_tries_all_of_it(
    llama_lm: LanguageModel, tmp_path: Path
) -> None:
    store = build(tmp_path / "s", llama_lm, [Document("d", "A memory of places.")], window=64)
    found = tune(KNNLM(llama_lm, store), HELD_OUT)
    assert found.sweeps[0].by_k[-1].k == len(store)


def random_neighbors(
    tokens: int, k: int, votes: float = 0.3, absent: float = 0.0, seed: int = 0
) -> TargetNeighbors:
    generator = torch.Generator().manual_seed(seed)
    distances = (40 * torch.rand(tokens, k, generator=generator)).cumsum(dim=1)
    if absent:
        found = torch.randint(0, k + 1, (tokens, 1), generator=generator)
        some = torch.rand(tokens, 1, generator=generator) < absent
        distances[(torch.arange(k) >= found) & some] = torch.inf
    hits = (torch.rand(tokens, k, generator=generator) < votes) & distances.isfinite()
    lm = -8 * torch.rand(tokens, generator=generator)
    return TargetNeighbors(lm, distances, hits)


def slow_perplexity(neighbors: TargetNeighbors, trial: Trial) -> float:
    nats = []
    for lm, distances, votes in zip(
        neighbors.lm_log_probs.tolist(),
        neighbors.squared_distances.tolist(),
        neighbors.votes.tolist(),
        strict=True,
    ):
        nearest = distances[0] if math.isfinite(distances[0]) else 0.0
        weights = [math.exp((nearest - d) / trial.temperature) for d in distances[: trial.k]]
        p = math.exp(lm)
        if sum(weights) > 0:
            hits = [weight for weight, vote in zip(weights, votes, strict=False) if vote]
            p = trial.lmbda * sum(hits) / sum(weights) + (1 - trial.lmbda) * p
        nats.append(-math.log(p))
    return math.exp(sum(nats) / len(nats))


@pytest.mark.parametrize("absent", [0.0, 0.5, 1.0])
def test_the_sweep_equals_slow_arithmetic(absent: float) -> None:
    neighbors = random_neighbors(40, 11, absent=absent)
    assert absent == 0.0 or bool((neighbors.squared_distances[:, 0] == torch.inf).any())
    found = sweep(neighbors)
    for trial in all_trials(found):
        assert trial.perplexity == pytest.approx(slow_perplexity(neighbors, trial), rel=1e-5), trial
    for trial in all_trials(found)[::17]:  # other settings than the winners
        for k in (1, 4, 11):
            other = Trial(k, trial.lmbda, trial.temperature, 0.0)
            assert slow_perplexity(neighbors, other) >= found.knn_perplexity * (1 - 1e-6)


def test_distances_far_beyond_float32_exponents() -> None:
    neighbors = random_neighbors(40, 8)
    far = neighbors._replace(squared_distances=neighbors.squared_distances + 2.0**15)
    for trial in all_trials(sweep(far)):
        assert trial.perplexity == pytest.approx(slow_perplexity(far, trial), rel=1e-5)


def test_neighbors_that_never_vote_leave_the_lm_alone() -> None:
    neighbors = random_neighbors(60, 16, votes=0.0)
    found = sweep(neighbors)
    assert found.parameters.lmbda == 0.0
    assert found.knn_perplexity == found.lm_perplexity
    assert found.lm_perplexity == pytest.approx(
        math.exp(-float(neighbors.lm_log_probs.double().mean()))
    )
    assert min(trial.perplexity for trial in all_trials(found)) > found.lm_perplexity


def test_absent_neighbors_only_leave_the_lm_alone() -> None:
    neighbors = random_neighbors(10, 4)
    empty = TargetNeighbors(
        neighbors.lm_log_probs,
        torch.full_like(neighbors.squared_distances, torch.inf),
        torch.zeros_like(neighbors.votes),
    )
    found = sweep(empty)
    assert (found.parameters.lmbda, found.knn_perplexity) == (0.0, found.lm_perplexity)
    assert {trial.perplexity for trial in all_trials(found)} == {found.lm_perplexity}


def test_a_datastore_of_another_kind_is_given_no_weight(
    llama_lm: LanguageModel, tmp_path: Path
) -> None:
    store = build(tmp_path / "s", llama_lm, [Document("z", "QZ9#" * 40)], window=64, context=0)
    model = KNNLM(llama_lm, store)
    found = tune(model, [Document("held", "the nearest neighbors of a hidden state")])
    assert found.parameters[0].lmbda == 0.0
    assert found.knn_perplexity == found.lm_perplexity
    found.save([store], [])
    report = KNNLM(llama_lm, Datastore(store.path)).perplexity(HELD_OUT)
    assert report.knn == report.lm
    json.dumps(found.to_dict())
    plot_tuning(found, tmp_path / "plot.png")
    assert png_size(tmp_path / "plot.png")


def test_ten_thousand_tokens_by_1024_neighbors() -> None:
    found = sweep(random_neighbors(10_000, 1024))
    assert found.tokens == 10_000
    assert [trial.k for trial in found.by_k] == [2**power for power in range(11)]


def test_a_held_out_text_has_the_neighbors_of_every_token(model: KNNLM) -> None:
    text = read_held_out(model, HELD_OUT, 7, model.windowing)
    assert text is not None
    neighbors = text.for_targets(text.voters[0])
    assert neighbors.squared_distances.shape == neighbors.votes.shape == (len(text), 7)
    assert neighbors.votes.dtype == torch.bool
    assert bool((neighbors.squared_distances.diff(dim=1) >= 0).all())
    tokens = model.lm.encode([str(document.text) for document in HELD_OUT])
    assert len(neighbors.votes) == sum(map(len, tokens))


def test_several_datastores_are_tuned_together(llama_lm: LanguageModel, tmp_path: Path) -> None:
    parts = distinct_documents(4)
    stores = [
        build(tmp_path / name, llama_lm, documents, window=64)
        for name, documents in [("one", parts[:2]), ("other", parts[2:])]
    ]
    found = tune(KNNLM(llama_lm, stores, lmbda=0.0), HELD_OUT, max_k=16)
    assert len(found.sweeps) == len(found.parameters) == 2
    best = min(sweep.knn_perplexity for sweep in found.sweeps)
    assert found.knn_perplexity < best * 1.0005, "in steps of 0.001"
    found.save(stores, ["held"])
    opened = [Datastore(store.path) for store in stores]
    assert opened[0].tuning is not None
    assert opened[0].tuning["together_with"] == [str(stores[1].path)]
    model = KNNLM(llama_lm, opened)
    assert tuple(retriever.parameters for retriever in model.retrievers) == found.parameters
    report = model.perplexity(HELD_OUT)
    assert report.knn.perplexity == pytest.approx(found.knn_perplexity, rel=1e-5)
    json.dumps(found.to_dict())
    plot_tuning(found, tmp_path / "plot.png")
    assert png_size(tmp_path / "plot.png")


def test_jointly_fitted_weights_are_the_best_on_a_grid() -> None:
    one, other = random_neighbors(300, 20, seed=1), random_neighbors(300, 20, seed=2)
    other = other._replace(lm_log_probs=one.lm_log_probs)
    given = [Parameters(16, 0.5, 1.0), Parameters(16, 0.5, 3.0)]
    fitted, perplexity = fit_lmbdas([one, other], given)
    lm_probs = one.lm_log_probs.double().exp()
    probs = []
    for neighbors, p in zip([one, other], given, strict=True):
        weights = torch.softmax(-neighbors.squared_distances[:, : p.k].double() / p.temperature, 1)
        probs.append((weights * neighbors.votes[:, : p.k]).sum(dim=1))
    best = min(
        float(-(a * probs[0] + b * probs[1] + (1 - a - b) * lm_probs).log().mean())
        for a in torch.arange(0, 1, 0.02).tolist()
        for b in torch.arange(0, 1 - a, 0.02).tolist()
    )
    a, b = (p.lmbda for p in fitted)
    own = float(-(a * probs[0] + b * probs[1] + (1 - a - b) * lm_probs).log().mean())
    assert perplexity == pytest.approx(math.exp(own), rel=1e-6)
    assert own < best + 1e-4
    assert [(p.k, p.temperature) for p in fitted] == [(p.k, p.temperature) for p in given]


def test_refusals(model: KNNLM, llama_lm: LanguageModel, tmp_path: Path) -> None:
    with refusal(InvalidArgumentError, "the text to tune on must have a token, got none"):
        tune(model, [Document("empty", "")])
    for max_k in (0, -3):
        with refusal(InvalidArgumentError, f"max_k must be at least 1, got {max_k}"):
            tune(model, HELD_OUT, max_k=max_k)
    store = build(tmp_path / "s", llama_lm, distinct_documents(1), window=64)
    store.forget(["*"])
    with refusal(InvalidArgumentError, f"{store.path} must have entries to tune on, got none"):
        tune(KNNLM(llama_lm, store), HELD_OUT)


# the picture


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82"), "a whole file"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_picture_is_a_png_and_leaves_matplotlib_alone(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(matplotlib.rcParams)
    # pyplot chooses a backend for the whole process and keeps every figure: importing it fails here
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_tuning(tuning, tmp_path / "tuning.png")
    assert dict(matplotlib.rcParams) == settings
    width, height = png_size(tmp_path / "tuning.png")
    assert 800 <= width <= 2400
    assert 300 <= height <= 1200
    assert (tmp_path / "tuning.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.png"]


def test_a_sweep_of_one_k_can_be_drawn(model: KNNLM, tmp_path: Path) -> None:
    plot_tuning(tune(model, HELD_OUT, max_k=1), tmp_path / "one.png")
    png_size(tmp_path / "one.png")


def test_a_picture_that_cannot_be_written_is_refused(tuning: Tuning, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with refusal(DatastoreWriteError, f"cannot write {tmp_path}/file/tuning.png: Not a directory"):
        plot_tuning(tuning, tmp_path / "file" / "tuning.png")


def test_tuned_parameters_become_the_defaults(llama_lm: LanguageModel, tmp_path: Path) -> None:
    store = build(tmp_path / "s", llama_lm, distinct_documents(2), window=64)
    found = tune(KNNLM(llama_lm, store), HELD_OUT, max_k=16)
    found.save([store], ["held"])
    (retriever,) = KNNLM(llama_lm, Datastore(store.path)).retrievers
    assert (retriever.parameters,) == found.parameters
    assert retriever.store.tuning is not None
    assert retriever.store.tuning["text"] == ["held"]


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e6])
def test_temperatures_follow_the_scale_of_the_keys(scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    distances = torch.rand(400, 16, generator=generator).mul(4).sort(dim=1).values
    votes = torch.rand(400, 16, generator=generator) < torch.exp(-distances)
    neighbors = TargetNeighbors(torch.full((400,), -6.0), distances, votes)
    scaled = TargetNeighbors(neighbors.lm_log_probs, distances * scale, votes)
    expected, found = sweep(neighbors), sweep(scaled)
    assert found.knn_perplexity == pytest.approx(expected.knn_perplexity, rel=0.005)


def test_a_datastore_is_tuned_by_its_path(tmp_path: Path, llama_lm: LanguageModel) -> None:
    llama_lm.save(tmp_path / "model")
    lm = LanguageModel.load(tmp_path / "model")
    store = build(tmp_path / "s", lm, distinct_documents(3), window=64)
    found = tune(tmp_path / "s", HELD_OUT, max_k=8)
    assert found.parameters == tune(KNNLM(lm, store), HELD_OUT, max_k=8).parameters
    found.save(tmp_path / "s", ["held"])
    assert Datastore(tmp_path / "s").parameters == found.parameters[0]
