"""The time of an evaluation: the kNN-LM against the LM alone, on the same windows.

    python benchmarks/tax.py STORE TEXT… --max-tokens 8192 --entries 100000 250000
    python benchmarks/tax.py STORE TEXT… --max-tokens 8192 --knn-transformers CHECKOUT --folder DIR

STORE is searched with its index; `--entries` adds datastores of its first entries, with the index
that "auto" chooses; `--compressed` adds a copy of it with a compressed index. Perplexities are
compared to exact search with k 1024. The LM alone and the kNN-LM evaluate the same text in turn,
repeatedly, in one process; the tax is the median of the ratios of their times.

knn-transformers runs in a process of its own, because it changes FAISS for the whole process, and
is compared to the LM alone in that process: see `knn_transformers.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from made_store import write_store

import knnlm
from knnlm.index.exact import ExactIndex
from knnlm.index.policy import build_index
from knnlm.index.report import describe_index
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "tax.json"
EXACT_K = 1024
SHARD_ROWS = 65_536


def first_entries(
    store: knnlm.Datastore, entries: int, folder: Path, kind: str = "auto"
) -> knnlm.Datastore:
    """Make a datastore from the first entries of another, with its index."""
    parts = (
        torch.arange(start, min(entries, start + SHARD_ROWS))
        for start in range(0, entries, SHARD_ROWS)
    )
    shards = ((store.keys_at(rows), store.values[rows]) for rows in parts)
    made = write_store(folder, store.settings, shards)
    build_index(made, kind)
    return made


class Tax:
    """Measures evaluation times on one text."""

    def __init__(self, lm: knnlm.LanguageModel, arguments: argparse.Namespace) -> None:
        self.lm, self.arguments = lm, arguments
        self.documents = knnlm.read_documents(*arguments.text)
        self.fixed: dict[str, Any] = {
            "lmbda": arguments.lmbda,
            "temperature": arguments.temperature,
        }

    def evaluate(self, store: knnlm.Datastore, **given: Any) -> knnlm.PerplexityReport:
        """Evaluate once."""
        model = knnlm.KNNLM(self.lm, store, **given)
        return model.perplexity(self.documents, max_tokens=self.arguments.max_tokens)

    def ways(self, store: knnlm.Datastore) -> dict[str, dict[str, Any]]:
        """Return the weights to measure: fixed for every k, and learned if `tune` stored them."""
        ways = {f"k {k}": {"k": k, **self.fixed} for k in self.arguments.k}
        if store.is_learned:
            ways |= {"learned": {}, "learned + cache": {"cache": True}}
        return ways

    def measure(self, store: knnlm.Datastore) -> dict[str, Any]:
        """Measure the tax of a datastore with all weights."""
        ways = self.ways(store)
        exact = self.evaluate(store, k=EXACT_K, index=ExactIndex(store), **self.fixed)
        alone: list[knnlm.PerplexityReport] = []
        remembering: dict[str, list[knnlm.PerplexityReport]] = {name: [] for name in ways}
        for given in ways.values():
            self.evaluate(store, **given)  # compiles the kernels
        for _ in range(self.arguments.repetitions):
            alone.append(self.evaluate(store, k=1, lmbda=0.0))
            for name, given in ways.items():
                remembering[name].append(self.evaluate(store, **given))
        lm_seconds = [report.seconds.total for report in alone]
        print(f"\n{len(store):,} entries, {exact.tokens:,} tokens")
        print(f"LM alone      {statistics.median(lm_seconds):8.2f} s")
        settings = []
        for name, reports in remembering.items():
            seconds = [report.seconds.total for report in reports]
            taxes = [ours / lm for ours, lm in zip(seconds, lm_seconds, strict=True)]
            tax, perplexity = statistics.median(taxes), reports[0].knn.perplexity
            loss = perplexity / exact.knn.perplexity - 1
            print(
                f"{name:<16}{statistics.median(seconds):8.2f} s: {tax:.3f}×, perplexity "
                f"{perplexity:.4f} ({loss:+.2%} from exact search)"
            )
            settings.append(
                {
                    "way": name,
                    "k": reports[0].parameters[0].k,
                    "tax": tax,
                    "taxes": taxes,
                    "perplexity_over_exact": loss,
                    "reports": [report.to_dict() for report in reports],
                }
            )
        return {
            "entries": len(store),
            "index": describe_index(store.catalog),
            "lm_alone": [report.to_dict() for report in alone],
            "exact": exact.to_dict(),
            "settings": settings,
        }


def knn_transformers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure knn-transformers on the same windows."""
    script = Path(__file__).with_name("knn_transformers.py")
    command = [sys.executable, str(script), str(arguments.store), *arguments.text]
    command += ["--checkout", str(arguments.knn_transformers), "--folder", str(arguments.folder)]
    command += ["--max-tokens", str(arguments.max_tokens), "--lmbda", str(arguments.lmbda)]
    command += ["--temperature", str(arguments.temperature)]
    command += ["--repetitions", str(arguments.repetitions)]
    if arguments.recompute:
        command.append("--recompute")
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, Any] = json.loads(answer.splitlines()[-1])
    for name, facts in measured["kinds"].items():
        print(
            f"knn-transformers, {name}: LM alone {measured['lm_alone_seconds']:.2f} s, "
            f"{facts['seconds']:.2f} s: {facts['tax']:.2f}×, perplexity {facts['perplexity']:.4f}"
        )
    return measured


def main() -> None:
    """Measure, print and write `benchmarks/results/tax.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--entries", type=int, nargs="*", default=[])
    parser.add_argument("--compressed", action="store_true", help="also measure a compressed index")
    parser.add_argument("--k", type=int, nargs="+", default=[1024, 256])
    parser.add_argument("--lmbda", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--knn-transformers", type=Path, help="a clone of that repository")
    parser.add_argument("--folder", type=Path, help="folder for its datastore and index")
    parser.add_argument("--recompute", action="store_true", help="also measure its exact distances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if (arguments.knn_transformers is None) != (arguments.folder is None):
        parser.error("--knn-transformers and --folder go together")

    results: dict[str, Any] = {"sizes": []}
    store = knnlm.Datastore(arguments.store)
    lm = store.load_model()
    tax = Tax(lm, arguments)
    for entries in arguments.entries:
        with tempfile.TemporaryDirectory() as folder:
            made = first_entries(store, entries, Path(folder) / "store")
            results["sizes"].append(tax.measure(made))
            made.close()
        write_results(arguments.results, results)
    results["sizes"].append(tax.measure(store))
    write_results(arguments.results, results)
    if arguments.compressed:
        with tempfile.TemporaryDirectory() as folder:
            made = first_entries(store, store.rows, Path(folder) / "store", "compressed")
            results["compressed"] = tax.measure(made)
            made.close()
        write_results(arguments.results, results)
    if arguments.knn_transformers is not None:
        del tax, lm
        results["knn_transformers"] = knn_transformers(arguments)
        write_results(arguments.results, results)


if __name__ == "__main__":
    main()
