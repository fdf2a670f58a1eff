r"""Tuning on the datastore's own text, next to tuning on text that was held out for it.

    python experiments/self_tuning.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Not in the paper, which tunes on validation text. "held out" reads `--valid-tokens` of validation
text, "stored" as many tokens of the datastore's own, each document without its own votes, "both"
these two, "build" what `knnlm build` reads, and "tune" what `knnlm tune` reads. Learned weights,
unless a gate loses, without and with the continuous cache.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiment import MAX_K, Experiment
from in_domain import remember
from jaxtyping import Float
from measuring import HeldOut, component, measure, percent, target_neighbors
from texts import Domain
from torch import Tensor

import knnlm
from knnlm.evaluation.tally import share_hurt
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.interpolation import Voters, interpolate
from knnlm.mixture.parameters import Parameters
from knnlm.tuning.stored_text import DEFAULT_TOKENS
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
        "tune": {"stored": True, "max_tokens": DEFAULT_TOKENS},
    }
    measured: dict[str, Any] = {"LM": measure(test, test.lm_log_probs)}
    for way, options in ways.items():
        held_out = {}
        if way in ("held out", "both"):
            valid = experiment.documents(domain.valid)
            held_out = {"documents": valid, "windowing": experiment.scored}
        options = {"max_tokens": tokens, "max_k": MAX_K, **options, **held_out}
        tuning = tune(model, **options, progress=experiment.progress)
        for name, log_probs in predicted(tuning, test, voters).items():
            numbers = {**measure(test, log_probs), "hurt": share_hurt(log_probs, test.lm_log_probs)}
            measured[way + name] = numbers | ({} if name else {"tuning": tuning.to_dict()})
            from_held_out = numbers["perplexity"] / measured["held out" + name]["perplexity"] - 1
            print(
                f"{domain.name:12} {way + name:18} {tuning.tokens:7,} tokens  "
                f"{numbers['perplexity']:8.4f} {percent(numbers['change']):>8}   from held out "
                f"{percent(from_held_out):>8}   hurt {numbers['hurt']:.1%}"
            )
    return measured


def predicted(tuning: Tuning, test: HeldOut, voters: Voters) -> dict[str, Float[Tensor, " token"]]:
    """Return log p of the test text's tokens under what was tuned, without and with the cache."""
    (parameters,), mixture = tuning.parameters, tuning.mixture
    nearest, cached = voters.nearest(parameters.k), remember(test, mixture.cache.size)
    with_cache = [replace(parameters, lmbda=mixture.lmbdas[0]), mixture.cache.votes]
    return {
        "": mix(mixture.gate, test, [nearest], [parameters]),
        " + cache": mix(mixture.cache_gate, test, [nearest, cached], with_cache),
    }


def mix(
    gate: LearnedGate | None,
    test: HeldOut,
    voters: Sequence[Voters],
    parameters: Sequence[Parameters],
) -> Float[Tensor, " token"]:
    """Return log p of the test text's tokens, with fixed weights where there is no gate."""
    if gate is not None:
        components = [votes.for_targets(test.targets) for votes in gate(test.lm, voters)]
    else:
        components = [
            component(target_neighbors(test, own), fixed)
            for own, fixed in zip(voters, parameters, strict=True)
        ]
    return interpolate(test.lm_log_probs, components)


def draw(panel: Any, measured: dict[str, dict[str, Any]]) -> None:
    """Draw each tuning's change of perplexity from the LM alone."""
    ways = [way for way in measured if way != "LM"]
    panel.barh(ways, [100 * measured[way]["change"] for way in ways], color="#c0392b")
    panel.invert_yaxis()
    panel.set_xlabel("change of perplexity, %")


if __name__ == "__main__":
    main()
