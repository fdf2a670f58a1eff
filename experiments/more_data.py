"""A datastore with more text than the LM was trained on.

    python experiments/more_data.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Table 3: an LM trained on 100M tokens with a datastore of 3B beats an LM
trained on all 3B. Here a model is tuned for one pass over --tuned-on tokens of the collection, and
gets a datastore of these (as in the paper's "in domain" setting) and one of --entries tokens; it
is compared with a model tuned on all --entries tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from experiment import Experiment, digest_of
from measuring import measure, mixed, papers_recipe, percent, target_neighbors
from training import Recipe, kept_model, train

from knnlm.model.language_model import LanguageModel

PAPER = {"LM 100M": 19.59, "LM 100M + kNN of 3B": 13.73, "LM 3B": 15.17}
TUNED_ON, ENTRIES = 8_192, 49_152
TUNING = Recipe(batch=2, learning_rate=1e-4, warm_up=4)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, build, measure."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    experiment.add_argument("--tuned-on", type=int, default=TUNED_ON)
    tuned_on = experiment.arguments.tuned_on
    domain = replace(experiment.domain, entries=experiment.arguments.entries or ENTRIES)
    assert domain.entries is not None

    untuned = experiment.lm
    test = experiment.test()
    measured: dict[str, dict[str, Any]] = {"LM": measure(test, test.lm_log_probs)}
    some = tuned_model(experiment, domain.train, tuned_on)
    store = experiment.store(domain, some)
    valid, test = experiment.valid(lm=some), experiment.test(lm=some)
    name = f"tuned on {tuned_on:,}"
    measured[name] = measure(test, test.lm_log_probs)
    for rows in (tuned_on, store.rows):
        recipe = papers_recipe(target_neighbors(valid, experiment.voters(store, valid, rows)))
        neighbors = target_neighbors(test, experiment.voters(store, test, rows))
        measured[f"{name} + kNN of {rows:,}"] = {
            **measure(test, mixed(neighbors, recipe)),
            **asdict(recipe),
        }
    everything = tuned_model(experiment, domain.train, domain.entries)
    test = experiment.test(lm=everything)
    measured[f"tuned on {domain.entries:,}"] = measure(test, test.lm_log_probs)

    base = measured[name]["perplexity"]
    for setting, numbers in measured.items():
        numbers["change"] = numbers["perplexity"] / base - 1  # from the partly tuned model
        print(f"{setting:36} {numbers['perplexity']:8.4f}  {percent(numbers['change'])}")
    experiment.write(
        "more_data",
        {
            "paper": PAPER,
            "untuned": untuned.name,
            "entries": store.rows,
            "tuning": asdict(TUNING),
            "measured": measured,
        },
    )
    with experiment.picture("more_data") as [panel]:
        shown = [setting for setting in measured if setting != name]
        panel.barh(shown, [100 * measured[setting]["change"] for setting in shown], color="#c0392b")
        panel.invert_yaxis()
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlabel(f"perplexity against the LM {name} tokens, %")


def tuned_model(experiment: Experiment, sources: Sequence[str], tokens: int) -> LanguageModel:
    """Return the model after one pass over the first tokens of a text, cached in --work."""
    windows = experiment.windows(sources, tokens)

    def tune() -> LanguageModel:
        lm = LanguageModel.load(experiment.arguments.model)
        train(lm, windows, TUNING, experiment.progress)
        return lm

    inputs = [window.tokens.tolist() for window in windows]
    fingerprint = experiment.lm.weights_fingerprint
    return kept_model(
        experiment,
        digest_of("tuned", fingerprint, inputs, TUNING.learning_rate, TUNING.batch),
        tune,
    )


if __name__ == "__main__":
    main()
