"""How the gain depends on the size: a datastore of 1/16, 1/8, 1/4, 1/2 and all of the text.

    python experiments/datastore_size.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Figure 2: with each doubling perplexity falls and the best λ rises, and
neither levels off at 3 billion entries. k 1024, T 1, λ tuned on validation text for each size; the
smaller datastores are the first documents of the largest. Also reported for each size: the distance
of the nearest neighbor, and how often it, or any of 1,024, is right.
"""

from collections.abc import Sequence
from typing import Any

from experiment import Experiment
from measuring import component, measure, mixed, papers_recipe, percent, target_neighbors
from texts import Domain
from torch import Tensor

PARTS = (16, 8, 4, 2, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each size of each collection's datastore."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    curves = {domain.name: measure_sizes(experiment, domain) for domain in experiment.domains}
    experiment.write("datastore_size", {"curves": curves})
    with experiment.picture("datastore_size", 2) as [left, right]:
        for name, points in curves.items():
            entries = [point["entries"] for point in points]
            left.plot(entries, [100 * point["change"] for point in points], "o-", label=name)
            right.plot(entries, [point["lmbda"] for point in points], "o-", label=name)
        left.set_ylabel("change of perplexity, %")
        right.set_ylabel("best λ on validation text")
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_xlabel("entries in the datastore")


def measure_sizes(experiment: Experiment, domain: Domain) -> list[dict[str, Any]]:
    """Measure the recipe with growing parts of a collection's datastore."""
    store = experiment.store(domain)
    valid, test = experiment.valid(domain), experiment.test(domain)
    points = []
    for part in PARTS:
        rows = store.rows // part
        kept = None if part == 1 else rows
        recipe = papers_recipe(target_neighbors(valid, experiment.voters(store, valid, kept)))
        neighbors = target_neighbors(test, experiment.voters(store, test, kept))
        votes = component(neighbors, recipe)
        point = {
            "entries": rows,
            "lmbda": recipe.lmbda,
            **measure(test, mixed(neighbors, recipe)),
            "median_nearest_squared_distance": median(neighbors.squared_distances[:, 0]),
            "true_token_is_nearest": mean(neighbors.votes[:, 0]),
            "true_token_among_neighbors": mean(neighbors.votes.any(dim=1)),
            "mean_p_knn": mean(votes.log_probs.exp()),
            "mean_p_lm": mean(test.lm_log_probs.exp()),
        }
        points.append(point)
        print(
            f"{domain.name:12} {rows:9,} entries  λ {recipe.lmbda:.3f}  {point['perplexity']:.4f}"
            f"  {percent(point['change'])}"
        )
    return points


def mean(values: Tensor) -> float:
    """Return the mean of numbers, or the share of true values."""
    return float(values.double().mean())


def median(values: Tensor) -> float:
    """Return the median."""
    return float(values.median())


if __name__ == "__main__":
    main()
