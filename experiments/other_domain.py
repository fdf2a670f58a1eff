"""Other kinds of text: Jane Austen's novels (two held out) and PostgreSQL's manual.

    python experiments/other_domain.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Table 2 (Books). Otherwise the same as in_domain.py.
"""

from collections.abc import Sequence

from experiment import Experiment
from in_domain import draw, every_mixture

PAPER = {"LM": 11.89, "+ kNN": 10.89}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each collection with its own datastore."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    domains = [domain for domain in experiment.domains if domain.name != "Python"]
    results = {domain.name: every_mixture(experiment, domain, PAPER) for domain in domains}
    experiment.write("other_domain", {"paper": PAPER, "domains": results})
    with experiment.picture("other_domain", len(domains)) as panels:
        for panel, (name, of_domain) in zip(panels, results.items(), strict=True):
            draw(panel, of_domain["measured"], PAPER)
            panel.set_title(name)


if __name__ == "__main__":
    main()
