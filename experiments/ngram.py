"""Is it only memorization? An n-gram model of the same text in place of the neighbors.

    python experiments/ngram.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Figure 7: an n-gram model adds little to a Transformer, the neighbors much
more. Here n-grams of up to five tokens from the datastore's text, smoothed by interpolated
Kneser-Ney (one discount for each order, n1 / (n1 + 2 n2)).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from experiment import Experiment
from jaxtyping import Float
from measuring import HeldOut, component, measure, papers_recipe, percent, target_neighbors
from torch import Tensor

from knnlm.mixture.interpolation import TargetVotes, interpolate
from knnlm.tuning.weights import fit_weights, relative_probs

MAX_ORDER = 5

Gram = tuple[int, ...]


class KneserNey:
    """Interpolated Kneser-Ney over token ids.

    The highest order counts n-grams, lower orders count the distinct tokens that precede them. The
    unigrams' discount is spread evenly over the vocabulary.
    """

    def __init__(self, tokens: Sequence[int], vocab_size: int, max_order: int = MAX_ORDER) -> None:
        self.vocab_size = vocab_size
        self.counts: list[Counter[Gram]] = []  # counts of n-grams, by n − 1
        self.totals: list[dict[Gram, int]] = []  # sums of counts, by the tokens before the last one
        self.kinds: list[dict[Gram, int]] = []  # how many distinct tokens follow them
        self.discounts: list[float] = []
        for order in range(1, max_order + 1):
            grams = zip(*(tokens[start:] for start in range(order)), strict=False)
            counts = Counter(grams)
            if order < max_order:  # continuation counts: of distinct (n + 1)-grams
                longer = set(zip(*(tokens[start:] for start in range(order + 1)), strict=False))
                counts = Counter(gram[1:] for gram in longer)
            totals: dict[Gram, int] = defaultdict(int)
            kinds: dict[Gram, int] = defaultdict(int)
            for gram, count in counts.items():
                totals[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            of_counts = Counter(counts.values())
            once, twice = of_counts[1], of_counts[2]
            self.counts.append(counts)
            self.totals.append(totals)
            self.kinds.append(kinds)
            self.discounts.append(once / (once + 2 * twice) if once else 0.5)

    def prob(self, before: Gram, token: int) -> float:
        """Return p(token | before)."""
        probability = 1 / self.vocab_size
        for order, (counts, totals, kinds, discount) in enumerate(
            zip(self.counts, self.totals, self.kinds, self.discounts, strict=True)
        ):
            context = before[len(before) - order :]
            total = totals.get(context, 0)
            if len(context) < order or total == 0:
                break
            count = counts.get((*context, token), 0)
            left = discount * kinds[context] / total
            probability = max(count - discount, 0.0) / total + left * probability
        return probability

    def log_probs(self, held_out: HeldOut) -> Float[Tensor, " token"]:
        """Return log p of each token of a text, given the tokens before it."""
        first = int(held_out.inputs[0])
        tokens = [first, *held_out.targets.tolist()]
        return torch.tensor(
            [
                math.log(self.prob(tuple(tokens[max(0, i - MAX_ORDER + 1) : i]), tokens[i]))
                for i in range(1, len(tokens))
            ]
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the LM with n-grams, with neighbors, and with both."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    neighbors = target_neighbors(valid, experiment.voters(store, valid))
    test_neighbors = target_neighbors(test, experiment.voters(store, test))
    ngrams = KneserNey(store.values.tolist(), experiment.lm.vocab_size)

    recipe = papers_recipe(neighbors)
    # λ = 1 wherever a component is present; the fitted weights are multiplied with it
    of_ngrams = TargetVotes(ngrams.log_probs(valid), torch.ones(len(valid)))
    test_ngrams = TargetVotes(ngrams.log_probs(test), torch.ones(len(test)))
    alone = replace(recipe, lmbda=1.0)
    of_neighbors, test_knn = component(neighbors, alone), component(test_neighbors, alone)

    measured = {
        "LM": measure(test, test.lm_log_probs),
        "n-grams alone": measure(test, test_ngrams.log_probs),
    }
    for name, on_valid, on_test in [
        ("+ n-grams", [of_ngrams], [test_ngrams]),
        ("+ kNN", [of_neighbors], [test_knn]),
        ("+ kNN + n-grams", [of_neighbors, of_ngrams], [test_knn, test_ngrams]),
    ]:
        ratios = [relative_probs(c.log_probs, valid.lm_log_probs, c.lmbda > 0) for c in on_valid]
        weights = fit_weights(torch.stack(ratios, dim=1))
        weighted = [c._replace(lmbda=w * c.lmbda) for c, w in zip(on_test, weights, strict=True)]
        numbers = measure(test, interpolate(test.lm_log_probs, weighted))
        measured[name] = {"lmbdas": weights, **numbers}
    for name, numbers in measured.items():
        print(f"{name:18} {numbers['perplexity']:10.4f}  {percent(numbers['change'])}")
    experiment.write(
        "ngram",
        {"entries": store.rows, "order": MAX_ORDER, "discounts": ngrams.discounts}
        | {"measured": measured},
    )
    with experiment.picture("ngram") as [panel]:
        shown = [name for name in measured if name.startswith("+")]
        panel.barh(shown, [100 * measured[name]["change"] for name in shown], color="#c0392b")
        panel.invert_yaxis()
        panel.set_xlabel("change of perplexity, %")


if __name__ == "__main__":
    main()
