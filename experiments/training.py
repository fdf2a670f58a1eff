"""Train a language model on windows of text, for experiments that compare with training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from experiment import Experiment
from torch.nn.functional import cross_entropy

from knnlm.model.language_model import LanguageModel
from knnlm.progress import Progress
from knnlm.text.windows import Window


def kept_model(
    experiment: Experiment, digest: str, make: Callable[[], LanguageModel]
) -> LanguageModel:
    """Return the model cached in --work under a digest; make it if there is none."""
    folder: Path = experiment.work / digest
    if not folder.exists():
        aside = folder.with_suffix(".aside")
        make().save(aside)
        aside.rename(folder)
    return LanguageModel.load(folder)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. batch: windows per step. warm_up: steps with a rising learning rate."""

    batch: int
    learning_rate: float
    warm_up: int
    weight_decay: float = 0.0


def train(lm: LanguageModel, windows: Sequence[Window], recipe: Recipe, progress: Progress) -> None:
    """Train all weights on windows in order, with AdamW; the rate falls linearly to 0."""
    model = lm.model.train()
    torch.manual_seed(0)
    size = recipe.batch
    batches = [windows[start : start + size] for start in range(0, len(windows), size)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / recipe.warm_up) * (1 - step / len(batches))
    )
    with progress.task("train the model", sum(w.new for w in windows), "tokens") as advance:
        for step in batches:
            new = sum(window.new for window in step)
            for window in step:
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
