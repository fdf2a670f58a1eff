"""Another kind of text: Jane Austen's novels, two held out, the others remembered.

    python experiments/other_domain.py --model smollm2 --work /tmp/experiments

Khandelwal et al. 2020, Table 2 (Books). Otherwise as in_domain.py.
"""

from collections.abc import Sequence

from experiment import Experiment
from in_domain import run

PAPER = {"LM": 11.89, "+ kNN": 10.89}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the novels."""
    run(Experiment(__doc__, argv, domain="Austen"), "other_domain", PAPER)


if __name__ == "__main__":
    main()
