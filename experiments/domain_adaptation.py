"""Domain adaptation: one language model with three exchangeable datastores.

    python experiments/domain_adaptation.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Table 4: an LM that never read Books, with a datastore of Books. Here the LM
is tuned on none of the three collections, and predicts each with each datastore, and with all
three at once. Validation text of the predicted collection tunes λ; also k and T ("tuned"), or a
small network that chooses the weights of each token ("learned").
Other collections: --domain NAME TRAIN VALID TEST, once for each.
"""

from collections.abc import Sequence
from typing import Any

from experiment import Experiment
from in_domain import learned
from measuring import component, measure, mixed, papers_recipe, percent, target_neighbors
from texts import Domain

from knnlm.mixture.interpolation import interpolate
from knnlm.model.language_model import LanguageModel
from knnlm.tuning.sweep import sweep
from knnlm.tuning.weights import fit_lmbdas

WAYS = ("tuned", "learned")
PAPER = {"lm": 34.84, "knn": 20.47, "change": 20.47 / 34.84 - 1, "lmbda": 0.65}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each collection with each datastore."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    domains = named_domains(experiment)
    results = adapt(experiment, domains)
    experiment.write("domain_adaptation", {"paper": PAPER, **results})
    with experiment.picture("domain_adaptation") as [panel]:
        draw(panel, domains, results["measured"])


def named_domains(experiment: Experiment) -> list[Domain]:
    """Return the collections that --domain names, or the default ones."""
    experiment.add_argument(
        "--domain", nargs=4, action="append", metavar=("NAME", "TRAIN", "VALID", "TEST")
    )
    given = experiment.arguments
    if not given.domain:
        return experiment.domains
    return [
        Domain(name, [train], [valid], [test], given.entries)
        for name, train, valid, test in given.domain
    ]


def adapt(
    experiment: Experiment, domains: Sequence[Domain], lm: LanguageModel | None = None
) -> dict[str, Any]:
    """Measure each collection with each datastore and with all at once; print the changes."""
    stores = [experiment.store(domain, lm) for domain in domains]
    measured = {}
    for domain in domains:
        valid, test = experiment.valid(domain, lm), experiment.test(domain, lm)
        voters = [experiment.voters(store, valid) for store in stores]
        test_voters = [experiment.voters(store, test) for store in stores]
        tuned_on = [target_neighbors(valid, of_store) for of_store in voters]
        tested_on = [target_neighbors(test, of_store) for of_store in test_voters]
        of_domain = {"LM": measure(test, test.lm_log_probs)}
        for number, other in enumerate(domains):
            valid_neighbors, test_neighbors = tuned_on[number], tested_on[number]
            recipe = papers_recipe(valid_neighbors)
            best = sweep(valid_neighbors).parameters
            gated = learned(valid, [voters[number]], test, [test_voters[number]], [best])[1]
            of_domain[f"+ {other.name}"] = {
                **measure(test, mixed(test_neighbors, recipe)),
                "lmbda": recipe.lmbda,
                "tuned": {
                    **measure(test, mixed(test_neighbors, best)),
                    "k": best.k,
                    "lmbda": best.lmbda,
                    "temperature": best.temperature,
                },
                "learned": measure(test, gated),
            }
        recipes = [papers_recipe(neighbors) for neighbors in tuned_on]
        recipes = list(fit_lmbdas(tuned_on, recipes)[0])
        components = [component(n, p) for n, p in zip(tested_on, recipes, strict=True)]
        of_domain["+ all"] = {
            **measure(test, interpolate(test.lm_log_probs, components)),
            "lmbdas": [parameters.lmbda for parameters in recipes],
        }
        measured[domain.name] = of_domain
        for name, numbers in of_domain.items():
            print(
                f"{domain.name:12} {name:14} {numbers['perplexity']:8.3f}"
                f" {percent(numbers['change'])}",
                *(f"{way} {percent(numbers[way]['change'])}" for way in WAYS if way in numbers),
            )
    entries = {d.name: s.rows for d, s in zip(domains, stores, strict=True)}
    return {"entries": entries, "measured": measured}


def draw(
    panel: Any, domains: Sequence[Domain], measured: dict[str, dict[str, dict[str, Any]]]
) -> None:
    """Draw the changes of each collection side by side, one bar per datastore."""
    columns = [*(f"+ {domain.name}" for domain in domains), "+ all"]
    for number, column in enumerate(columns):
        changes = [100 * measured[domain.name][column]["change"] for domain in domains]
        places = [place + 0.2 * (number - 1.5) for place in range(len(domains))]
        panel.bar(places, changes, width=0.18, label=f"datastore {column[2:]}")
    panel.set_xticks(range(len(domains)), [f"{domain.name} text" for domain in domains])
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_ylabel("change of perplexity, %")


if __name__ == "__main__":
    main()
