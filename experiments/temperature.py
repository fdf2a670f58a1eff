"""How fast votes fall with distance: temperature T from 0.1 to 1000.

    python experiments/temperature.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

The paper fixes T 1, whose effect depends on the scale of the keys, which differs between models.
Here each T has its best λ on validation text, at k 16, 128 and 1024.
"""

from collections.abc import Sequence

from experiment import Experiment
from measuring import measure, mixed, target_neighbors

from knnlm.mixture.parameters import Parameters
from knnlm.tuning.weights import fit_lmbdas

TEMPERATURES = [m * 10.0**e for e in range(-1, 3) for m in (1, 1.5, 2, 3, 5, 7)] + [1000.0]
KS = (16, 128, 1024)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each temperature."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    neighbors = target_neighbors(valid, experiment.voters(store, valid))
    test_neighbors = target_neighbors(test, experiment.voters(store, test))
    lm = measure(test, test.lm_log_probs)["perplexity"]
    curves: dict[str, list[dict[str, float]]] = {}
    for k in KS:
        points = curves[f"k {k}"] = []
        for temperature in TEMPERATURES:
            parameters = fit_lmbdas([neighbors], [Parameters(k, 0.25, temperature)])[0][0]
            numbers = measure(test, mixed(test_neighbors, parameters))
            points.append({"temperature": temperature, "lmbda": parameters.lmbda, **numbers})
        best = min(points, key=lambda point: point["perplexity"])
        print(f"k {k:5}: best T {best['temperature']:g}, perplexity {best['perplexity']:.4f}")
    experiment.write("temperature", {"entries": store.rows, "lm_perplexity": lm, "curves": curves})
    with experiment.picture("temperature", 2) as [left, right]:
        for curve, points in curves.items():
            temperatures = [point["temperature"] for point in points]
            left.plot(temperatures, [point["perplexity"] for point in points], "o-", label=curve)
            right.plot(temperatures, [point["lmbda"] for point in points], "o-", label=curve)
        left.axhline(lm, color="gray", linestyle="--", label="LM alone")
        left.axvline(1.0, color="gray", linewidth=0.8)
        left.set_ylabel("test perplexity")
        right.set_ylabel("best λ on validation text")
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_xlabel("temperature, T (squared distance)")


if __name__ == "__main__":
    main()
