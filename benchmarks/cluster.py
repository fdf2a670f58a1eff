"""What searching on a Ray cluster adds to a step, and what happens while its actors are killed.

    python benchmarks/cluster.py --keys train_keys.npy --queries test_keys.npy --folder /tmp/cluster
    python benchmarks/cluster.py --keys … --queries … --folder … --kills 50

The first compares, in one run, the search of an index in this process with the search of the same
index on a cluster of this machine, of one share, of two and of three: single queries and batches,
step by step in turn. The second runs a cluster of several nodes on this machine, kills actors and
nodes while it searches without pause, and compares every answer, bit for bit, with what the shares
answer in one process. A datastore that an earlier run has made in the folder is used again.
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
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_store import make_store
from torch import Tensor

import knnlm
from knnlm.datastore.datastore import Datastore
from knnlm.errors import ClusterError, DatastoreChangedError
from knnlm.index.cluster.merging import merge_shares
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
    """What the shares answer, searched in this process query by query: all of them, and some.

    same_as_one_index: of the neighbors that one index of all entries finds, the part that is among
    those of the shares. Shares may find nearer ones: each looks at as many candidates as one index.
    """

    def __init__(self, path: Path, queries: Tensor, k: int) -> None:
        local = IVFIndex(Datastore(path))
        shares = [IVFIndex(Datastore(path), share=Share(n, SHARES)) for n in range(SHARES)]
        parts = [_one_by_one(share, queries, k) for share in shares]
        self.by_coverage = {
            sum(shares[n].entries for n in chosen) / len(local.store): merge_shares(
                [parts[n] for n in chosen], k, 1.0
            )
            for count in range(1, SHARES + 1)
            for chosen in combinations(range(SHARES), count)
        }
        same = (self.by_coverage[1.0].rows == _one_by_one(local, queries, k).rows).float()
        self.same_as_one_index = same.mean().item()

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


def kill_some(
    path: Path, cluster: Any, nodes: list[Any], kills: int, pause: float, done: threading.Event
) -> Counter[str]:
    """Kill actors and, every fifth time, a node, which another then replaces."""
    killed: Counter[str] = Counter()
    chance = random.Random(0)
    try:
        while killed.total() < kills:
            time.sleep(pause)
            if killed.total() % 5 == 4:
                node = nodes.pop(chance.randrange(len(nodes)))
                cluster.remove_node(node, allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
                killed["nodes"] += 1
            else:
                _, actors = knnlm.cluster_status(path)
                alive = [actor.process for actor in actors if actor.process is not None]
                if not alive:
                    continue
                os.kill(chance.choice(alive), signal.SIGKILL)
                killed["actors"] += 1
            print(f"{killed.total()} kills", dict(killed), flush=True)
    finally:
        done.set()
    return killed


def search_while_killing(
    path: Path, queries: Tensor, k: int, kills: int, pause: float
) -> dict[str, Any]:
    """Search without pause beside a thread that kills; return what every search answered."""
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
    indexes = [open_index(path), open_index(path, coverage="partial")]
    done, outcomes = threading.Event(), Counter[str]()
    killed: list[Counter[str]] = []
    thread = threading.Thread(
        target=lambda: killed.append(kill_some(path, cluster, nodes, kills, pause, done))
    )
    thread.start()
    times: list[float] = []
    reasons: Counter[str] = Counter()
    chance = random.Random(1)
    while not done.is_set():
        first = chance.randrange(len(queries))
        one = slice(first, first + 1)
        started = time.perf_counter()
        try:
            found = indexes[len(times) % 2].search(queries[one], k)
            outcomes[expected.judge(found, one)] += 1
        except (ClusterError, DatastoreChangedError) as error:
            outcomes["error that says so"] += 1
            reasons[str(error).partition("(")[2].partition(")")[0]] += 1
        times.append(time.perf_counter() - started)
    thread.join()
    outcomes[
        "after the last kill: " + expected.judge(_settled(indexes[0], queries, k), slice(None))
    ] += 1
    knnlm.stop_cluster(path)
    ray.shutdown()
    cluster.shutdown()
    return {
        "kills": dict(killed[0]),
        "searches": len(times),
        "outcomes": dict(outcomes),
        "reasons": dict(reasons),
        "search": milliseconds(times) | {"longest_ms": max(times) * 1e3},
        "same_as_one_index": expected.same_as_one_index,
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
        assert "wrong" not in found["outcomes"]
        return
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    steps = [
        row for shares in (1, 2, 3) for row in compare_steps(path, queries, arguments.k, shares)
    ]
    write_results(RESULTS / "cluster.json", facts | {"steps": steps})


if __name__ == "__main__":
    main()
