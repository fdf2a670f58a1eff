r"""In domain: the LM, + kNN, + continuous cache, + both; fixed and learned weights.

    python experiments/in_domain.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Table 1. The paper's recipe is k 1024, T 1 and a λ tuned on validation text;
"tuned" also tunes k and T; "learned" lets a small network choose the weights of each token. The
cache (Grave et al. 2017) remembers the text read so far. With WikiText-103 and the paper's
protocol, given access to the Hugging Face hub and a GPU:

    python experiments/in_domain.py --model gpt2-large --work /tmp/wikitext --paper-protocol \
        --train hf:Salesforce/wikitext:wikitext-103-raw-v1:train \
        --valid hf:Salesforce/wikitext:wikitext-103-raw-v1:validation \
        --test hf:Salesforce/wikitext:wikitext-103-raw-v1:test \
        --valid-tokens 1000000 --test-tokens 1000000
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment
from jaxtyping import Float
from measuring import (
    HeldOut,
    component,
    frequencies,
    groups,
    measure,
    papers_recipe,
    percent,
    perplexity,
    target_neighbors,
)
from texts import Domain
from torch import Tensor

from knnlm.evaluation.tally import share_hurt
from knnlm.mixture.continuous_cache import ContinuousCache, join_cache_neighbors
from knnlm.mixture.features import GateInput
from knnlm.mixture.interpolation import Voters, interpolate
from knnlm.mixture.parameters import Parameters
from knnlm.tuning.gate_training import fit_gate, make_examples
from knnlm.tuning.held_out import TargetNeighbors
from knnlm.tuning.sweep import sweep
from knnlm.tuning.weights import fit_lmbdas

PAPER = {"LM": 18.65, "+ kNN": 16.12, "+ cache": 18.27, "+ kNN + cache": 15.79}
FIRST_TOKENS = 8_192
CACHE_SIZES = (256, 1024, 4096)
CACHE_K = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the main collection, Python's library reference."""
    experiment = Experiment(__doc__, argv)
    results = every_mixture(experiment, experiment.domain, PAPER)
    experiment.write("in_domain", {"paper": PAPER, **results})
    with experiment.picture("in_domain") as [panel]:
        draw(panel, results["measured"], PAPER)


def every_mixture(
    experiment: Experiment, domain: Domain, paper: dict[str, float]
) -> dict[str, Any]:
    """Measure every mixture on a collection; print the results next to the paper's.

    chosen: the best mixture on validation text, where gates predict only tokens that they were not
    trained on, as in `knnlm tune`. first: perplexity of the first tokens, as in reference.py.
    """
    store = experiment.store(domain)
    valid, test = experiment.valid(domain), experiment.test(domain)
    remembered = {size: remember(valid, size) for size in CACHE_SIZES}
    of_sizes = {size: sweep(target_neighbors(valid, remembered[size])) for size in CACHE_SIZES}
    size = min(CACHE_SIZES, key=lambda size: of_sizes[size].knn_perplexity)
    voters = {"kNN": experiment.voters(store, valid), "cache": remembered[size]}
    test_voters = {"kNN": experiment.voters(store, test), "cache": remember(test, size)}
    neighbors = {source: target_neighbors(valid, found) for source, found in voters.items()}
    test_neighbors = {
        source: target_neighbors(test, found) for source, found in test_voters.items()
    }

    recipe, cache = papers_recipe(neighbors["kNN"]), of_sizes[size].parameters
    tuned = sweep(neighbors["kNN"]).parameters
    both = fit_lmbdas(list(neighbors.values()), [recipe, cache])[0]
    tuned_both = fit_lmbdas(list(neighbors.values()), [tuned, cache])[0]
    fixed = {
        "+ kNN": {"kNN": recipe},
        "+ cache": {"cache": cache},
        "+ kNN + cache": {"kNN": both[0], "cache": both[1]},
        "+ kNN, tuned": {"kNN": tuned},
        "+ kNN + cache, tuned": {"kNN": tuned_both[0], "cache": tuned_both[1]},
    }
    gated = {
        "+ kNN, learned": {"kNN": tuned},
        "+ kNN + cache, learned": {"kNN": tuned, "cache": cache},
    }
    on_valid = {"LM": perplexity(valid.lm_log_probs)}
    on_test = {"LM": test.lm_log_probs}
    chosen_parameters = {}
    for setting, parameters in fixed.items():
        components = [component(neighbors[source], p) for source, p in parameters.items()]
        on_valid[setting] = perplexity(interpolate(valid.lm_log_probs, components))
        components = [component(test_neighbors[source], p) for source, p in parameters.items()]
        on_test[setting] = interpolate(test.lm_log_probs, components)
        chosen_parameters[setting] = {"parameters": [asdict(p) for p in parameters.values()]}
    for setting, parameters in gated.items():
        held_out, on_test[setting] = learned(
            valid,
            [voters[source] for source in parameters],
            test,
            [test_voters[source] for source in parameters],
            list(parameters.values()),
        )
        on_valid[setting] = perplexity(held_out)
    chosen = min(on_valid, key=on_valid.__getitem__)
    measured = {
        setting: {
            **measure(test, log_probs),
            "valid_perplexity": on_valid[setting],
            "first": perplexity(log_probs[:FIRST_TOKENS]),
            "hurt": share_hurt(log_probs, test.lm_log_probs),
            **chosen_parameters.get(setting, {}),
        }
        for setting, log_probs in on_test.items()
    }

    print(f"{domain.name}, {store.rows:,} entries")
    for setting, numbers in measured.items():
        of_paper = percent(paper[setting] / paper["LM"] - 1) if setting in paper else ""
        print(
            f"{setting:24} {numbers['perplexity']:8.4f} {percent(numbers['change']):>8}"
            f"   first {FIRST_TOKENS:,}: {numbers['first']:8.4f}"
            f"   paper {of_paper:8}{' chosen' if setting == chosen else ''}"
        )
    return {
        "entries": store.rows,
        "cache_size": size,
        "chosen": chosen,
        "measured": measured,
        "recipe": recipe_details(experiment, domain, test, test_neighbors["kNN"], recipe),
    }


def recipe_details(
    experiment: Experiment,
    domain: Domain,
    test: HeldOut,
    neighbors: TargetNeighbors,
    recipe: Parameters,
) -> dict[str, Any]:
    """Return the quality of the neighbors under the paper's recipe, and which tokens gain."""
    names = [Path(document.name).name for document in experiment.documents(domain.test)]
    knn = component(neighbors, recipe)
    log_probs = interpolate(test.lm_log_probs, [knn])
    return {
        "nearest_is_right": float(neighbors.votes[:, 0].double().mean()),
        "mean_p_knn": float(knn.log_probs.double().exp().mean()),
        "mean_p_lm": float(test.lm_log_probs.double().exp().mean()),
        "by_frequency": groups(test, log_probs, frequencies(experiment.store(domain), test)),
        "by_document": groups(
            test,
            log_probs,
            {names[number]: test.documents == number for number in set(test.documents.tolist())},
        ),
    }


def draw(panel: Any, measured: dict[str, dict[str, Any]], paper: dict[str, float]) -> None:
    """Draw every change from the LM alone, next to the paper's."""
    shown = [setting for setting in measured if setting != "LM"]
    changes = [100 * measured[setting]["change"] for setting in shown]
    intervals = [[100 * bound for bound in measured[s]["change_interval"]] for s in shown]
    spread = [
        [change - low for change, (low, _) in zip(changes, intervals, strict=True)],
        [high - change for change, (_, high) in zip(changes, intervals, strict=True)],
    ]
    panel.barh(shown, changes, xerr=spread, color="#c0392b", ecolor="#5d6d7e", label="here")
    of_paper = [s for s in shown if s in paper]
    panel.plot(
        [100 * (paper[s] / paper["LM"] - 1) for s in of_paper],
        of_paper,
        "D",
        color="#1b4f72",
        label="the paper",
    )
    panel.invert_yaxis()
    panel.set_xlabel("change of perplexity, %")


def remember(held_out: HeldOut, size: int) -> Voters:
    """Return the most similar pairs among the last `size` before each token."""
    cache = ContinuousCache(size, held_out.keys.shape[1])
    parts = []
    columns = torch.split(held_out.inputs, 1024), torch.split(held_out.keys, 1024)
    for inputs, keys in zip(*columns, strict=True):
        parts.append(cache.read(inputs.long()[None], keys[None]).nearest(CACHE_K))
    cache_neighbors = join_cache_neighbors(parts)
    return cache_neighbors.voters


def learned(
    valid: HeldOut,
    voters: Sequence[Voters],
    test: HeldOut,
    test_voters: Sequence[Voters],
    parameters: Sequence[Parameters],
) -> tuple[Float[Tensor, " token"], Float[Tensor, " test_token"]]:
    """Fit a gate to validation text; return log p of that text's tokens and of the test text's.

    Each block of validation text is predicted by networks trained on the other blocks.
    """
    inputs = [GateInput(p.k, p.temperature) for p in parameters]
    voters = [own.nearest(p.k) for own, p in zip(voters, parameters, strict=True)]
    test_voters = [own.nearest(p.k) for own, p in zip(test_voters, parameters, strict=True)]
    examples = make_examples(inputs, valid.lm, valid.lm_log_probs, voters, valid.targets)
    gate, held_out_log_probs = fit_gate(inputs, examples)
    votes = gate(test.lm, test_voters)
    components = [one.for_targets(test.targets) for one in votes]
    return held_out_log_probs, interpolate(test.lm_log_probs, components)


if __name__ == "__main__":
    main()
