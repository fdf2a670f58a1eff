"""The state that the next request sees: the newest that opens, with parameters chosen as before."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import fresh_lm, opening, serving, tiny_store
from stores import distinct_documents

from knnlm.apps.engine.followed_model import FollowedModel
from knnlm.apps.engine.metrics import Metrics
from knnlm.datastore.datastore import Datastore
from knnlm.errors import DatastoreCorruptError
from knnlm.index.policy import build_index
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build, compact
from knnlm.mixture.parameters import Parameters
from knnlm.text.documents import Document

PROMPT = torch.tensor([[0, 65, 66, 67, 68]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_store(tmp_path / "store")


def following(model: KNNLM) -> FollowedModel:
    return FollowedModel(model, Metrics())


def test_without_a_commit_it_is_the_same_model(path: Path) -> None:
    model = opening(path)
    followed = following(model)
    assert followed.follow() is model
    assert model.retrievers[0].store.reopened() is model.retrievers[0].store


CHANGES: dict[str, Callable[[Path, random.Random], Any]] = {
    "append": lambda path, chosen: build(
        path, fresh_lm(), [Document(f"n{chosen.random()}", f"{chosen.random()} is a new number")]
    ),
    "forget": lambda path, chosen: Datastore(path).forget(
        [chosen.choice([document.name for document in Datastore(path).documents()])]
    ),
    "compact": lambda path, chosen: compact(path),
    "index": lambda path, chosen: build_index(
        Datastore(path), chosen.choice(["ivf", "exact"]), k=4
    ),
    "tune": lambda path, chosen: Datastore(path).save_parameters(
        Parameters(chosen.randrange(1, 9), chosen.random(), 1.0 + chosen.random()), {}
    ),
}


@pytest.mark.parametrize("given", [{}, {"lmbda": 0.3}, {"k": 3, "temperature": 5.0}])
def test_after_any_changes_it_is_as_if_opened_anew(path: Path, given: dict[str, Any]) -> None:
    lm = fresh_lm()
    followed = following(KNNLM(lm, Datastore(path), **given))
    chosen = random.Random(len(given))
    for _ in range(12):
        CHANGES[chosen.choice([*CHANGES])](path, chosen)
        if len(Datastore(path)) < 3:
            break
        before = followed.newest
        log_probs = before.log_probs(PROMPT)
        newest = followed.follow()
        anew = KNNLM(lm, Datastore(path), **given)
        assert [r.parameters for r in newest.retrievers] == [r.parameters for r in anew.retrievers]
        assert len(newest.retrievers[0].store) == len(anew.retrievers[0].store)
        torch.testing.assert_close(newest.log_probs(PROMPT), anew.log_probs(PROMPT))
        assert before.log_probs(PROMPT).equal(log_probs), "an older state stays as it was"
    assert followed.problem is None


def test_a_given_k_outlives_its_entries(path: Path) -> None:
    """The parameters can no longer be chosen as at the start; what is forgotten is gone."""
    store = Datastore(path)
    followed = following(opening(path, k=len(store)))
    store.forget(["d1"])
    newest = followed.follow()
    assert followed.problem is None
    assert len(newest.retrievers[0].store) == len(store)
    assert newest.retrievers[0].parameters.k > len(store)
    rows = newest.mixer.search(torch.randn(1, newest.lm.dimension)).neighbors[0].rows
    assert int((rows >= 0).sum()) == len(store)


def break_index(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def damaged(*_: Any) -> None:
        raise DatastoreCorruptError("the index is damaged")

    monkeypatch.setattr("knnlm.knn_lm.open_index", damaged)


def break_shard(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    shard = next((path / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-8])


def break_catalog(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    (path / "catalog.sqlite").rename(path / "elsewhere")


@pytest.mark.parametrize("break_it", [break_index, break_shard, break_catalog])
def test_what_does_not_open_leaves_the_last_state(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    model = opening(path)
    metrics = Metrics()
    followed = FollowedModel(model, metrics)
    model.log_probs(PROMPT)
    Datastore(path).forget(["d0"])
    saved = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        break_it(patch, path)
        for _ in range(3):
            assert followed.follow() is model
    assert followed.problem is not None
    assert len(caplog.records) == 1, "said once"
    assert "knnlm_reopening_failures_total 3.0" in metrics.render().decode()
    model.log_probs(PROMPT)
    for file, content in saved.items():
        file.write_bytes(content)
    newest = followed.follow()
    assert followed.problem is None
    assert len(newest.retrievers[0].store) < len(model.retrievers[0].store)


def test_health_says_which_state_serves(path: Path) -> None:
    with serving(lambda: opening(path)) as served, served.http() as client:

        def health() -> tuple[int, str, list[int]]:
            answer = client.get("/health")
            return answer.status_code, answer.json()["status"], answer.json()["entries"]

        store = Datastore(path)
        before = len(store)
        assert health() == (200, "ok", [before])
        store.forget(["d0"])
        assert health() == (200, "ok", [len(store)])
        catalog = path / "catalog.sqlite"
        catalog.rename(path / "elsewhere")
        assert health() == (200, "degraded", [len(store)])
        assert served.complete("The nearest", max_tokens=2).choices
        (path / "elsewhere").rename(catalog)
        build(path, fresh_lm(), distinct_documents(7))
        assert health() == (200, "ok", [len(Datastore(path))])


def test_tuned_meanwhile(path: Path) -> None:
    with serving(lambda: KNNLM(fresh_lm(), Datastore(path), temperature=3.0)) as served:
        served.complete("The", max_tokens=1)
        Datastore(path).save_parameters(Parameters(5, 0.6, 7.0), {})
        served.complete("The", max_tokens=1)
        (parameters,) = served.service.engine.facts.parameters
    assert parameters == Parameters(5, 0.6, 3.0), "the given temperature, the rest as tuned"
