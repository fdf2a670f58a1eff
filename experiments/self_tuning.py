r"""Tuning on the datastore's own text, next to tuning on text that was held out for it.

    python experiments/self_tuning.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Not in the paper, which tunes on validation text. "held out" reads `--valid-tokens` of validation
text, "stored" as many tokens of the datastore's own, each document without its own votes, "build"
what `knnlm build` reads, and "both" the first two. Learned weights, unless a gate loses.
"""

from collections.abc import Sequence
from typing import Any

from experiment import MAX_K, Experiment
from jaxtyping import Float
from measuring import HeldOut, measure, mixed, percent, target_neighbors
from texts import Domain
from torch import Tensor

import knnlm
from knnlm.evaluation.tally import share_hurt
from knnlm.mixture.interpolation import Voters, interpolate
from knnlm.tuning.tune import Tuning, tune
from knnlm.tuning.upkeep import tokens_to_tune_on


def main(argv: Sequence[str] | None = None) -> None:
    """Tune each collection in every way, and measure each on its test text."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    results = {domain.name: every_tuning(experiment, domain) for domain in experiment.domains}
    experiment.write("self_tuning", {"domains": results})
    with experiment.picture("self_tuning", len(results)) as panels:
        for panel, (name, measured) in zip(panels, results.items(), strict=True):
            draw(panel, measured)
            panel.set_title(name)


def every_tuning(experiment: Experiment, domain: Domain) -> dict[str, Any]:
    """Return what each tuning gives the test text, and what it was tuned on."""
    store, test = experiment.store(domain), experiment.test(domain)
    voters = experiment.voters(store, test)
    model = knnlm.KNNLM(experiment.lm, store)
    tokens = experiment.arguments.valid_tokens
    ways: dict[str, dict[str, Any]] = {
        "held out": {"stored": False},
        "stored": {"stored": True},
        "both": {"stored": True},
        "build": {"stored": True, "max_tokens": tokens_to_tune_on(len(store))},
    }
    measured: dict[str, Any] = {"LM": measure(test, test.lm_log_probs)}
    for way, options in ways.items():
        held_out = {}
        if way in ("held out", "both"):
            valid = experiment.documents(domain.valid)
            held_out = {"documents": valid, "windowing": experiment.scored}
        options = {"max_tokens": tokens, "max_k": MAX_K, **options, **held_out}
        tuning = tune(model, **options, progress=experiment.progress)
        log_probs = predicted(tuning, test, voters)
        measured[way] = {
            **measure(test, log_probs),
            "hurt": share_hurt(log_probs, test.lm_log_probs),
            "tuning": tuning.to_dict(),
        }
        perplexity = measured[way]["perplexity"]
        from_held_out = percent(perplexity / measured["held out"]["perplexity"] - 1)
        print(
            f"{domain.name:12} {way:10} {tuning.tokens:7,} tokens  {perplexity:8.4f} "
            f"{percent(measured[way]['change']):>8}   from held out {from_held_out:>8}"
        )
    return measured


def predicted(tuning: Tuning, test: HeldOut, voters: Voters) -> Float[Tensor, " token"]:
    """Return log p of the test text's tokens under what was tuned."""
    (parameters,) = tuning.parameters
    gate = tuning.mixture.gate
    if gate is None:
        return mixed(target_neighbors(test, voters), parameters)
    (votes,) = gate(test.lm, [voters.nearest(parameters.k)])
    return interpolate(test.lm_log_probs, [votes.for_targets(test.targets)])


def draw(panel: Any, measured: dict[str, dict[str, Any]]) -> None:
    """Draw each tuning's change of perplexity from the LM alone."""
    ways = [way for way in measured if way != "LM"]
    panel.barh(ways, [100 * measured[way]["change"] for way in ways], color="#c0392b")
    panel.invert_yaxis()
    panel.set_xlabel("change of perplexity, %")


if __name__ == "__main__":
    main()
