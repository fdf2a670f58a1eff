"""Many workers read the keys of a build: how fast, and with the same result whatever is killed.

    python benchmarks/workers.py throughput --model knnlm-demo/smollm2-135m
    OMP_NUM_THREADS=1 python benchmarks/workers.py simulated
    OMP_NUM_THREADS=1 python benchmarks/workers.py kills --kills 50

throughput: a real model, by one local worker with all cores and by two that share them. simulated:
reading a batch is a pause, so that workers need no core; what eight of them lose against one is
what the build itself costs. kills: workers, whole builds and nodes of a Ray cluster are killed
while a tiny model builds; in the end the datastore has the shards that one process made. Workers
are ready before a clock starts; those of the last two parts are forks of this process.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from build import corpus
from soak import PROSE, save_model
from torch import Tensor

from knnlm.datastore.append import append_documents
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.verification import verify
from knnlm.model import reading
from knnlm.model.keyed_model import KeyedModel
from knnlm.model.language_model import LanguageModel
from knnlm.provenance import write_results
from knnlm.text.documents import Document
from knnlm.workers import local
from knnlm.workers.jobs import Made, Message
from knnlm.workers.local import LocalCrew
from knnlm.workers.on_ray import RayCrew
from knnlm.workers.pool import WorkerPool
from knnlm.workers.process import serve

RESULTS = Path(__file__).parent / "results"
LEASE_SECONDS = 60.0
SMALL: dict[str, Any] = {"window": 64, "context": 16, "shard_rows": 100}


class Fork:
    """A process that has everything imported; see `local.Process`."""

    def __init__(self, work: Callable[[], object], keep: int | None = None) -> None:
        def alone() -> None:
            for number in range(3, 256):  # above all the build's ends of other workers' pipes
                if keep is not None and number != keep:
                    try:
                        os.close(number)
                    except OSError:
                        continue
            work()

        self.process = multiprocessing.get_context("fork").Process(target=alone)
        self.process.start()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return its exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout or 0)
        return self.process.exitcode


def fork_workers(lm: LanguageModel) -> None:
    """Let workers be forks, which have the model."""
    assert torch.get_num_threads() == 1, "a fork has no thread pool: set OMP_NUM_THREADS=1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vars(local)["launch"] = lambda pipe, threads, errors: Fork(
        lambda: serve(pipe, lambda post: lm), pipe.fileno()
    )


def documents_of(count: int, paragraphs: int) -> list[Document]:
    """Return documents of so many paragraphs, no two of which are alike."""
    texts = (f"{n} and {n * n}: {PROSE[3 * n % 97 :]}" for n in range(count))
    return [Document(f"d{n}", text + PROSE * paragraphs) for n, text in enumerate(texts)]


def assert_same(store: Datastore, whole: Datastore) -> None:
    """Check that two datastores have the same files and documents."""
    assert verify(store).problems == ()
    assert [shard.file for shard in store.shards] == [shard.file for shard in whole.shards]
    assert store.documents() == whole.documents()


@contextmanager
def ready_pool(lm: LanguageModel, size: int, shard_rows: int) -> Iterator[WorkerPool]:
    """Yield workers that have read something."""
    with WorkerPool(LocalCrew(lm, size), LEASE_SECONDS) as pool, tempfile.TemporaryDirectory() as t:
        warm = [Document(f"w{number}", PROSE * (shard_rows // 20)) for number in range(2 * size)]
        append_documents(Path(t) / "warm", lm, warm, maker=pool, shard_rows=shard_rows)
        yield pool


def timed(
    lm: LanguageModel, pool: WorkerPool, documents: list[Document], shard_rows: int
) -> tuple[float, Tensor]:
    """Return how many entries a second are built, and their keys."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = append_documents(
            Path(folder) / "store", lm, documents, maker=pool, shard_rows=shard_rows
        )
        seconds = time.perf_counter() - started
        return store.rows / seconds, torch.cat([keys for _, keys in store.key_blocks(1 << 20)])


def throughput(model: str, share: float, repetitions: int) -> dict[str, Any]:
    """Compare one worker that has all cores with two that share them."""
    lm = LanguageModel.load(model, dtype="float32")
    documents = corpus(share)
    rates: dict[int, list[float]] = {1: [], 2: []}
    keys: dict[int, Tensor] = {}
    for _ in range(repetitions):
        for size, measured in rates.items():
            with ready_pool(lm, size, 1024) as pool:
                entries_per_second, keys[size] = timed(lm, pool, documents, 1024)
            measured.append(entries_per_second)
            print(f"{size} workers: {measured[-1]:.0f} entries/s", flush=True)
    differing = float((keys[1] != keys[2]).float().mean())
    print(f"{differing:.2g} of the numbers in the keys differ with the number of threads")
    medians = {size: statistics.median(measured) for size, measured in rates.items()}
    ratio = medians[2] / medians[1]
    print(f"two workers build {ratio:.3f} times as fast as one (target 1.0)")
    return {"entries_per_second": rates, "two_over_one": ratio, "numbers_differing": differing}


def simulated(pause_s: float) -> dict[str, Any]:
    """Let reading a batch be a pause; compare eight workers with one."""

    def keys(model: KeyedModel, tokens: Tensor) -> Tensor:
        time.sleep(pause_s)
        return (tokens[..., None] + torch.arange(model.dimension)).float()

    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model")
        lm = LanguageModel.load(Path(folder) / "model", device="cpu")
    setattr(LanguageModel, "keys", keys)  # noqa: B010 (mypy takes it for a declaration)
    fork_workers(lm)
    rates: dict[int, float] = {}
    for size, units in [(1, 16), (8, 128)]:
        documents = documents_of(units, 240)
        with ready_pool(lm, size, 8192) as pool:
            rates[size], _ = timed(lm, pool, documents, 8192)
        print(f"{size} workers: {rates[size]:,.0f} entries/s", flush=True)
    ratio = rates[8] / rates[1]
    print(f"eight workers build {ratio:.2f} times as fast as one (target 7.5)")
    return {"pause_s": pause_s, "entries_per_second": rates, "eight_over_one": ratio}


def kill_processes(lm: LanguageModel, folder: Path, kills: int) -> Counter[str]:
    """Kill workers and builds at random moments, until it was often enough; return how often."""
    documents = documents_of(60, 2)
    whole = append_documents(folder / "whole", lm, documents, **SMALL)
    original = LanguageModel.keys
    home = os.getpid()

    def keys(model: KeyedModel, tokens: Tensor) -> Tensor:
        if os.getpid() != home:
            time.sleep(0.02)  # else there is nothing to kill
        return original(model, tokens)

    setattr(LanguageModel, "keys", keys)  # noqa: B010 (mypy takes it for a declaration)
    fork_workers(lm)
    path = folder / "store"
    chance, killed = random.Random(0), Counter[str]()
    while sum(killed.values()) < kills:
        size = chance.randint(1, 3)

        def build_it(size: int = size) -> None:
            with WorkerPool(LocalCrew(lm, size), LEASE_SECONDS) as pool:
                append_documents(path, lm, documents, maker=pool, **SMALL)

        build = Fork(build_it)
        while build.process.is_alive() and sum(killed.values()) < kills:
            build.process.join(chance.uniform(0.1, 0.8))
            children = Path(f"/proc/{build.process.pid}/task/{build.process.pid}/children")
            if not build.process.is_alive():
                break
            workers = children.read_text().split()
            if workers and chance.random() < 0.6:
                os.kill(int(chance.choice(workers)), 9)
                killed["worker"] += 1
            else:
                build.kill()
                build.wait()
                killed["build"] += 1
        if build.wait() == 0:  # it has ended in spite of all
            assert_same(Datastore(path), whole)
            shutil.rmtree(path)
    build_it()
    assert_same(Datastore(path), whole)
    setattr(LanguageModel, "keys", original)  # noqa: B010 (mypy takes it for a declaration)
    print(f"killed {dict(killed)}: the same {whole.rows} entries in {len(whole.shards)} shards")
    return killed


class DyingNodes(RayCrew):
    """Loses a node, and gets a new one, after every few shards."""

    def __init__(self, lm: LanguageModel, cluster: Any, kills: int) -> None:
        self.cluster = cluster
        self.nodes = [self.new_node(), self.new_node()]
        super().__init__(lm, cluster.address)
        self.left, self.made = kills, 0

    def new_node(self) -> Any:
        """Add a node of one CPU."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def messages(self, seconds: float) -> list[tuple[int, Message]]:
        """Kill a node now and then."""
        found = super().messages(seconds)
        made = sum(isinstance(message, Made) for _, message in found)
        self.made += made
        if made and self.made % 6 == 0 and self.left:
            self.left -= 1
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
            self.nodes.append(self.new_node())
        return found


def kill_nodes(lm: LanguageModel, folder: Path, kills: int) -> int:
    """Kill nodes while their workers read; return how often."""
    from ray.cluster_utils import Cluster

    documents = documents_of(16 * kills, 1)
    whole = append_documents(folder / "whole-of-nodes", lm, documents, **SMALL)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        crew = DyingNodes(lm, cluster, kills)
        try:
            with WorkerPool(crew, LEASE_SECONDS) as pool:
                store = append_documents(
                    folder / "store-of-nodes", lm, documents, maker=pool, **SMALL
                )
        finally:
            crew.close()
    finally:
        cluster.shutdown()
    assert_same(store, whole)
    print(f"killed {kills - crew.left} nodes: the same {store.rows} entries")
    return kills - crew.left


def kills(count: int) -> dict[str, Any]:
    """Kill workers and builds, and a node every fifth time."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    vars(reading)["default_batch_tokens"] = lambda lm: 192  # a unit is more than one batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        lm = LanguageModel.load(folder / "model", device="cpu")
        killed = kill_processes(lm, folder, count - count // 5)
        vars(reading)["default_batch_tokens"] = lambda lm: 2048  # as in the actors
        nodes = kill_nodes(lm, folder, count // 5)
    return {"killed": {**killed, "node": nodes}, "equal": True}


def main() -> None:
    """Run one part, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["throughput", "simulated", "kills"])
    parser.add_argument("--model", help="of throughput")
    parser.add_argument("--share", type=float, default=0.15, help="of throughput's text")
    parser.add_argument("--repetitions", type=int, default=3, help="of throughput")
    parser.add_argument("--pause", type=float, default=0.25, help="seconds a batch, simulated")
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.part == "throughput":
        results = throughput(arguments.model, arguments.share, arguments.repetitions)
    elif arguments.part == "simulated":
        results = simulated(arguments.pause)
    else:
        results = kills(arguments.kills)
    write_results(RESULTS / f"workers-{arguments.part}.json", results)


if __name__ == "__main__":
    main()
