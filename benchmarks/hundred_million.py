"""How the cost of building an index grows, up to a hundred million keys.

    python benchmarks/hundred_million.py --folder /tmp/hundred --sizes 10000000 100000000

Keys are made, one shard at a time: each lies beside one of `--clusters` centers, which lie beside
one of a thousand; the directions differ in length, as those of language models do. A cluster's keys
come from everywhere in the datastore. Queries are made alike, and are not stored. For each size the
datastore is made, indexed with `knnlm.build_index(store, --kind, memory=--memory)`, and searched,
each step in a process of its own.

Memory is the greatest that the process had of its own (RssAnon, read twenty times a second). With
`--limit-gib`, a control group limits all memory, the page cache among it (this needs root).
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control_group import ControlGroup
from growth import forget_cached
from made_store import make_store
from numpy.typing import NDArray

from knnlm.datastore.datastore import Datastore
from knnlm.index.available_memory import own_memory_bytes
from knnlm.index.exact import ExactIndex
from knnlm.index.policy import build_index, open_index
from knnlm.index.report import describe_index
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "hundred_million.json"
SHARD_ROWS = 1 << 20
TRUTH_QUERIES = 256
SINGLE_QUERIES = 200
READ_EVERY_S = 0.05


class MadeKeys:
    """A distribution of keys: clusters of clusters, in directions of different lengths."""

    def __init__(self, dim: int, clusters: int) -> None:
        generator = np.random.default_rng(0)
        scales = np.linspace(2.0, 0.3, dim, dtype=np.float32)
        topics = generator.standard_normal((1000, dim), dtype=np.float32)
        of_topic = generator.integers(len(topics), size=clusters)
        offsets = generator.standard_normal((clusters, dim), dtype=np.float32)
        self.centers = (topics[of_topic] + 0.7 * offsets) * scales
        self.scales = 0.5 * scales

    def draw(self, count: int, seed: int) -> NDArray[np.float16]:
        """Return keys; the same for the same seed."""
        generator = np.random.default_rng([1, seed])
        # a few clusters are far larger than the others, as those of frequent words are
        places = (len(self.centers) * generator.random(count) ** 2).astype(np.int64)
        keys = generator.standard_normal((count, self.centers.shape[1]), dtype=np.float32)
        keys *= self.scales
        keys += self.centers[places]
        return keys.astype(np.float16)

    def blocks(self, size: int) -> Iterator[NDArray[np.float16]]:
        """Yield the keys of a datastore, a shard at a time."""
        for number, start in enumerate(range(0, size, SHARD_ROWS)):
            yield self.draw(min(SHARD_ROWS, size - start), number)

    def queries(self, count: int) -> torch.Tensor:
        """Return keys that are in no datastore."""
        return torch.from_numpy(self.draw(count, 1 << 40)).float()


class PeakMemory:
    """Reads how much memory the process has of its own, while it works."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = own_memory_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        while not self._ended.wait(READ_EVERY_S):
            self.bytes = max(self.bytes, own_memory_bytes())

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def build(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Build the index of a datastore."""
    store = Datastore(path)
    started = time.perf_counter()
    with PeakMemory() as peak:
        build_index(store, arguments.kind, k=arguments.k, memory=arguments.memory)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "microseconds_a_key": seconds / store.rows * 1e6,
        "processor_microseconds_a_key": (usage.ru_utime + usage.ru_stime) / store.rows * 1e6,
        "peak_own_bytes": peak.bytes,
        "index": describe_index(store.catalog),
    }


def search(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Search with queries that are not stored: their recall, in a batch, and one at a time."""
    store = Datastore(path)
    queries = MadeKeys(arguments.dim, arguments.clusters).queries(arguments.batch)
    index = open_index(store)
    asked = queries[:TRUTH_QUERIES]
    truth = ExactIndex(store, resident_bytes=0).search(asked, arguments.k).rows
    found = index.search(asked, arguments.k).rows
    hits = [len(np.intersect1d(*pair)) for pair in zip(found.numpy(), truth.numpy(), strict=True)]
    index.search(queries, arguments.k)  # reads the index into memory, where it fits
    started = time.perf_counter()
    index.search(queries, arguments.k)
    batch_seconds = time.perf_counter() - started
    singles = []
    for number in range(min(SINGLE_QUERIES, len(queries))):
        started = time.perf_counter()
        index.search(queries[number : number + 1], arguments.k)
        singles.append((time.perf_counter() - started) * 1e3)
    return {
        "held_out_recall": sum(hits) / truth.numel(),
        "milliseconds_per_query": batch_seconds * 1e3 / len(queries),
        "milliseconds_single": statistics.median(singles),
    }


def in_a_process(arguments: argparse.Namespace, step: str, path: Path) -> dict[str, Any]:
    """Run a step in a new process, in a control group if limited."""
    command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--store", str(path)]
    if arguments.limit_gib is None:
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return dict(json.loads(output))
    forget_cached(path)
    with ControlGroup("knnlm-hundred-million", int(arguments.limit_gib * 2**30)) as group:
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=group.join
        ).stdout
        return {**json.loads(output), "group_peak_bytes": group.peak_bytes}


def measured(arguments: argparse.Namespace, size: int) -> dict[str, Any]:
    """Make a datastore, build its index and search, and remove it."""
    folder = arguments.folder / f"{size}-{arguments.dim}"
    try:
        if not folder.exists():
            print(f"making {size:,} keys", file=sys.stderr)
            made = MadeKeys(arguments.dim, arguments.clusters)
            make_store(folder, arguments.dim, made.blocks(size)).close()
        facts: dict[str, Any] = {"entries": size}
        for step in ("build", "search"):
            facts[step] = in_a_process(arguments, step, folder)
            print(f"{step}: {facts[step]}", file=sys.stderr)
        return facts
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder for the datastores")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=200_000)
    parser.add_argument("--kind", default="ivf", help="kind of index")
    parser.add_argument("--memory", default="8GiB", help="what building may use of its own")
    parser.add_argument("--limit-gib", type=float, help="limit of all memory, by a control group")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--keep", action="store_true", help="do not remove the datastores")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--step", choices=["build", "search"], help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write `benchmarks/results/hundred_million.json`."""
    arguments = parsed()
    if arguments.step is not None:
        step = {"build": build, "search": search}[arguments.step]
        print(json.dumps(step(arguments, arguments.store)))
        return
    sizes = [measured(arguments, size) for size in arguments.sizes]
    names = ("dim", "clusters", "kind", "memory", "limit_gib", "k", "batch")
    given = {name: getattr(arguments, name) for name in names}
    write_results(arguments.results, {**given, "sizes": sizes})
    print("entries       minutes  µs a key  own GiB  stated  held out  ms/query  ms single")
    for facts in sizes:
        built, searched = facts["build"], facts["search"]
        print(
            f"{facts['entries']:>11,}{built['seconds'] / 60:10.1f}"
            f"{built['microseconds_a_key']:10.2f}{built['peak_own_bytes'] / 2**30:9.2f}"
            f"{built['index']['recall']:8.3f}{searched['held_out_recall']:10.3f}"
            f"{searched['milliseconds_per_query']:10.3f}{searched['milliseconds_single']:11.2f}"
        )


if __name__ == "__main__":
    main()
