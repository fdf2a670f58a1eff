"""How long a sweep over k × λ × T takes on 10,000 queries, once the neighbors are found.

    python experiments/sweep.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

The queries are validation and test text together (this measures time, it does not tune). Draws the
best perplexity for each pair of k and T.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from experiment import Experiment
from measuring import mixed, perplexity, target_neighbors

from knnlm.mixture.parameters import Parameters
from knnlm.tuning.held_out import TargetNeighbors
from knnlm.tuning.sweep import sweep as sweep_neighbors
from knnlm.tuning.weights import fit_lmbdas

QUERIES = 10_000
TEMPERATURES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Time the sweep of `knnlm tune`."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    texts = [experiment.valid(), experiment.test()]
    parts = [target_neighbors(text, experiment.voters(store, text)) for text in texts]
    neighbors = TargetNeighbors(
        torch.cat([part.lm_log_probs for part in parts])[:QUERIES],
        torch.cat([part.squared_distances for part in parts])[:QUERIES],
        torch.cat([part.votes for part in parts])[:QUERIES],
    )
    started = time.perf_counter()
    swept = sweep_neighbors(neighbors)
    seconds = time.perf_counter() - started
    print(f"{swept.tokens:,} queries, k ≤ {max(t.k for t in swept.by_k)}: {seconds:.2f} s")
    surface = {
        str(trial.k): [
            perplexity(mixed(neighbors, fit_lmbdas([neighbors], [given])[0][0]))
            for given in (Parameters(trial.k, 0.25, temperature) for temperature in TEMPERATURES)
        ]
        for trial in swept.by_k
    }
    experiment.write(
        "sweep",
        {
            "queries": swept.tokens,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "best": asdict(swept.parameters),
            "temperatures": TEMPERATURES,
            "perplexity_by_k": surface,
        },
    )
    with experiment.picture("sweep") as [panel]:
        for column, temperature in enumerate(TEMPERATURES):
            by_k = [of_k[column] for of_k in surface.values()]
            panel.plot(list(map(int, surface)), by_k, "o-", label=f"T {temperature:g}")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("neighbors, k")
        panel.set_ylabel("perplexity at the best λ")


if __name__ == "__main__":
    main()
