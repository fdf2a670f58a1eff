"""The cost of building a datastore: `build` against the bare forward pass, and peak memory.

    python benchmarks/build.py --model knnlm-demo/smollm2-135m

Speed: the same windows of the same text are read by the bare decoder (no LM head) and stored by
`knnlm.build` (tokenizing, capturing keys, converting, checksums, fsync, catalog), alternating in
one process; the ratio is that of the medians. Memory: the peak of a process that builds from a
corpus, and of one that builds from a corpus ten times as large.
"""

import argparse
import pydoc_data.topics
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import knnlm
from knnlm.model.reading import cut_documents, default_batch_tokens
from knnlm.provenance import write_results
from knnlm.text.windows import Window, choose_windowing

RESULTS = Path(__file__).parent / "results" / "build.json"


def corpus(share: float) -> list[knnlm.Document]:
    """Return the first `share` of the text of Python's language reference, a document per topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    wanted = share * sum(map(len, topics.values()))
    documents: list[knnlm.Document] = []
    taken = 0
    for name, text in sorted(topics.items()):
        if taken < wanted:
            documents.append(knnlm.Document(name, text[: int(wanted - taken) + 1]))
            taken += len(documents[-1].text)  # type: ignore[arg-type]
    return documents


def bare_forward(lm: knnlm.LanguageModel, windows: list[Window], batch_tokens: int) -> float:
    """Return the seconds the decoder alone takes, in padded batches, longest windows first."""
    decoder = lm.model.get_decoder()
    left = sorted(windows, key=lambda window: -window.positions)
    started = time.perf_counter()
    with torch.inference_mode():
        while left:
            count = max(1, batch_tokens // left[0].positions)
            batch, left = left[:count], left[count:]
            tokens = np.zeros((len(batch), batch[0].positions), dtype=np.int64)
            for row, window in enumerate(batch):
                tokens[row, : window.positions] = window.inputs
            decoder(input_ids=torch.from_numpy(tokens).to(lm.device), use_cache=False)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - started


def timed_build(lm: knnlm.LanguageModel, documents: list[knnlm.Document]) -> float:
    """Return the seconds a complete build takes, in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        knnlm.build(Path(folder) / "store", lm, documents)
        return time.perf_counter() - started


def peak_mib(arguments: list[str]) -> float:
    """Run this script in a new process and return its peak memory."""
    output = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return float(output.stdout.split()[-1])


def main() -> None:
    """Measure, print and write `benchmarks/results/build.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.2, help="share of the text used for speed")
    parser.add_argument("--peak-of", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    lm = knnlm.LanguageModel.load(arguments.model, dtype="float32", device=arguments.device)
    if arguments.peak_of is not None:
        timed_build(lm, corpus(arguments.peak_of))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return

    documents = corpus(arguments.share)
    windows = list(cut_documents(lm, documents, choose_windowing(lm.max_window, lm.name)))
    tokens = sum(window.new for window in windows)
    bare_forward(lm, windows[:4], default_batch_tokens(lm))
    times: dict[str, list[float]] = {"forward": [], "build": []}
    for _ in range(arguments.repetitions):
        times["forward"].append(bare_forward(lm, windows, default_batch_tokens(lm)))
        times["build"].append(timed_build(lm, documents))
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    ratio = rates["build"] / rates["forward"]
    print(f"{tokens} tokens in {len(documents)} documents")
    print(f"bare forward pass {rates['forward']:8.0f} tokens/s")
    print(f"build             {rates['build']:8.0f} tokens/s: {ratio:.3f} of it (target 0.95)")

    common = ["--model", arguments.model, "--device", arguments.device]
    small, large = (peak_mib([*common, "--peak-of", share]) for share in ("0.1", "1.0"))
    growth = large / small - 1
    print(f"peak memory {small:.0f} MiB; corpus 10 times larger {large:.0f} MiB: {growth:+.1%}")
    write_results(
        RESULTS,
        {
            "tokens": tokens,
            "seconds": times,
            "tokens_per_second": rates,
            "build_over_forward": ratio,
            "peak_mib": {"corpus": small, "corpus_times_10": large, "growth": growth},
        },
    )


if __name__ == "__main__":
    main()
