"""How far stored keys are from those read again, where the model or the windows differ a little.

    python benchmarks/import_proof.py MODEL TEXT…

Keys are read as knn-transformers does (windows of 1,023 positions, 511 of them context, no start
token) and compared with those of a change: rounding, another precision, windows that begin
elsewhere, shifted rows, another hidden state, a model trained a little further. A distance is
divided by the spread of the keys, as in `knnlm/exchange/proof.py`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import knnlm
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import read_keys
from knnlm.provenance import write_results
from knnlm.text.windows import Span, Window

RESULTS = Path(__file__).parent / "results" / "import_proof.json"
CONTEXT, NEW = 511, 512
FIRST, LAST = 1300, 2300  # the rows compared: every change reads all of them


def main() -> None:
    """Measure, print and write `benchmarks/results/import_proof.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 30])
    arguments = parser.parse_args()
    lm = LanguageModel.load(arguments.model)
    text = "".join(
        block for document in knnlm.read_documents(*arguments.text) for block in document.blocks()
    )
    tokens = lm.encode([text[:40_000]])[0]
    stored = keys_of(lm, tokens)
    spread = (stored - stored.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    results = {}

    def show(change: str, keys: Tensor) -> None:
        distances = (keys - stored).norm(dim=1) / spread
        found = {q: float(distances.quantile(q / 100)) for q in (50, 90, 99)}
        results[change] = found
        print(f"{change:32}" + "".join(f"{value:10.4f}" for value in found.values()), flush=True)

    show("rounded to float16", stored.half().float())
    for offset in (1, 17, 128, 256):
        show(f"windows begin {offset} later", keys_of(lm, tokens, offset))
    show("values shifted by one row", stored.roll(1, dims=0))
    show("keys of other rows", stored[torch.randperm(len(stored))])
    for key in ("attention_input", "ffn_input_before_norm"):
        show(key, keys_of(LanguageModel(lm.model, lm.tokenizer, key=key), tokens))
    show("bfloat16", keys_of(LanguageModel.load(arguments.model, dtype="bfloat16"), tokens))
    train(lm, tokens, arguments.steps, show)
    write_results(
        RESULTS, {"model": Path(arguments.model).name, "percentiles_of_distance": results}
    )


def keys_of(lm: LanguageModel, tokens: np.ndarray, offset: int = 0) -> Tensor:
    """Return the keys of the rows compared, read in blocks that begin `offset` rows later."""
    starts = [CONTEXT + 1 + offset + number * NEW - NEW * (offset > 0) for number in range(6)]
    starts = [start for start in starts if start > CONTEXT and start + NEW > FIRST and start < LAST]
    windows = [
        Window(tokens[start - CONTEXT : start + NEW + 1], CONTEXT, (Span(0, NEW),))
        for start in starts
    ]
    read = dict(read_keys(lm, windows))
    rows = torch.cat([read[number].float() for number in range(len(windows))])
    return rows[FIRST - starts[0] : LAST - starts[0]]


def train(
    lm: LanguageModel, tokens: np.ndarray, steps: list[int], show: Callable[[str, Tensor], None]
) -> None:
    """Train the model a little further and show its keys after some numbers of steps."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=2e-5)
    for step in range(1, max(steps) + 1):
        start = int(torch.randint(0, len(tokens) - 256, (1,)))
        batch = torch.from_numpy(tokens[start : start + 256].astype(np.int64))[None]
        lm.model.train()
        lm.model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lm.model.eval()
        if step in steps:
            show(f"trained for {step} steps more", keys_of(lm, tokens))


if __name__ == "__main__":
    main()
