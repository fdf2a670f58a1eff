"""Evaluate a text with knn-transformers on a datastore's keys; called by `tax.py`.

    python benchmarks/knn_transformers.py STORE TEXT… --checkout CLONE --folder DIR

Its classes are imported from a clone of github.com/neulab/knn-transformers and run unmodified:
KNNSaver.build_index makes the index (its default: IVF4096,PQ64), KNNWrapper breaks into the model.
Four things are set from outside:

- The datastore's keys and values are written as the two arrays that KNNSaver would have written.
- Its table of models has no entry for Llama: one is added, the input of the last layer's `mlp`.
- move_dstore_to_mem, without which its lookup of values fails with current torch.
- knn_sim_func = l2, without which its constructor fails.

The model reads the windows one by one, with labels, and computes its own loss; so does the LM
alone. The folder keeps the index for later runs.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

import knnlm
from knnlm.model.reading import cut_documents

K = 1024
PROBES = 32


def load_module(checkout: Path) -> ModuleType:
    """Import its knnlm.py, which has the name of our package, under another name."""
    spec = importlib.util.spec_from_file_location("their_knnlm", checkout / "knnlm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = module.KEY_TYPE.last_ffn_input
    layer = (lambda model: model.base_model.layers[-1].mlp, True)
    module.KNNWrapper.model_layer_to_capture.setdefault("llama", {kind: layer})
    return module


def write_arrays(theirs: Any, store: knnlm.Datastore, folder: Path, model: Any) -> tuple[Any, Any]:
    """Write keys and values in its format, unless they exist; return both."""
    dimension = store.settings.dimension
    prefix = theirs.get_dstore_path(folder, model.config.model_type, store.rows, dimension)
    there = Path(f"{prefix}_vals.npy").exists()
    mode: Literal["r", "w+"] = "r" if there else "w+"
    keys = np.memmap(f"{prefix}_keys.npy", np.float16, mode, shape=(store.rows, dimension))
    if not there:
        for start, block in store.key_blocks(1 << 16):
            keys[start : start + len(block)] = block.half().numpy()
    values = np.memmap(f"{prefix}_vals.npy", np.int32, mode, shape=(store.rows, 1))
    if not there:
        values[:, 0] = store.values.numpy()
    return keys, values


def build_index(theirs: Any, store: knnlm.Datastore, folder: Path, model: Any) -> float | None:
    """Build its index by its own method, unless it exists; return the seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    saver = theirs.KNNSaver(store.rows, str(folder), store.settings.dimension)
    saver.model = model
    saver.dstore_keys, saver.dstore_vals = write_arrays(theirs, store, folder, model)
    index = theirs.get_index_path(
        folder, model.config.model_type, store.rows, store.settings.dimension
    )
    if Path(index).exists():
        return None
    started = time.perf_counter()
    saver.build_index()
    return time.perf_counter() - started


def evaluate(model: Any, windows: list[torch.Tensor]) -> tuple[float, float]:
    """Return seconds and perplexity; scores every token of a window except its first."""
    nats, tokens = 0.0, 0
    started = time.perf_counter()
    with torch.no_grad():
        for window in windows:
            loss = model(input_ids=window[None], labels=window[None]).loss
            nats += loss.item() * (len(window) - 1)
            tokens += len(window) - 1
    return time.perf_counter() - started, math.exp(nats / tokens)


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--lmbda", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    arguments = parser.parse_args()

    store = knnlm.Datastore(arguments.store)
    lm = store.load_model()
    documents = knnlm.read_documents(*arguments.text)
    windows: list[torch.Tensor] = []
    for window in cut_documents(lm, documents, store.windowing):
        assert window.context == 0, "its evaluation does not support windows with context"
        windows.append(torch.from_numpy(window.tokens).long())
        if sum(len(tokens) - 1 for tokens in windows) >= arguments.max_tokens:
            break
    theirs = load_module(arguments.checkout)
    build_seconds = build_index(theirs, store, arguments.folder, lm.model)

    def wrapped(windows: list[torch.Tensor], recompute: bool) -> tuple[float, float]:
        wrapper = theirs.KNNWrapper(
            store.rows,
            str(arguments.folder),
            store.settings.dimension,
            knn_sim_func=theirs.DIST.l2,
            move_dstore_to_mem=True,
            recompute_dists=recompute,
            k=K,
            lmbda=arguments.lmbda,
            knn_temp=arguments.temperature,
            probe=PROBES,
        )
        wrapper.break_into(lm.model)
        try:
            return evaluate(lm.model, windows)
        finally:
            wrapper.break_out()

    kinds: dict[str, Any] = {}
    evaluate(lm.model, windows[:1])
    alone = []
    for name, recompute in [("IVFPQ", False), ("recomputed distances", True)]:
        if recompute and not arguments.recompute:
            continue
        wrapped(windows[:1], recompute)
        taxes, seconds = [], []
        for _ in range(1 if recompute else arguments.repetitions):
            lm_seconds, lm_perplexity = evaluate(lm.model, windows)
            knn_seconds, knn_perplexity = wrapped(windows, recompute)
            alone.append(lm_seconds)
            seconds.append(knn_seconds)
            taxes.append(knn_seconds / lm_seconds)
            print(f"{name}: {lm_seconds:.2f} s, {knn_seconds:.2f} s", file=sys.stderr)
        kinds[name] = {
            "seconds": statistics.median(seconds),
            "tax": statistics.median(taxes),
            "taxes": taxes,
            "perplexity": knn_perplexity,
        }
    facts = {
        "entries": store.rows,
        "tokens": sum(len(window) - 1 for window in windows),
        "k": K,
        "nprobe": PROBES,
        "build_seconds": build_seconds,
        "lm_alone_seconds": statistics.median(alone),
        "lm_alone_perplexity": lm_perplexity,
        "kinds": kinds,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
