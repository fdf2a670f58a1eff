"""More data in the datastore than the LM was trained on.

    python experiments/more_data.py --model smollm2 --work /tmp/experiments

Khandelwal et al. 2020, Table 3: an LM trained on 100M tokens with a datastore of 3B beats the LM
that was trained on all 3B. Here a model is tuned for one pass over --tuned-on tokens of the
collection, and remembers these (the paper's own "in domain": the datastore is what the LM was
trained on), then --entries tokens; beside it the model that was tuned on all --entries tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment, digest_of
from measuring import cached, measure, mixed, papers_recipe, percent
from torch.nn.functional import cross_entropy

from knnlm.language_model import LanguageModel
from knnlm.progress import Progress
from knnlm.windows import Window

PAPER = {"LM 100M": 19.59, "LM 100M + kNN of 3B": 13.73, "LM 3B": 15.17}
TUNED_ON, ENTRIES = 8_192, 49_152
LEARNING_RATE = 1e-4
WARM_UP = 4  # steps
BATCH = 2  # windows


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, build, measure."""
    experiment = Experiment(__doc__, argv)
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
        recipe = papers_recipe(cached(valid, experiment.voters(store, valid, rows)))
        neighbors = cached(test, experiment.voters(store, test, rows))
        measured[f"{name} + kNN of {rows:,}"] = {
            **measure(test, mixed(neighbors, recipe)),
            **asdict(recipe),
        }
    everything = tuned_model(experiment, domain.train, domain.entries)
    test = experiment.test(lm=everything)
    measured[f"tuned on {domain.entries:,}"] = measure(test, test.lm_log_probs)

    base = measured[name]["perplexity"]
    for setting, numbers in measured.items():
        numbers["change"] = numbers["perplexity"] / base - 1  # from the model tuned on a part
        print(f"{setting:36} {numbers['perplexity']:8.4f}  {percent(numbers['change'])}")
    experiment.write(
        "more_data",
        {
            "paper": PAPER,
            "untuned": untuned.name,
            "entries": store.rows,
            "learning_rate": LEARNING_RATE,
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
    """Return the model after one pass over the first tokens of a text, kept in --work."""
    untuned = experiment.lm
    windows = experiment.windows(sources, tokens)
    inputs = [window.tokens.tolist() for window in windows]
    folder: Path = experiment.work / digest_of(
        "tuned", untuned.weights_fingerprint, inputs, LEARNING_RATE, BATCH
    )
    if not folder.exists():
        model = LanguageModel.load(experiment.arguments.model)
        train(model, windows, experiment.progress)
        aside = folder.with_suffix(".aside")
        model.save(aside)
        aside.rename(folder)
    return LanguageModel.load(folder)


def train(lm: LanguageModel, windows: Sequence[Window], progress: Progress) -> None:
    """Tune all weights on windows in their order, with AdamW; the rate falls to 0 in a line."""
    model = lm.model.train()
    torch.manual_seed(0)
    batches = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / len(batches))
    )
    with progress.task("tune the model", sum(w.new for w in windows), "tokens") as advance:
        for batch in batches:
            new = sum(window.new for window in batch)
            for window in batch:
                tokens = torch.from_numpy(window.tokens).long().to(lm.device)
                logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
                nats = cross_entropy(
                    logits[window.context :].float(),
                    tokens[1 + window.context :],
                    reduction="sum",
                )
                (nats / new).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(new)
    model.eval()


if __name__ == "__main__":
    main()
