"""The weight of the neighbors: λ from 0 to 0.95, in and out of domain.

    python experiments/lmbda.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Figure 5: the best λ is 0.25 in domain and 0.65 under domain adaptation.
Here three collections, each with its own datastore and with the other two; k 1024, T 1.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiment import Experiment
from measuring import PAPERS_RECIPE, component, perplexity, target_neighbors

from knnlm.mixture.interpolation import interpolate

PAPER = {"best in domain": 0.25, "best under domain adaptation": 0.65}
LMBDAS = [step / 20 for step in range(20)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each λ for each pair of text and datastore."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    domains = experiment.domains
    curves: dict[str, dict[str, list[float]]] = {}
    for domain in domains:
        test = experiment.test(domain)
        curves[domain.name] = {}
        for other in domains:
            neighbors = target_neighbors(test, experiment.voters(experiment.store(other), test))
            votes = component(neighbors, replace(PAPERS_RECIPE, lmbda=1.0))
            curves[domain.name][other.name] = [
                perplexity(
                    interpolate(test.lm_log_probs, [votes._replace(lmbda=lmbda * votes.lmbda)])
                )
                for lmbda in LMBDAS
            ]
    best = {
        domain: {
            other: LMBDAS[min(range(len(curve)), key=curve.__getitem__)]
            for other, curve in of_domain.items()
        }
        for domain, of_domain in curves.items()
    }
    for domain_name, of_others in best.items():
        print(f"{domain_name} text: best λ by datastore {of_others}")
    experiment.write("lmbda", {"paper": PAPER, "lmbdas": LMBDAS, "curves": curves, "best": best})
    with experiment.picture("lmbda", len(domains)) as panels:
        for panel, (domain_name, of_domain) in zip(panels, curves.items(), strict=True):
            for other_name, curve in of_domain.items():
                style = "o-" if other_name == domain_name else "--"
                changes = [100 * (p / curve[0] - 1) for p in curve]
                panel.plot(LMBDAS, changes, style, markersize=3, label=f"datastore {other_name}")
            panel.axhline(0, color="gray", linewidth=0.8)
            panel.set_ylim(-45, 60)
            panel.set_title(f"{domain_name} text", fontsize=10)
            panel.set_xlabel("interpolation weight, λ")
        panels[0].set_ylabel("change of perplexity, %")


if __name__ == "__main__":
    main()
