"""How search time, recall and memory grow, up to ten million entries.

    python benchmarks/growth.py --keys train_keys.npy --queries test_keys.npy --folder /tmp/growth

For each size a datastore is made, indexed with `build_index(store, "auto")` and searched. Up to
the number of keys, its entries are a random subset; beyond that, copies with added noise, whose
length is on average `--noise` times the median distance from a key to its nearest other key. Every
2,048 keys are a document, which its copies belong to. All sizes have the same queries.

With `--limit-gib`, a control group limits the memory of every process (this needs root). Cached
file pages count as well as allocations, so files are evicted from the cache beforehand.

Each build and each search runs in a process of its own. Memory is as the system reports it:
resident, private (without mapped files), and the control group's peak. A datastore that is already
in the folder is used and left there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control_group import ControlGroup
from made_store import make_store
from numpy.typing import NDArray

from knnlm.datastore.datastore import Datastore
from knnlm.index.exact import ExactIndex
from knnlm.index.policy import build_index, open_index
from knnlm.index.report import describe_index
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "growth.json"
SHARD_ROWS = 222_000
DOCUMENT_ROWS = 2_048
NEAREST_OF = 1000
TRUTH_QUERIES = 256
TRUTH, FOUND = "truth.npy", "found.npy"


def made_keys(
    keys: NDArray[np.float16], size: int, noise: float, documents: list[int]
) -> Iterator[NDArray[np.float16]]:
    """Yield `size` keys in blocks. noise: the standard deviation in every dimension.

    documents: the rows of each document are appended to it. Copies of a document follow it and
    belong to it, because held-out text, to which stored keys are compared, has no copies.
    """
    generator = np.random.default_rng(size)
    if size <= len(keys):
        chosen = np.sort(generator.permutation(len(keys))[:size])
    else:
        chosen = np.arange(len(keys))
    copies = -(-size // len(keys))
    block: list[NDArray[np.float16]] = []
    for first in range(0, len(keys), DOCUMENT_ROWS):
        rows = chosen[(chosen >= first) & (chosen < first + DOCUMENT_ROWS)]
        made = [keys[rows]]
        for copy in range(1, copies):
            part = keys[rows[copy * len(keys) + rows < size]].astype(np.float32)
            deviations = generator.standard_normal(part.shape, dtype=np.float32)
            made.append((part + deviations * np.float32(noise)).astype(np.float16))
        documents.append(sum(len(part) for part in made))
        block += made
        if sum(len(part) for part in block) >= SHARD_ROWS:
            yield np.concatenate(block)
            block = []
    if block:
        yield np.concatenate(block)


def nearest_distance(keys: NDArray[np.float16]) -> float:
    """Return the median distance from a key to the nearest one that is not its copy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(keys), generator=generator)[:NEAREST_OF]
    sample = torch.from_numpy(keys[rows.numpy()]).float()
    nearest = torch.full((len(sample),), torch.inf)
    for start in range(0, len(keys), SHARD_ROWS):
        block = torch.from_numpy(keys[start : start + SHARD_ROWS].astype(np.float32))
        squared = torch.addmm(block.square().sum(dim=1), sample, block.T, alpha=-2)
        squared += sample.square().sum(dim=1, keepdim=True)
        squared[squared < 1e-3 * sample.square().sum(dim=1, keepdim=True)] = torch.inf
        nearest = torch.minimum(nearest, squared.amin(dim=1))
    return nearest.sqrt().median().item()


def own_memory() -> dict[str, float]:
    """Return the memory that the system reports for this process, in bytes."""
    kinds = {"VmHWM": "peak_resident_bytes", "VmRSS": "resident_bytes", "RssAnon": "own_bytes"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in kinds:
            found[kinds[name]] = 1024.0 * int(value.split()[0])
    return found


def find_truth(path: Path, queries: NDArray[np.float32], k: int) -> dict[str, Any]:
    """Find the true neighbors of the first queries by exact search, and save them."""
    asked = torch.from_numpy(queries[:TRUTH_QUERIES])
    rows = ExactIndex(Datastore(path), resident_bytes=0).search(asked, k).rows
    np.save(path.parent / TRUTH, rows.numpy())
    return {}


def build(path: Path, kind: str, *, indexed: bool) -> dict[str, Any]:
    """Index a datastore, or use its existing index."""
    store = Datastore(path)
    if indexed:
        return {"build_seconds": None, "index": describe_index(store.catalog)}
    started = time.perf_counter()
    build_index(store, kind)
    seconds = time.perf_counter() - started
    return {"build_seconds": seconds, "index": describe_index(store.catalog), **own_memory()}


def search(path: Path, queries: NDArray[np.float32], k: int, repetitions: int) -> dict[str, Any]:
    """Search with a datastore's index: a batch, repeatedly, and one query at a time."""
    index = open_index(Datastore(path))
    asked = torch.from_numpy(queries)
    rows = index.search(asked, k).rows  # compiles, and reads the index into memory
    np.save(path.parent / FOUND, rows[:TRUTH_QUERIES].numpy())
    batches, singles = [], []
    for _ in range(repetitions):
        started = time.perf_counter()
        index.search(asked, k)
        batches.append((time.perf_counter() - started) * 1e3 / len(asked))
    for number in range(-1, 20 * repetitions):
        started = time.perf_counter()
        index.search(asked[number * 37 % len(asked)][None], k)
        if number >= 0:
            singles.append((time.perf_counter() - started) * 1e3)
    return {
        "milliseconds_per_query": statistics.median(batches),
        "milliseconds_per_query_of_each_batch": batches,
        "milliseconds_single": statistics.median(singles),
        **own_memory(),
    }


def in_a_process(arguments: list[str], limit_bytes: int | None) -> dict[str, Any]:
    """Run one step of this script in a new process, in a control group if limited."""
    command = [sys.executable, __file__, *arguments]
    if limit_bytes is None:
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return dict(json.loads(answer))
    with ControlGroup("knnlm-growth", limit_bytes) as group:
        answer = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=group.join
        ).stdout
        return {**json.loads(answer), "group_peak_bytes": group.peak_bytes}


def forget_cached(folder: Path) -> None:
    """Evict a folder's files from the page cache, so that they count for whoever reads them."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measured(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Build and search, each in a new process."""
    given = ["--queries", str(arguments.queries), "--folder", str(path), "--kind", arguments.kind]
    given += ["--k", str(arguments.k), "--batch", str(arguments.batch)]
    given += ["--repetitions", str(arguments.repetitions)]
    given += ["--indexed"] * arguments.indexed
    limit_bytes = None
    in_a_process([*given, "--step", "truth"], None)
    if arguments.limit_gib is not None:
        limit_bytes = int(arguments.limit_gib * 2**30)
        forget_cached(path)
    built = in_a_process([*given, "--step", "build"], limit_bytes)
    print(f"built in {built['build_seconds'] or 0:.0f} s: {built['index']}", file=sys.stderr)
    if limit_bytes is not None:
        forget_cached(path)
    searched = in_a_process([*given, "--step", "search"], limit_bytes)
    found, truth = np.load(path.parent / FOUND), np.load(path.parent / TRUTH)
    hits = [len(np.intersect1d(*pair)) for pair in zip(found, truth, strict=True)]
    searched["recall"] = sum(hits) / truth.size
    print(f"searched: {searched}", file=sys.stderr)
    return {"limit_bytes": limit_bytes, "build": built, "search": searched}


def main() -> None:
    """Measure, print and write `benchmarks/results/growth.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=Path, help="an array of keys, .npy")
    parser.add_argument("--queries", type=Path, required=True, help="an array of queries, .npy")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the datastores")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--limit-gib", type=float)
    parser.add_argument("--kind", default="auto", help="kind of index")
    parser.add_argument(
        "--indexed", action="store_true", help="search datastores with the index they have"
    )
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--step", choices=["truth", "build", "search"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.step == "build":
        print(json.dumps(build(arguments.folder, arguments.kind, indexed=arguments.indexed)))
        return
    queries = np.load(arguments.queries).astype(np.float32)
    # shuffled: true neighbors are computed for the first ones, which then come from all texts
    queries = queries[np.random.default_rng(0).permutation(len(queries))[: arguments.batch]]
    if arguments.step == "truth":
        print(json.dumps(find_truth(arguments.folder, queries, arguments.k)))
        return
    if arguments.step == "search":
        print(json.dumps(search(arguments.folder, queries, arguments.k, arguments.repetitions)))
        return

    keys = np.load(arguments.keys, mmap_mode="r")
    distance = nearest_distance(keys)
    noise = arguments.noise * distance / keys.shape[1] ** 0.5
    sizes = []
    for size in arguments.sizes:
        folder = arguments.folder / str(size)
        there = folder.exists()
        try:
            print(f"{size:,} entries", file=sys.stderr)
            if not there:
                documents: list[int] = []
                made = made_keys(keys, size, noise, documents)
                make_store(folder / "store", keys.shape[1], made, documents).close()
            sizes.append({"entries": size, **measured(arguments, folder / "store")})
        finally:
            if not there:
                shutil.rmtree(folder, ignore_errors=True)
        write(arguments, sizes, distance)
    report(sizes)


def write(arguments: argparse.Namespace, sizes: list[dict[str, Any]], distance: float) -> None:
    """Write the results so far."""
    write_results(
        arguments.results,
        {
            "k": arguments.k,
            "batch": arguments.batch,
            "noise": arguments.noise,
            "median_distance_to_nearest": distance,
            "sizes": sizes,
        },
    )


def report(sizes: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(
        "entries       limit  kind        ms/query  single ms  recall  own GiB  group GiB  build s"
    )
    for facts in sizes:
        limit, built, searched = facts["limit_bytes"], facts["build"], facts["search"]
        peak = max(part.get("group_peak_bytes", 0) for part in (built, searched))
        print(
            f"{facts['entries']:>10,}  {'none' if limit is None else f'{limit / 2**30:.0f} GiB':>7}"
            f"  {built['index']['kind']:10}{searched['milliseconds_per_query']:10.3f}"
            f"{searched['milliseconds_single']:11.2f}{searched['recall']:8.3f}"
            f"{searched['own_bytes'] / 2**30:9.2f}{peak / 2**30:11.2f}"
            f"{built['build_seconds'] or 0:9.0f}"
        )


if __name__ == "__main__":
    main()
