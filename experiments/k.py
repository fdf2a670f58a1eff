"""How many neighbors: k from 1 to 1024.

    python experiments/k.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Figure 4: perplexity falls with each doubling up to k 1024, the largest k
they tried. Here with the paper's T 1, and with the best T for each k; λ and T are tuned on
validation text for each k.
"""

from collections.abc import Sequence
from dataclasses import asdict

from experiment import Experiment
from measuring import measure, mixed, target_neighbors

from knnlm.mixture.parameters import Parameters
from knnlm.tuning.sweep import sweep
from knnlm.tuning.weights import fit_lmbdas


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each k."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    neighbors = target_neighbors(valid, experiment.voters(store, valid))
    test_neighbors = target_neighbors(test, experiment.voters(store, test))

    curves: dict[str, list[dict[str, float]]] = {"T 1": [], "T tuned": []}
    for trial in sweep(neighbors).by_k:
        given = Parameters(trial.k, 0.25, 1.0)
        fixed = fit_lmbdas([neighbors], [given])[0][0]
        tuned = Parameters(trial.k, trial.lmbda, trial.temperature)
        for curve, parameters in (("T 1", fixed), ("T tuned", tuned)):
            numbers = measure(test, mixed(test_neighbors, parameters))
            curves[curve].append({**asdict(parameters), **numbers})
            print(f"k {trial.k:5}  {curve:8} {numbers['perplexity']:.4f}")
    lm = measure(test, test.lm_log_probs)["perplexity"]
    experiment.write("k", {"entries": store.rows, "lm_perplexity": lm, "curves": curves})
    with experiment.picture("k") as [panel]:
        for curve, points in curves.items():
            panel.plot(
                [p["k"] for p in points], [p["perplexity"] for p in points], "o-", label=curve
            )
        panel.axhline(lm, color="gray", linestyle="--", label="LM alone")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("neighbors, k")
        panel.set_ylabel("test perplexity")


if __name__ == "__main__":
    main()
