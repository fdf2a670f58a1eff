"""A datastore searched by real Ray actors on this machine, which are killed, stopped and lag."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refusal, tiny_llama
from index_contract import append
from serving import fresh_lm, opening, serving, wait_for
from stores import distinct_documents
from torch import Tensor
from typer.testing import CliRunner

import knnlm
from knnlm.apps.cli.main import app
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_cluster import store_cluster, stored_cluster
from knnlm.errors import ClusterError, InvalidArgumentError
from knnlm.index.cluster import control
from knnlm.index.cluster.index import ClusterIndex
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.policy import open_index
from knnlm.index.protocol import Index, Neighbors
from knnlm.index.share import Share
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build, compact
from knnlm.text.documents import Document

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.alone
SHARES, REPLICAS = 2, 2
MANY = 70  # queries
DEADLINE = 30.0
SHORT = 1.0  # where it is to be missed


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(knnlm.__file__).parents[1]))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def path(running_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore that a cluster searches; the tests change it and kill its actors."""
    path = tmp_path_factory.mktemp("cluster") / "docs.store"
    build(path, fresh_lm(), distinct_documents(12), window=64, context=16, index="ivf")
    knnlm.start_cluster(
        path, shares=SHARES, replicas=REPLICAS, deadline_seconds=DEADLINE, threads=1
    )
    return path


def queries_for(store: Datastore, count: int) -> Tensor:
    """Return queries near stored keys."""
    generator = torch.Generator().manual_seed(count)
    keys = store.keys_at(torch.randint(store.rows, (count,), generator=generator)).float()
    return keys + 0.01 * torch.randn(keys.shape, generator=generator)


def open_both(path: Path, coverage: str = "whole") -> tuple[ClusterIndex, IVFIndex]:
    """Return a datastore's index on its cluster, and the same index in this process."""
    index = open_index(path, coverage=coverage)
    assert isinstance(index, ClusterIndex)
    return index, IVFIndex(Datastore(path))


def assert_same_neighbors(found: Neighbors, expected: Neighbors) -> None:
    """Check distances bit for bit, and rows; of many queries, equally far ones in any order."""
    assert torch.equal(found.squared_distances, expected.squared_distances)
    if len(found.rows) < MANY:
        assert torch.equal(found.rows, expected.rows)
        return
    ascending = found.squared_distances
    is_alone = torch.ones_like(found.rows, dtype=torch.bool)
    is_alone[:, 1:] &= ascending.diff(dim=1) > 0
    is_alone[:, :-1] &= ascending.diff(dim=1) > 0
    is_alone[:, -1] = False  # others may be as far
    assert torch.equal(found.rows[is_alone], expected.rows[is_alone])


def hasty(index: Index) -> ClusterIndex:
    """Let an index wait no longer than SHORT."""
    assert isinstance(index, ClusterIndex)
    index.cluster = replace(index.cluster, deadline_seconds=SHORT)
    return index


def assert_equal_searches(index: ClusterIndex, local: IVFIndex) -> None:
    """Check that the cluster answers bit for bit as one process."""
    for count in (1, 9, MANY):
        queries = queries_for(local.store, count)
        found = index.search(queries, 40)
        assert_same_neighbors(found, local.search(queries, 40))
        assert found.coverage == 1.0


def processes(path: Path, share: int) -> list[int]:
    """Return the processes of a share's actors."""
    _, actors = knnlm.cluster_status(path)
    return [actor.process for actor in actors if actor.share == share and actor.process]


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Let some processes stand still."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def test_the_cluster_answers_as_one_process(path: Path) -> None:
    assert_equal_searches(*open_both(path))


def test_eval_and_attach_do_not_know_that_it_is_a_cluster(path: Path) -> None:
    documents = [Document("held-out", "A memory is one entry for every token of the text. " * 3)]
    reports = []
    for index in open_both(path):
        store = Datastore(path)
        model = KNNLM(fresh_lm(), store, k=20, lmbda=0.4, temperature=10.0, index=index)
        reports.append(model.perplexity(documents))
    assert reports[0].knn == reports[1].knn
    assert reports[0].knn != reports[0].lm
    inputs = torch.tensor([[0, 5, 9, 30]])
    read, written = [], []
    for index in open_both(path):
        model = tiny_llama()
        with knnlm.attach(model, Datastore(path), k=500, lmbda=0.4, index=index):
            read.append(model(inputs).logits)
            options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
            written.append(torch.stack(model.generate(inputs, do_sample=False, **options).logits))
    assert torch.equal(*read)
    assert torch.equal(*written)


def test_what_is_appended_and_forgotten_is_followed(path: Path) -> None:
    index, _ = open_both(path)
    reader, _ = open_both(path)
    queries = queries_for(reader.store, 9)
    before = reader.search(queries, 10)
    keys = queries_for(reader.store, 300).half()
    append(path, keys, 2, "appended")
    Datastore(path).forget(["d3"])
    index.store.refresh()
    assert_equal_searches(index, IVFIndex(Datastore(path)))
    assert_same_neighbors(reader.search(queries, 10), before)  # its snapshot stays
    index.store.forget(["d4"])
    assert_equal_searches(index, IVFIndex(Datastore(path)))
    build(path, fresh_lm(), distinct_documents(12), window=64, context=16)  # d3 and d4 again
    assert_equal_searches(*open_both(path))


def test_a_killed_actor_is_replaced_by_its_replica(path: Path) -> None:
    index, local = open_both(path)
    os.kill(processes(path, 0)[0], signal.SIGKILL)
    for _ in range(3):
        assert_equal_searches(index, local)


def test_a_late_actor_is_not_waited_for(path: Path) -> None:
    wait_for(lambda: len(processes(path, 0)) == REPLICAS, 120.0)
    index, local = open_both(path)
    assert_equal_searches(index, local)
    for process in processes(path, 1):
        with stopped([process]):
            assert_equal_searches(index, local)


def test_what_is_missing_is_an_error_or_is_told(path: Path) -> None:
    index, local = open_both(path)
    hurried = hasty(open_index(path))
    partial = hasty(open_index(path, coverage="partial"))
    queries = queries_for(local.store, 3)
    whole = local.search(queries, 20)
    first = IVFIndex(Datastore(path), share=Share(0, SHARES))
    with stopped(processes(path, 1)):
        with refusal(
            ClusterError, "1 of 2 shares of ", "were not searched (no answer within 1 s)", "status"
        ):
            hurried.search(queries, 20)
        found = partial.search(queries, 20)
        assert found.coverage == first.entries / len(local.store)
        assert 0.2 < found.coverage < 0.8
        assert_same_neighbors(found, first.search(queries, 20))
        model = opening(path, index=partial, k=20)
        generation = model.generate("The nearest", max_new_tokens=2)
        assert generation.coverage == found.coverage
    assert_same_neighbors(partial.search(queries, 20), whole)
    assert_equal_searches(index, local)


def test_the_server_tells_partial_coverage_and_counts_it(path: Path) -> None:
    opened = []

    def open_model() -> KNNLM:
        opened.append(open_index(path, coverage="partial"))
        return opening(path, index=opened[0])

    with serving(open_model) as served, served.http() as client:
        whole = served.complete("The nearest", max_tokens=2)
        assert whole.choices[0].coverage == 1.0
        hasty(opened[0])
        with stopped(processes(path, 0)):
            answer = served.complete("The nearest", max_tokens=1)
            assert 0.2 < answer.choices[0].coverage < 0.8
            explained = client.post("/v1/explain", json={"text": "nearest"})
            assert explained.status_code == 503
            assert "not searched in time" in explained.json()["error"]["message"]
        metrics = client.get("/metrics").text
        assert "knnlm_partial_searches_total 1.0" in metrics
        assert f"knnlm_coverage {answer.choices[0].coverage}" in metrics


def test_a_share_without_actors_comes_back(path: Path) -> None:
    index, local = open_both(path)
    hasty(index)
    for process in processes(path, 0):
        os.kill(process, signal.SIGKILL)
    queries = queries_for(local.store, 3)
    expected = local.search(queries, 20)
    answered = []

    def is_back() -> bool:
        try:
            answered.append(index.search(queries, 20))
        except ClusterError:
            return False
        return True

    wait_for(is_back, 120.0)
    assert_same_neighbors(answered[-1], expected)


def test_the_command_line_starts_shows_and_stops(path: Path) -> None:
    runner = CliRunner()
    second = runner.invoke(app, ["cluster", "start", str(path)])
    assert second.exit_code == 1
    assert "has a cluster already, or" in " ".join(second.stderr.split())
    late = runner.invoke(app, ["cluster", "status", str(path), "--shares", "3"])
    assert "shares goes with start, not with status" in " ".join(late.stderr.split())
    wait_for(lambda: len(processes(path, 0)) == REPLICAS, 120.0)
    shown = json.loads(runner.invoke(app, ["cluster", "status", str(path), "--json"]).stdout)
    assert (shown["shares"], shown["replicas"]) == (SHARES, REPLICAS)
    assert {(one["share"], one["replica"]) for one in shown["actors"]} == {
        (share, replica) for share in range(SHARES) for replica in range(REPLICAS)
    }
    assert "2 shares × 2 replicas" in runner.invoke(app, ["cluster", "status", str(path)]).stdout
    assert "2 shares × 2 replicas" in runner.invoke(app, ["info", str(path)]).stdout


def test_a_cluster_that_is_gone_is_no_silent_local_search(path: Path) -> None:
    reader = hasty(open_index(path))
    cluster = stored_cluster(Datastore(path).catalog)
    assert cluster is not None
    for share, replica in cluster.actors:
        name = f"share-{share}-replica-{replica}"
        ray.kill(ray.get_actor(name, namespace=cluster.namespace))
    wait_for(lambda: not ray.util.list_named_actors(all_namespaces=True))
    with refusal(ClusterError, "whose actors are not running", "knnlm cluster stop"):
        open_index(path)
    store = Datastore(path)  # it still opens, to be looked after
    store.forget(["d1"])
    compact(store)
    assert knnlm.stop_cluster(path) == 0
    assert isinstance(open_index(path), IVFIndex)
    with refusal(ClusterError, "the cluster of ", " was stopped: open the datastore again"):
        reader.search(queries_for(reader.store, 1), 10)
    with pytest.raises(InvalidArgumentError, match="has no cluster"):
        knnlm.stop_cluster(path)


def test_a_start_that_fails_leaves_nothing(running_ray: None, tmp_path: Path) -> None:
    path = tmp_path / "docs.store"
    build(path, fresh_lm(), distinct_documents(2), window=64, context=16)
    with pytest.raises(ClusterError, match="is connected to the Ray cluster at"):
        knnlm.start_cluster(path, address="127.0.0.1:1")
    for wrong in ({"replicas": 0}, {"shares": 0}, {"deadline_seconds": 0.0}, {"threads": 0}):
        with pytest.raises(InvalidArgumentError):
            knnlm.start_cluster(path, **wrong)
    (path / "copy").write_text("in the way of a folder")
    with pytest.raises(knnlm.DatastoreWriteError):
        knnlm.start_cluster(path, shares=1, copy_to=path / "copy")
    assert stored_cluster(Datastore(path).catalog) is None
    wait_for(lambda: not ray.util.list_named_actors(all_namespaces=True))


def test_a_start_that_was_killed_is_ended_by_stop(running_ray: None, tmp_path: Path) -> None:
    path = tmp_path / "docs.store"
    build(path, fresh_lm(), distinct_documents(2), window=64, context=16)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_wait_until_open", "_record"):  # nothing is done after the actors' start
            patch.setattr(control, name, lambda *_: None)
        cluster = knnlm.start_cluster(path, shares=2)
    store = Datastore(path)
    with store.writer() as catalog, catalog.transaction(entries_change=False):
        store_cluster(catalog, replace(cluster, is_open=False))
    assert isinstance(open_index(path), ExactIndex)
    with refusal(InvalidArgumentError, "whose start was interrupted: knnlm cluster stop"):
        knnlm.start_cluster(path)
    assert knnlm.stop_cluster(path) == 2
    wait_for(lambda: not ray.util.list_named_actors(all_namespaces=True))
