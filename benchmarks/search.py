"""Search: knnlm's inverted file against FAISS, with the same number of lists and probes.

    python benchmarks/search.py --keys train_keys.npy --queries test_keys.npy
    python benchmarks/search.py STORE

With a datastore, its last keys are removed and used as queries. All indexes answer the same
queries in turn, repeatedly, in one process: a batch, and one query at a time. Times are medians;
a ratio is the median of the ratios within each repetition. Recall is against exact search.
`--curve` also measures batches with other numbers of probes, for the picture.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_store import make_store
from numpy.typing import NDArray

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import IndexOptions
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf.index import IVFIndex
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "search.json"
REFERENCE = "FAISS IVF,Flat"
SHARD_ROWS = 65_536
TRUTH_QUERIES = 1024
CURVE_REPETITIONS = 2

Rows = NDArray[np.int64]
Queries = NDArray[np.float32]


@dataclass
class Kind:
    """One kind of search.

    batch: queries searched at once; slow kinds get fewer. probing: the object that has `nprobe`.
    curve: recall and milliseconds by k and nprobe.
    """

    name: str
    search: Callable[[Queries, int], Rows]
    build_seconds: float | None = None
    batch: int = 4096
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)
    probing: Any = None
    curve: list[dict[str, float]] = field(default_factory=list)


def faiss_kinds(keys: NDArray[np.float16], nlist: int, nprobe: int) -> list[Kind]:
    """Return FAISS indexes over the same lists, and PQ with the paper's recomputed distances."""
    import faiss

    dimension = keys.shape[1]
    widened = keys.astype(np.float32)
    quantizer = faiss.IndexFlatL2(dimension)
    started = time.perf_counter()
    flat = faiss.IndexIVFFlat(quantizer, dimension, nlist)
    flat.train(widened)
    flat.add(widened)
    seconds = time.perf_counter() - started
    eight_bit = faiss.ScalarQuantizer.QT_8bit
    scalar = faiss.IndexIVFScalarQuantizer(quantizer, dimension, nlist, eight_bit)
    product = faiss.IndexIVFPQ(quantizer, dimension, nlist, 64, 8)
    rabitq = faiss.IndexIVFRaBitQ(quantizer, dimension, nlist)
    refined = faiss.IndexRefine(rabitq, faiss.IndexScalarQuantizer(dimension, eight_bit))
    refined.k_factor = 2
    coded: list[Any] = [scalar, product, refined]
    sample = widened[np.random.default_rng(0).permutation(len(widened))[:65_536]]
    for index in coded:
        index.train(sample)
        index.add(widened)
    for inverted in (flat, scalar, product, rabitq):
        inverted.nprobe = nprobe

    def searching(index: Any) -> Callable[[Queries, int], Rows]:
        return lambda queries, k: index.search(queries, k)[1]

    def recomputing(queries: Queries, k: int) -> Rows:
        """Find neighbors with PQ, and compute their distances from the stored keys."""
        rows = product.search(queries, k)[1]
        for query, found in zip(queries, rows, strict=True):
            difference = keys[found].astype(np.float32) - query
            np.einsum("ij,ij->i", difference, difference)
        return rows

    return [
        Kind(REFERENCE, searching(flat), seconds, probing=flat),
        Kind("FAISS IVF,SQ8", searching(scalar), probing=scalar),
        Kind("FAISS IVF,RaBitQ + SQ8 refine", searching(refined), probing=rabitq),
        Kind("FAISS IVF,PQ64", searching(product), probing=product),
        Kind("FAISS IVF,PQ64 + recomputation", recomputing, batch=256),
    ]


def knnlm_kinds(store: Datastore, nlist: int, nprobe: int) -> list[Kind]:
    """Build our inverted files, and exact search."""
    kinds = []
    names = [
        (IndexKind.ivf, "ivf float16"),
        (IndexKind.compressed, "ivf compressed"),
        (IndexKind.codes, "ivf codes"),
    ]
    for kind, name in names:
        started = time.perf_counter()
        index = IVFIndex.build(store, IndexOptions(nprobe=nprobe), nlist=nlist, kind=kind)
        seconds = time.perf_counter() - started
        kinds.append(Kind(f"knnlm {name}", _searching(index), seconds, probing=index))
    kinds.append(Kind("knnlm exact", _searching(ExactIndex(store)), batch=256))
    return kinds


def _searching(index: IVFIndex | ExactIndex) -> Callable[[Queries, int], Rows]:
    return lambda queries, k: index.search(torch.from_numpy(queries), k).rows.numpy()


def recall(kind: Kind, queries: Queries, truth: Rows) -> float:
    """Return the share of the true neighbors that a kind finds."""
    found = kind.search(queries[: len(truth)], truth.shape[1])
    hits = [len(np.intersect1d(*pair)) for pair in zip(found, truth, strict=True)]
    return sum(hits) / truth.size


def measure_curves(kinds: list[Kind], queries: Queries, truth: Rows, nprobes: list[int]) -> None:
    """Time batches and measure recall with several numbers of probes."""
    k = truth.shape[1]
    for kind in kinds:
        if kind.probing is None:
            continue
        usual = kind.probing.nprobe
        for nprobe in nprobes:
            kind.probing.nprobe = nprobe
            found = recall(kind, queries, truth)
            seconds = []
            for _ in range(CURVE_REPETITIONS):
                started = time.perf_counter()
                kind.search(queries, k)
                seconds.append(time.perf_counter() - started)
            milliseconds = min(seconds) * 1e3 / len(queries)
            point = {"k": k, "nprobe": nprobe, "recall": found, "milliseconds": milliseconds}
            kind.curve.append(point)
        kind.probing.nprobe = usual


def measure(
    kinds: list[Kind], queries: Queries, truth: Rows, *, k: int, repetitions: int, singles: int
) -> None:
    """Measure the recall of all kinds, and time them in turn."""
    for kind in kinds:
        kind.recall[str(k)] = recall(kind, queries, truth[:, :k])
        kind.search(queries[:1], k)
    for _ in range(repetitions):
        for kind in kinds:
            part = queries[: kind.batch]
            started = time.perf_counter()
            kind.search(part, k)
            seconds = time.perf_counter() - started
            kind.milliseconds.setdefault(f"batch {k}", []).append(seconds * 1e3 / len(part))
    for number in range(singles):
        query = queries[number * len(queries) // singles][None]
        for kind in kinds:
            started = time.perf_counter()
            kind.search(query, k)
            milliseconds = (time.perf_counter() - started) * 1e3
            kind.milliseconds.setdefault(f"single {k}", []).append(milliseconds)


def ratio(kind: Kind, reference: Kind, column: str) -> float:
    """Return how many times faster a kind is than the reference."""
    pairs = zip(reference.milliseconds[column], kind.milliseconds[column], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def main() -> None:
    """Measure, print and write `benchmarks/results/search.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", type=Path, help="a datastore")
    parser.add_argument("--keys", type=Path, help="an array of keys, .npy, instead of a datastore")
    parser.add_argument("--queries", type=Path, help="an array of queries, .npy")
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--singles", type=int, default=100)
    parser.add_argument("--k", type=int, nargs="+", default=[1024, 128])
    parser.add_argument("--curve", type=int, nargs="*", default=[], metavar="NPROBE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if (arguments.store is None) == (arguments.keys is None):
        parser.error("give either a datastore or --keys")

    if arguments.keys is not None:
        keys = np.load(arguments.keys, mmap_mode="r")
    else:
        blocks = Datastore(arguments.store).key_blocks(1 << 20)
        keys = torch.cat([block for _, block in blocks]).half().numpy()
    if arguments.queries is not None:
        queries = np.load(arguments.queries)[: arguments.batch].astype(np.float32)
    else:
        queries = keys[-arguments.batch :].astype(np.float32)
        keys = keys[: -arguments.batch]

    with tempfile.TemporaryDirectory() as folder:
        shards = (keys[start : start + SHARD_ROWS] for start in range(0, len(keys), SHARD_ROWS))
        store = make_store(Path(folder) / "store", keys.shape[1], shards)
        exact = ExactIndex(store)
        # shuffled: true neighbors are computed for the first ones, which then come from all texts
        queries = queries[np.random.default_rng(0).permutation(len(queries))]
        asked = torch.from_numpy(queries[:TRUTH_QUERIES])
        truth = exact.search(asked, max(arguments.k)).rows.numpy()
        kinds = [
            *knnlm_kinds(store, arguments.nlist, arguments.nprobe),
            *faiss_kinds(keys, arguments.nlist, arguments.nprobe),
        ]
        for kind in kinds:
            kind.batch = min(kind.batch, len(queries))
        for k in arguments.k:
            print(f"measuring k = {k}", file=sys.stderr)
            repetitions, singles = arguments.repetitions, arguments.singles
            measure(kinds, queries, truth, k=k, repetitions=repetitions, singles=singles)
            measure_curves(kinds, queries, truth[:, :k], arguments.curve)
    report(kinds, arguments, len(keys))


def report(kinds: list[Kind], arguments: argparse.Namespace, entries: int) -> None:
    """Print a table for each k, and write the results."""
    reference = next(kind for kind in kinds if kind.name == REFERENCE)
    print(f"{entries} keys, nlist {arguments.nlist}, nprobe {arguments.nprobe}; × of {REFERENCE}")
    for k in arguments.k:
        print(f"\nk = {k:<27} ms/query, batch        ms, single        recall")
        for kind in kinds:
            batch, single = f"batch {k}", f"single {k}"
            print(
                f"{kind.name:32}{statistics.median(kind.milliseconds[batch]):8.3f}"
                f" ({ratio(kind, reference, batch):6.2f}×)"
                f"{statistics.median(kind.milliseconds[single]):10.2f}"
                f" ({ratio(kind, reference, single):5.2f}×){kind.recall[str(k)]:9.4f}"
            )
    for kind in kinds:
        if kind.build_seconds is not None:
            print(f"build {kind.name:32}{kind.build_seconds:8.1f} s")
    write_results(
        arguments.results,
        {
            "entries": entries,
            "nlist": arguments.nlist,
            "nprobe": arguments.nprobe,
            "batch": arguments.batch,
            "reference": REFERENCE,
            "kinds": [
                {
                    "name": kind.name,
                    "build_seconds": kind.build_seconds,
                    "recall": kind.recall,
                    "milliseconds_per_query": {
                        column: statistics.median(times)
                        for column, times in kind.milliseconds.items()
                    },
                    "times_faster": {
                        column: ratio(kind, reference, column) for column in kind.milliseconds
                    },
                    "curve": kind.curve,
                }
                for kind in kinds
            ],
        },
    )


if __name__ == "__main__":
    main()
