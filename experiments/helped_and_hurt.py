"""How many tokens a datastore helps, how many it hurts, and by how much.

    python experiments/helped_and_hurt.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Wang et al. (2023) find that a kNN-LM helps fewer than half of the tokens: the mean hides a few
large gains and many small losses. Compares fixed weights (the paper's recipe, and tuned k, λ, T)
with learned weights, also by the LM's confidence, and lists the tokens with the largest changes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from experiment import Experiment
from in_domain import learned
from jaxtyping import Float
from measuring import HeldOut, groups, measure, mixed, papers_recipe, target_neighbors
from torch import Tensor

from knnlm.evaluation.tally import HURT_NATS
from knnlm.model.language_model import LanguageModel
from knnlm.tuning.sweep import sweep

SURE = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
SHOWN = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Count helped and hurt tokens with each kind of weights."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    voters, test_voters = experiment.voters(store, valid), experiment.voters(store, test)
    neighbors, test_neighbors = target_neighbors(valid, voters), target_neighbors(test, test_voters)
    recipe, tuned = papers_recipe(neighbors), sweep(neighbors).parameters
    mixtures = {
        "the paper's recipe": mixed(test_neighbors, recipe),
        "tuned k, λ, T": mixed(test_neighbors, tuned),
        "learned weights": learned(valid, [voters], test, [test_voters], [tuned])[1],
    }
    lm_probs = test.lm_log_probs.exp()
    surety = {
        f"p_LM {low:g}–{high:g}": (lm_probs > low) & (lm_probs <= high)
        for low, high in pairwise(SURE)
    }
    results: dict[str, dict[str, Any]] = {}
    for name, log_probs in mixtures.items():
        change = log_probs - test.lm_log_probs
        results[name] = {
            **measure(test, log_probs),
            "helped": share(change > 0),
            "hurt": share(change < 0),
            "helped_by_0.1_nats": share(change > HURT_NATS),
            "hurt_by_0.1_nats": share(change < -HURT_NATS),
            "nats_gained": float(change.clamp_min(0).sum()) / len(test),
            "nats_lost": -float(change.clamp_max(0).sum()) / len(test),
            "worst_nats": -float(change.min()),
            "by_p_lm": groups(test, log_probs, surety),
            "most_helped": examples(experiment.lm, test, change.argsort(descending=True), change),
            "most_hurt": examples(experiment.lm, test, change.argsort(), change),
        }
        counted = results[name]
        print(
            f"{name:20} helped {counted['helped']:.1%}, hurt {counted['hurt']:.1%}; by ≥ 0.1 nats "
            f"{counted['helped_by_0.1_nats']:.1%} and {counted['hurt_by_0.1_nats']:.1%}; "
            f"{counted['nats_gained']:.4f} nats gained per token, {counted['nats_lost']:.4f} lost"
        )
    experiment.write("helped_and_hurt", {"entries": store.rows, "measured": results})
    with experiment.picture("helped_and_hurt", 2) as [left, right]:
        for name, log_probs in mixtures.items():
            change = (log_probs - test.lm_log_probs).sort().values
            left.plot(change.clamp(-2, 4), torch.linspace(0, 100, len(change)), label=name)
        left.axvline(0, color="gray", linewidth=0.8)
        left.axhline(50, color="gray", linewidth=0.8)
        left.set_xlabel("change of log p, nats")
        left.set_ylabel("tokens with at most this change, %")
        for of_mixture in results.values():
            of_groups = of_mixture["by_p_lm"]
            right.plot(
                list(of_groups), [100 * g["share_of_gain"] for g in of_groups.values()], "o-"
            )
        right.axhline(0, color="gray", linewidth=0.8)
        right.tick_params("x", rotation=20, labelsize=8)
        right.set_ylabel("share of the whole gain in nats, %")


def share(mask: Tensor) -> float:
    """Return the share of tokens in a mask."""
    return float(mask.double().mean())


def examples(
    lm: LanguageModel, held_out: HeldOut, order: Tensor, change: Float[Tensor, " token"]
) -> list[dict[str, Any]]:
    """Return the first tokens of an order: preceding text, token, p_LM, change in nats."""
    described = []
    for place in order[:SHOWN].tolist():
        before = held_out.targets[max(0, place - 12) : place]
        described.append(
            {
                "before": lm.decode(before),
                "token": lm.decode(held_out.targets[place : place + 1]),
                "p_lm": math.exp(float(held_out.lm_log_probs[place])),
                "nats": float(change[place]),
            }
        )
    return described


if __name__ == "__main__":
    main()
