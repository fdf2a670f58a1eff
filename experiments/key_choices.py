"""Which hidden state is the key: six places in the last layer.

    python experiments/key_choices.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Table 5. One forward pass captures all six keys of 60,000 tokens (--entries
for more), and of validation and test text; search is exact. The six differ in scale, and the
paper's T 1 suits only some of them: the table has T 1 and a tuned T.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import faiss
import torch
from experiment import Experiment, digest_of
from jaxtyping import Float
from measuring import measure, mixed, papers_recipe, percent, target_neighbors
from torch import Tensor

from knnlm.choices import Key
from knnlm.mixture.interpolation import Voters
from knnlm.model.key_places import capture_keys, find_key_places
from knnlm.model.language_model import LanguageModel
from knnlm.text.windows import Window
from knnlm.tuning.sweep import sweep

PAPER = {
    "LM": 17.96,
    "output": 17.07,
    "output_after_norm": 17.01,
    "ffn_input": 16.06,
    "ffn_input_before_norm": 17.06,
    "attention_input": 16.76,
    "attention_input_before_norm": 17.14,
}
ENTRIES = 60_000
K = 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each key."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    lm, domain = experiment.lm, experiment.domain
    valid, test = experiment.valid(), experiment.test()
    entries = experiment.arguments.entries or ENTRIES
    stored = read_all(experiment, domain.train, entries)
    valid_keys = read_all(experiment, domain.valid, len(valid), scored=True)
    test_keys = read_all(experiment, domain.test, len(test), scored=True)

    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for key in [key for key in Key if key in stored]:
        neighbors, test_neighbors = (
            target_neighbors(text, search(stored[key], stored["targets"], keys[key]))
            for text, keys in ((valid, valid_keys), (test, test_keys))
        )
        recipe, tuned = papers_recipe(neighbors), sweep(neighbors).parameters
        measured[key] = {
            "T 1": {**measure(test, mixed(test_neighbors, recipe)), **asdict(recipe)},
            "tuned": {**measure(test, mixed(test_neighbors, tuned)), **asdict(tuned)},
        }
        numbers = measured[key]
        print(
            f"{key:28} T 1: {percent(numbers['T 1']['change'])}"
            f"   T {tuned.temperature:g}: {percent(numbers['tuned']['change'])}"
            f"   paper {percent(PAPER[key] / PAPER['LM'] - 1)}"
        )
    lm_perplexity = measure(test, test.lm_log_probs)["perplexity"]
    experiment.write(
        "key_choices",
        {
            "paper": PAPER,
            "entries": len(stored["targets"]),
            "lm_perplexity": lm_perplexity,
            "default_key": lm.key,
            "measured": measured,
        },
    )
    with experiment.picture("key_choices") as [panel]:
        places = torch.arange(len(measured))
        for number, (setting, color) in enumerate([("T 1", "#e59866"), ("tuned", "#c0392b")]):
            changes = [100 * numbers[setting]["change"] for numbers in measured.values()]
            panel.barh(places + 0.27 * (number - 1), changes, 0.25, color=color, label=setting)
        of_paper = [100 * (PAPER[key] / PAPER["LM"] - 1) for key in measured]
        panel.barh(places + 0.27, of_paper, 0.25, color="#1b4f72", label="the paper")
        panel.set_yticks(places, list(measured))
        panel.invert_yaxis()
        panel.set_xlabel("change of perplexity, %")


def read_all(
    experiment: Experiment, sources: Sequence[str], tokens: int, scored: bool = False
) -> dict[str, Tensor]:
    """Return all keys of a text's first tokens, float16, and `targets`, the tokens that follow."""
    lm = experiment.lm
    windows = experiment.windows(sources, tokens, experiment.scored if scored else None)
    inputs = [window.tokens.tolist() for window in windows]
    digest = digest_of("all keys", lm.weights_fingerprint, inputs)
    return experiment.kept(digest, lambda: capture_all(lm, windows))


def capture_all(lm: LanguageModel, windows: Sequence[Window]) -> dict[str, Tensor]:
    """Read windows and capture all keys of their new positions."""
    decoder = lm.model.get_decoder()
    taps = find_key_places(lm.model, torch.arange(8, device=lm.device)[None]).taps
    parts: dict[str, list[Tensor]] = {key: [] for key in taps}
    with ExitStack() as hooks, torch.inference_mode():
        captured = {key: hooks.enter_context(capture_keys(decoder, taps[key])) for key in taps}
        for window in windows:
            tokens = torch.from_numpy(window.inputs).long()[None]
            decoder(input_ids=tokens.to(lm.device), use_cache=False)
            for key, capture in captured.items():
                parts[key].append(capture.keys[0, window.context :].to("cpu", torch.float16))
    targets = torch.cat([torch.from_numpy(window.targets) for window in windows])
    return {"targets": targets, **{key: torch.cat(part) for key, part in parts.items()}}


def search(
    keys: Float[Tensor, "rows dim"], values: Tensor, queries: Float[Tensor, "query dim"]
) -> Voters:
    """Return the nearest keys of each query; centering the keys reduces rounding."""
    center = keys.float().mean(dim=0)
    centered = (queries.float() - center).numpy(), (keys.float() - center).numpy()
    distances, rows = map(torch.from_numpy, faiss.knn(*centered, min(K, len(keys))))
    return Voters(distances.clamp_min(0.0), values[rows])


if __name__ == "__main__":
    main()
