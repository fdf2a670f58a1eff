"""Workers on a Ray cluster of two nodes, one of which is killed; skipped without ray."""

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal
from stores import distinct_documents

from knnlm.datastore.append import append_documents
from knnlm.datastore.verification import verify
from knnlm.errors import InvalidArgumentError, WorkerError
from knnlm.model.language_model import LanguageModel
from knnlm.workers.jobs import Made, Message, Ready
from knnlm.workers.on_ray import RayCrew
from knnlm.workers.pool import WorkerPool

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
]

STORE = {"object_store_memory": 80 << 20}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Return a cluster of two nodes with a CPU each."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, **STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


class Meets(RayCrew):
    """Begins when both workers are ready, and loses a node when a few units are done."""

    def __init__(self, lm: LanguageModel, cluster: Any) -> None:
        self.node = cluster.add_node(num_cpus=1, **STORE)
        super().__init__(lm, cluster.address)
        self.cluster = cluster
        self.held: list[tuple[int, Message]] = []
        self.made = 0

    def messages(self, seconds: float) -> list[tuple[int, Message]]:
        found = super().messages(seconds)
        self.made += sum(isinstance(message, Made) for _, message in found)
        if self.made >= 3 and self.node is not None:
            self._remove_node()
        if len(self.held) < 2:
            self.held += [pair for pair in found if isinstance(pair[1], Ready)]
            return self.held if len(self.held) == 2 else []
        return found

    def _remove_node(self) -> None:
        """Kill the node, and go on when the cluster knows that it is dead."""
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.node = None
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in self._ray.nodes()) == 2:
            assert time.monotonic() < deadline, "the cluster did not notice that the node died"
            time.sleep(0.1)


def test_a_node_that_dies_costs_its_unit_alone(
    tmp_path: Path, llama_lm: LanguageModel, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llama_lm.save(tmp_path / "model")
    lm = LanguageModel.load(tmp_path / "model", device="cpu")
    documents = distinct_documents(40)
    arguments: dict[str, Any] = {"window": 64, "context": 16, "shard_rows": 100}
    crew = Meets(lm, cluster)
    assert crew.size == 2, "one for each machine"
    try:
        with WorkerPool(crew, 300.0) as pool:
            made = append_documents(tmp_path / "made", lm, documents, maker=pool, **arguments)
    finally:
        crew.close()
    assert crew.node is None
    assert "was lost" in caplog.text
    whole = append_documents(tmp_path / "whole", lm, documents, **arguments)
    assert [shard.file.sha256 for shard in made.shards] == [s.file.sha256 for s in whole.shards]
    assert made.documents() == whole.documents()
    assert made.changes == whole.changes
    assert verify(made).problems == ()


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", "head:x"])
def test_what_is_no_address_is_refused(llama_lm: LanguageModel, address: str) -> None:
    with refusal(InvalidArgumentError, f"ray={address!r} must be HOST:PORT"):
        RayCrew(llama_lm, address)


def test_an_address_where_nothing_answers_is_refused(llama_lm: LanguageModel) -> None:
    with refusal(WorkerError, "cluster '127.0.0.1:1' cannot be reached", "ray start --head"):
        RayCrew(llama_lm, "127.0.0.1:1")
