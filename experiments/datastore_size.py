"""How much is remembered: a datastore of 1/16, 1/8, 1/4, 1/2 and all of the text.

    python experiments/datastore_size.py --model smollm2 --work /tmp/experiments

Khandelwal et al. 2020, Figure 2: perplexity falls and the best λ rises with each doubling, and does
not level off at 3 billion entries. k 1024, T 1, λ tuned on validation text for each size; the
smaller datastores are the first documents of the largest.
"""

from collections.abc import Sequence

from experiment import Experiment
from measuring import cached, measure, mixed, papers_recipe, percent

PARTS = (16, 8, 4, 2, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each size."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    points = []
    for part in PARTS:
        rows = store.rows // part
        kept = None if part == 1 else rows
        recipe = papers_recipe(cached(valid, experiment.voters(store, valid, kept)))
        neighbors = cached(test, experiment.voters(store, test, kept))
        numbers = measure(test, mixed(neighbors, recipe))
        nearest = float(neighbors.squared_distances[:, 0].median())
        found = float(neighbors.votes.any(dim=1).float().mean())
        points.append(
            {
                "entries": rows,
                "lmbda": recipe.lmbda,
                **numbers,
                "median_nearest_squared_distance": nearest,
                "true_token_among_neighbors": found,
            }
        )
        print(
            f"{rows:9,} entries  λ {recipe.lmbda:.3f}  {numbers['perplexity']:.4f}"
            f"  {percent(numbers['change'])}"
        )
    lm = measure(test, test.lm_log_probs)["perplexity"]
    experiment.write("datastore_size", {"lm_perplexity": lm, "points": points})
    with experiment.picture("datastore_size", 2) as [left, right]:
        entries = [point["entries"] for point in points]
        left.plot(entries, [point["perplexity"] for point in points], "o-", label="LM + kNN")
        left.axhline(lm, color="gray", linestyle="--", label="LM alone")
        left.set_ylabel("test perplexity")
        right.plot(entries, [point["lmbda"] for point in points], "o-")
        right.set_ylabel("best λ on validation text")
        for panel in (left, right):
            panel.set_xscale("log", base=2)
            panel.set_xticks(entries, [f"{count:,}" for count in entries], fontsize=8)
            panel.set_xlabel("entries in the datastore")


if __name__ == "__main__":
    main()
