"""The cost of a datastore while generating: time per new token, attached against alone.

    python benchmarks/generation.py STORE TEXT… --k 1024

The same model generates greedily from the same prompts (the beginnings of the texts), alternately
without a datastore and with STORE attached (searched with its own index), in one process; one
sequence at a time and in a batch. Weights are fixed for each k, and learned if `knnlm tune` stored
any. Each ratio divides a run by the mean of the runs alone before and after it; reported are the
median over all repetitions, its standard error (by a bootstrap) and the quartiles.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import knnlm
from knnlm.index.report import describe_index
from knnlm.mixture.parameters import Parameters
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "generation.json"


def main() -> None:
    """Measure, print and write `benchmarks/results/generation.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--k", type=int, nargs="+", default=[1024, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()

    store = knnlm.Datastore(arguments.store)
    lm = store.load_model(device=arguments.device)
    prompts = []
    for document in knnlm.read_documents(*arguments.text):
        tokens = lm.encode(["".join(document.blocks())])[0][: arguments.prompt_tokens - 1]
        if len(tokens) == arguments.prompt_tokens - 1:
            prompts.append([lm.start_token, *tokens.tolist()])
    if len(prompts) < max(arguments.batch):
        parser.error(f"TEXT must contain {max(arguments.batch)} documents that are long enough")

    def seconds_per_step(batch: list[list[int]]) -> float:
        inputs = torch.tensor(batch, device=lm.device)
        started = time.perf_counter()
        output = lm.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            min_new_tokens=arguments.new_tokens,
            max_new_tokens=arguments.new_tokens,
            pad_token_id=lm.start_token,
        )
        seconds: float = time.perf_counter() - started
        assert output.shape[1] == inputs.shape[1] + arguments.new_tokens
        return seconds / int(arguments.new_tokens)

    learned = [None] if store.is_learned else []
    measured = []
    for size in arguments.batch:
        runs: dict[int | None, list[tuple[float, float]]] = {k: [] for k in arguments.k + learned}
        for repetition in range(arguments.repetitions + 1):
            first = repetition * size % (len(prompts) - size + 1)
            batch = prompts[first : first + size]
            before = seconds_per_step(batch)
            for k, of_setting in runs.items():
                with knnlm.attach(lm.model, store, k=k):
                    attached = seconds_per_step(batch)
                after = seconds_per_step(batch)
                if repetition > 0:  # the first compiles and reads the index into memory
                    of_setting.append(((before + after) / 2, attached))
                before = after
        for k, of_setting in runs.items():
            ratios = [attached / alone for alone, attached in of_setting]
            one = {
                "batch": size,
                "weights": "fixed" if k else "learned",
                "k": k or (store.parameters or Parameters()).k,
                "ratio": statistics.median(ratios),
                "ratio_error": error_of_median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "alone_milliseconds": statistics.median(alone for alone, _ in of_setting) * 1e3,
                "attached_milliseconds": statistics.median(own for _, own in of_setting) * 1e3,
            }
            measured.append(one)
            low, high = one["quartiles"]
            print(
                f"batch {size}, k {one['k']}, {one['weights']} weights: "
                f"{one['alone_milliseconds']:.2f} ms a step alone, "
                f"{one['attached_milliseconds']:.2f} attached: {one['ratio']:.3f}× "
                f"± {one['ratio_error']:.3f} ({low:.3f}–{high:.3f})",
                flush=True,
            )
    write_results(
        RESULTS,
        {
            "entries": len(store),
            "device": str(lm.device),
            "index": describe_index(store.catalog),
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "measured": measured,
        },
    )


def error_of_median(ratios: list[float]) -> float:
    """Return the standard error of the median, by a seeded bootstrap."""
    drawn = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    return float(np.median(drawn, axis=1).std(ddof=1))


if __name__ == "__main__":
    main()
