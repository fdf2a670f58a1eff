r"""Searches saved: pointers instead of a search (RetoMaton), and searches that are skipped.

    python experiments/saved_searches.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Alon et al. 2022 (RetoMaton) save 81 % of the searches at the kNN-LM's own perplexity, by following
what came after the last neighbors, and clusters of entries near that. He et al. 2021 skip half of
them, where a network that sees the language model expects little. Here pointers have no clusters.
k 1024, T and λ tuned on validation text, as is the gate; perplexity against the share of tokens
without a search, where a gate skips, where pointers are followed, and where both do.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from experiment import Experiment
from jaxtyping import Float
from measuring import HeldOut, measure, mixed, percent, target_neighbors
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.protocol import Neighbors
from knnlm.mixture.interpolation import Voters
from knnlm.mixture.parameters import Parameters
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever
from knnlm.retrieval.saved_searches import SavingRule, Walks
from knnlm.tuning.search_gate import fit_search_gate
from knnlm.tuning.sweep import sweep

SKIPPED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LEAST = (4, 16, 64, 256)
SKIPPED_TOO = (0.5, 0.6, 0.65, 0.7)
LEAST_OF_BOTH = 64
PAPERS = {"RetoMaton": 0.81, "He et al.": 0.5}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every rule."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    neighbors = target_neighbors(valid, experiment.voters(store, valid))
    best = max(sweep(neighbors).by_k, key=lambda trial: trial.k)
    parameters = Parameters(best.k, best.lmbda, best.temperature)
    gains = mixed(neighbors, parameters) - valid.lm_log_probs
    gate = fit_search_gate(valid.lm, valid.keys, gains)

    found = experiment.neighbors(store, test)
    always = measure(test, log_probs(store, test, found, parameters))
    rules = {"skipped": [SavingRule(None, gate, gate.least_gain(share)) for share in SKIPPED]}
    rules["pointers"] = [SavingRule(least) for least in LEAST]
    rules["both"] = [SavingRule(LEAST_OF_BOTH, gate, gate.least_gain(s)) for s in SKIPPED_TOO]
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, tried in rules.items():
        curves[name] = []
        for rule in tried:
            few, saved = walked(store, test, found, rule, parameters)
            numbers = measure(test, log_probs(store, test, few, parameters))
            change = numbers["perplexity"] / always["perplexity"] - 1
            settings = {"pointers": rule.pointers, "least_gain": rule.least_gain, "saved": saved}
            curves[name].append({**settings, "change_from_always": change, **numbers})
            print(f"{name:9} saved {saved:.3f}  {numbers['perplexity']:.4f}  {percent(change)}")
    lm = measure(test, test.lm_log_probs)
    results = {"entries": store.rows, "papers": PAPERS, "parameters": asdict(parameters)}
    experiment.write(
        "saved_searches", {**results, "lm": lm, "searching_always": always, "curves": curves}
    )
    with experiment.picture("saved_searches") as [panel]:
        draw(panel, curves, always["perplexity"])


def walked(
    store: Datastore, text: HeldOut, found: Neighbors, rule: SavingRule, parameters: Parameters
) -> tuple[Neighbors, float]:
    """Return the neighbors of each token where a rule saves searches, and the share it saves."""
    mixer = Mixer((Retriever(store, NoIndex(), parameters),))
    walks, parts = Walks(mixer, rule), []
    matters = rule.matters(text.lm, text.keys)
    for number in range(len(text)):
        one = slice(number, number + 1)
        tokens = None if number == 0 else [int(text.targets[number - 1])]
        searched = Neighbors(found.squared_distances[one], found.rows[one])
        search = partial(_searched_before, searched)
        parts += walks.step(tokens, text.keys[one], matters[one], search)
    joined = Neighbors(
        torch.cat([part.squared_distances for part in parts]),
        torch.cat([part.rows for part in parts]),
    )
    return joined, 1 - walks.made / walks.positions


def log_probs(
    store: Datastore, text: HeldOut, found: Neighbors, parameters: Parameters
) -> Float[Tensor, " token"]:
    """Return log p of each token with these neighbors."""
    tokens = store.values[found.rows.clamp_min(0)].masked_fill(found.rows < 0, -1)
    return mixed(target_neighbors(text, Voters(found.squared_distances, tokens)), parameters)


def _searched_before(searched: Neighbors, _: Tensor) -> list[Neighbors]:
    return [searched]


class NoIndex:
    """Stands where every search was made in advance."""

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """Refuse."""
        raise NotImplementedError("all searches were made in advance")


def draw(panel: Any, curves: dict[str, list[dict[str, Any]]], always: float) -> None:
    """Draw the change of perplexity from searching always against the share saved."""
    for name, points in curves.items():
        panel.plot(
            [100 * point["saved"] for point in points],
            [100 * (point["perplexity"] / always - 1) for point in points],
            "o-",
            label=name,
        )
    for name, saved in PAPERS.items():
        panel.plot([100 * saved], [0], "x", color="gray")
        panel.annotate(name, (100 * saved, 0), fontsize=8, color="gray", va="bottom")
    panel.axhline(0, color="gray", linestyle="--", label="searching always")
    panel.set_xlabel("tokens without a search, %")
    panel.set_ylabel("change of perplexity, %")


if __name__ == "__main__":
    main()
