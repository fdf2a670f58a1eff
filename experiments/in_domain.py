r"""In domain: the LM, + kNN, + continuous cache, + both; fixed and learned weights.

    python experiments/in_domain.py --model smollm2 --work /tmp/experiments

Khandelwal et al. 2020, Table 1. The paper's recipe is k 1024, T 1 and a λ tuned on validation text;
"tuned" chooses k and T there too; "learned" lets a small network choose the weights of each token.
The cache (Grave et al. 2017) remembers the text that was read so far. With WikiText-103 and the
paper's protocol, where a hub and a GPU are at hand:

    python experiments/in_domain.py --model gpt2-large --work /tmp/wikitext --paper-protocol \
        --train hf:Salesforce/wikitext:wikitext-103-raw-v1:train \
        --valid hf:Salesforce/wikitext:wikitext-103-raw-v1:validation \
        --test hf:Salesforce/wikitext:wikitext-103-raw-v1:test \
        --valid-tokens 1000000 --test-tokens 1000000
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from experiment import Experiment
from jaxtyping import Float
from measuring import HeldOut, cached, component, measure, papers_recipe, percent
from torch import Tensor

from knnlm.mixture.continuous_cache import ContinuousCache, join_recalled
from knnlm.mixture.features import Source, Voters
from knnlm.mixture.gate_training import fit_gate, make_examples
from knnlm.mixture.interpolation import interpolate
from knnlm.mixture.parameters import Parameters
from knnlm.tuning import fit_lmbdas, sweep

PAPER = {"LM": 18.65, "+ kNN": 16.12, "+ cache": 18.27, "+ kNN + cache": 15.79}
CACHE_SIZES = (256, 1024, 4096)
CACHE_K = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the main collection, Python's library reference."""
    experiment = Experiment(__doc__, argv)
    run(experiment, "in_domain", PAPER)


def run(experiment: Experiment, name: str, paper: dict[str, float]) -> None:
    """Measure every mixture on an experiment's collection, and write the results."""
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    voters, test_voters = experiment.voters(store, valid), experiment.voters(store, test)
    neighbors, test_neighbors = cached(valid, voters), cached(test, test_voters)

    caches = {size: cached(valid, remember(valid, size)) for size in CACHE_SIZES}
    cache_sweeps = {size: sweep(caches[size]) for size in CACHE_SIZES}
    size = min(CACHE_SIZES, key=lambda size: cache_sweeps[size].knn_perplexity)
    cache, cache_alone = caches[size], cache_sweeps[size].parameters
    test_remembered = remember(test, size)
    test_cache = cached(test, test_remembered)

    recipe, tuned = papers_recipe(neighbors), sweep(neighbors).parameters
    both = fit_lmbdas([neighbors, cache], [recipe, cache_alone])[0]
    tuned_both = fit_lmbdas([neighbors, cache], [tuned, cache_alone])[0]
    settings = {
        "+ kNN": [(test_neighbors, recipe)],
        "+ cache": [(test_cache, cache_alone)],
        "+ kNN + cache": [(test_neighbors, both[0]), (test_cache, both[1])],
        "+ kNN, tuned": [(test_neighbors, tuned)],
        "+ kNN + cache, tuned": [(test_neighbors, tuned_both[0]), (test_cache, tuned_both[1])],
    }
    measured: dict[str, dict[str, Any]] = {"LM": measure(test, test.lm_log_probs)}
    for setting, parts in settings.items():
        log_probs = interpolate(test.lm_log_probs, [component(*part) for part in parts])
        measured[setting] = {
            **measure(test, log_probs),
            "parameters": [asdict(parameters) for _, parameters in parts],
        }
    remembered = remember(valid, size)
    for setting, of_valid, of_test, parameters in [
        ("+ kNN, learned", [voters], [test_voters], [tuned]),
        (
            "+ kNN + cache, learned",
            [voters, remembered],
            [test_voters, test_remembered],
            [tuned, cache_alone],
        ),
    ]:
        log_probs = learned(valid, of_valid, test, of_test, parameters)
        measured[setting] = measure(test, log_probs)

    for setting, numbers in measured.items():
        of_paper = percent(paper[setting] / paper["LM"] - 1) if setting in paper else ""
        print(
            f"{setting:24} {numbers['perplexity']:8.4f} {percent(numbers['change']):>8}"
            f"   paper {of_paper}"
        )
    experiment.write(
        name,
        {"paper": paper, "entries": store.rows, "cache_size": size, "measured": measured},
    )
    with experiment.picture(name) as [panel]:
        shown = [setting for setting in measured if setting != "LM"]
        changes = [100 * measured[setting]["change"] for setting in shown]
        intervals = [[100 * bound for bound in measured[s]["change_interval"]] for s in shown]
        spread = [
            [change - low for change, (low, _) in zip(changes, intervals, strict=True)],
            [high - change for change, (_, high) in zip(changes, intervals, strict=True)],
        ]
        panel.barh(shown, changes, xerr=spread, color="#c0392b", ecolor="#5d6d7e", label="here")
        of_paper_shown = [s for s in shown if s in paper]
        panel.plot(
            [100 * (paper[s] / paper["LM"] - 1) for s in of_paper_shown],
            of_paper_shown,
            "D",
            color="#1b4f72",
            label="the paper",
        )
        panel.invert_yaxis()
        panel.set_xlabel("change of perplexity, %")


def remember(held_out: HeldOut, size: int) -> Voters:
    """Return the most similar of the last `size` pairs before each token."""
    cache = ContinuousCache(size, held_out.keys.shape[1])
    parts = []
    columns = torch.split(held_out.inputs, 1024), torch.split(held_out.keys, 1024)
    for inputs, keys in zip(*columns, strict=True):
        parts.append(cache.recall(inputs.long()[None], keys[None]).nearest(CACHE_K))
    recalled = join_recalled(parts)
    return recalled.voters


def learned(
    valid: HeldOut,
    voters: Sequence[Voters],
    test: HeldOut,
    test_voters: Sequence[Voters],
    parameters: Sequence[Parameters],
) -> Float[Tensor, " token"]:
    """Fit a gate to validation text; return what it gives to the test text's tokens."""
    sources = [Source(p.k, p.temperature) for p in parameters]
    voters = [nearest(v, s.k) for v, s in zip(voters, sources, strict=True)]
    test_voters = [nearest(v, s.k) for v, s in zip(test_voters, sources, strict=True)]
    examples = make_examples(sources, valid.lm, valid.lm_log_probs, voters, valid.targets)
    gate = fit_gate(sources, examples).gate
    with torch.no_grad():
        votes = gate(test.lm, test_voters)
    return interpolate(test.lm_log_probs, [one.for_targets(test.targets) for one in votes])


def nearest(voters: Voters, k: int) -> Voters:
    """Return the k nearest of each query."""
    return Voters(voters.squared_distances[:, :k], voters.tokens[:, :k])


if __name__ == "__main__":
    main()
