"""What searching on a Ray cluster adds to a step, and what happens while its actors are killed.

    python benchmarks/cluster.py --keys train_keys.npy --queries test_keys.npy --folder /tmp/cluster
    python benchmarks/cluster.py --keys … --queries … --folder … --kills 50

The first compares, in one run, the search of an index in this process with the search of the same
index on a cluster of this machine, of one share, of two and of three: single queries and batches,
step by step in turn. The second runs a cluster of several nodes on this machine, kills actors and
nodes while it searches without pause, and compares every answer, bit for bit, with that of the
index in this process. A datastore that an earlier run has made in the folder is used again.
Needs the extra ray.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_store import make_store
from torch import Tensor

import knnlm
from knnlm.datastore.datastore import Datastore
from knnlm.errors import ClusterError, DatastoreChangedError
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.policy import build_index, open_index
from knnlm.index.protocol import Index, Neighbors
from knnlm.index.share import Share
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results"
SHARES, REPLICAS, NODES = 2, 2, 3
DEADLINE = 2.0
BATCHES = {1: 300, 8: 150, 64: 20, 1024: 4}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 90th percentile of some times."""
    ascending = sorted(seconds)
    return {
        "median_ms": statistics.median(ascending) * 1e3,
        "p90_ms": ascending[len(ascending) * 9 // 10] * 1e3,
    }


def timed(index: Index, queries: Tensor, k: int) -> float:
    """Return the seconds that a search takes."""
    started = time.perf_counter()
    index.search(queries, k)
    return time.perf_counter() - started


def compare_steps(path: Path, queries: Tensor, k: int, shares: int) -> list[dict[str, Any]]:
    """Time steps in this process and on the cluster, in turn."""
    knnlm.start_cluster(path, shares=shares)
    try:
        remote, local = open_index(path), IVFIndex(Datastore(path))
        rows = []
        for batch, steps in BATCHES.items():
            times: dict[str, list[float]] = {"local": [], "cluster": []}
            for step in range(steps + 2):
                some = queries[torch.arange(batch) + step * batch % len(queries) - len(queries)]
                for name, index in (("local", local), ("cluster", remote)):
                    times[name].append(timed(index, some, k))
            row = {name: milliseconds(seconds[2:]) for name, seconds in times.items()}
            added = row["cluster"]["median_ms"] - row["local"]["median_ms"]
            rows.append({"shares": shares, "queries": batch, **row, "added_ms": added})
            print(rows[-1], flush=True)
        return rows
    finally:
        knnlm.stop_cluster(path)


class Expected:
    """What one index answers in this process, query by query, and what each share alone does."""

    def __init__(self, path: Path, queries: Tensor, k: int) -> None:
        local = IVFIndex(Datastore(path))
        self.by_coverage = {1.0: _one_by_one(local, queries, k)}
        for number in range(SHARES):
            share = IVFIndex(Datastore(path), share=Share(number, SHARES))
            self.by_coverage[share.entries / len(local.store)] = _one_by_one(share, queries, k)

    def judge(self, found: Neighbors, one: slice) -> str:
        """Return whole, partial or wrong."""
        right = self.by_coverage.get(found.coverage)
        if right is None or not (
            torch.equal(found.rows, right.rows[one])
            and torch.equal(found.squared_distances, right.squared_distances[one])
        ):
            return "wrong"
        return "whole" if found.coverage == 1.0 else "partial and told"


def _one_by_one(index: Index, queries: Tensor, k: int) -> Neighbors:
    found = [index.search(query[None], k) for query in queries]
    return Neighbors(
        torch.cat([one.squared_distances for one in found]), torch.cat([one.rows for one in found])
    )


def kill_some(path: Path, cluster: Any, nodes: list[Any], kills: int, pause: float) -> Counter[str]:
    """Kill actors and, every fifth time, a node, which another then replaces."""
    killed: Counter[str] = Counter()
    chance = random.Random(0)
    while killed.total() < kills:
        time.sleep(pause)
        if killed.total() % 5 == 4:
            node = nodes.pop(chance.randrange(len(nodes)))
            cluster.remove_node(node, allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100 << 20))
            killed["nodes"] += 1
        else:
            _, actors = knnlm.cluster_status(path)
            alive = [actor.process for actor in actors if actor.process is not None]
            if not alive:
                continue
            os.kill(chance.choice(alive), signal.SIGKILL)
            killed["actors"] += 1
        print(f"{killed.total()} kills", dict(killed), flush=True)
    return killed


class Searching:
    """Searches without pause in a thread, until it is ended, and judges every answer."""

    def __init__(self, path: Path, expected: Expected, queries: Tensor, k: int) -> None:
        self.indexes = [open_index(path), open_index(path, coverage="partial")]
        self.outcomes, self.reasons = Counter[str](), Counter[str]()
        self.times: list[float] = []
        self._expected, self._queries, self._k = expected, queries, k
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._search)
        self._thread.start()

    def _search(self) -> None:
        chance = random.Random(1)
        while not self._ended.is_set():
            first = chance.randrange(len(self._queries))
            one = slice(first, first + 1)
            started = time.perf_counter()
            try:
                found = self.indexes[len(self.times) % 2].search(self._queries[one], self._k)
                self.outcomes[self._expected.judge(found, one)] += 1
            except (ClusterError, DatastoreChangedError) as error:
                self.outcomes["error that says so"] += 1
                self.reasons[str(error).partition("searched (")[2].partition(")")[0]] += 1
            self.times.append(time.perf_counter() - started)

    def end(self) -> None:
        """Wait for the last search."""
        self._ended.set()
        self._thread.join()


def search_while_killing(
    path: Path, queries: Tensor, k: int, kills: int, pause: float
) -> dict[str, Any]:
    """Kill beside a thread that searches without pause; return what every search answered."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(NODES)]
    ray.init(address=cluster.address, log_to_driver=False)
    knnlm.start_cluster(
        path, shares=SHARES, replicas=REPLICAS, deadline_seconds=DEADLINE, threads=1
    )
    expected = Expected(path, queries, k)
    searching = Searching(path, expected, queries, k)
    try:
        killed = kill_some(path, cluster, nodes, kills, pause)  # Ray adds nodes in this thread only
    finally:
        searching.end()
    settled = expected.judge(_settled(searching.indexes[0], queries, k), slice(None))
    searching.outcomes[f"after the last kill: {settled}"] += 1
    knnlm.stop_cluster(path)
    ray.shutdown()
    cluster.shutdown()
    return {
        "kills": dict(killed),
        "searches": len(searching.times),
        "outcomes": dict(searching.outcomes),
        "reasons": dict(searching.reasons),
        "search": milliseconds(searching.times) | {"longest_ms": max(searching.times) * 1e3},
        "deadline_ms": DEADLINE * 1e3,
    }


def _settled(index: Index, queries: Tensor, k: int) -> Neighbors:
    while True:
        try:
            return _one_by_one(index, queries, k)
        except ClusterError:
            time.sleep(0.5)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between two kills")
    parser.add_argument("--note", default="", help="what else the machine did, for the results")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    keys = np.load(arguments.keys, mmap_mode="r")[: arguments.entries]
    queries = torch.from_numpy(np.load(arguments.queries, mmap_mode="r")[:4096].astype(np.float32))
    path = arguments.folder / "made.store"
    if not path.exists():
        making = path.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        build_index(
            make_store(making, keys.shape[1], np.array_split(keys, 4)), "ivf", k=arguments.k
        )
        making.rename(path)
    facts = {"entries": len(Datastore(path)), "dimension": keys.shape[1], "k": arguments.k}
    facts["note"] = arguments.note
    if arguments.kills:
        found = search_while_killing(
            path, queries[:256], arguments.k, arguments.kills, arguments.pause
        )
        write_results(RESULTS / "cluster-kills.json", facts | found)
        print(found)
        assert not any("wrong" in outcome for outcome in found["outcomes"])
        return
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    steps = [
        row for shares in (1, 2, 3) for row in compare_steps(path, queries, arguments.k, shares)
    ]
    write_results(RESULTS / "cluster.json", facts | {"steps": steps})


if __name__ == "__main__":
    main()
