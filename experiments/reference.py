"""Check the installation against known numbers: SmolLM2-135M on Python's library reference.

    sudo apt-get install python3.11-doc
    python experiments/reference.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

`--model` is the folder or .gguf of SmolLM2-135M-Instruct. The documents are the library reference's
sources sorted by path and shuffled with seed 0: 12 for validation, 12 for test, the rest for
training. Windows are 1,024 positions of one stream, without context. Takes about 15 minutes on 2
cores; if interrupted, rerun the same command.
"""

import argparse
import random
from pathlib import Path

import knnlm
from knnlm.apps.cli.progress_bar import RichProgress
from knnlm.provenance import write_results

SOURCES = Path("/usr/share/doc/python3.11/html/_sources/library")
TRAINING_POSITIONS = 519_168
TEST_POSITIONS = 8_192
EXPECTED = {"lm": 9.3058, "k 1024, T 1, λ 0.2": 8.5041, "k 1024, T 2, λ 0.2": 8.4804}
TOLERANCE = 0.002


def main() -> None:
    """Build, evaluate, compare with the expected numbers, write `results/reference.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()

    files = sorted(SOURCES.glob("*.rst.txt"))
    random.Random(0).shuffle(files)
    test, training = files[12:24], files[24:]

    progress = RichProgress()
    lm = knnlm.LanguageModel.load(arguments.model, dtype="float32", device="cpu")
    store = knnlm.build(
        arguments.work / "reference.store",
        lm,
        knnlm.read_documents(*training),
        window=1024,
        context=0,
        boundary="stream",
        max_entries=TRAINING_POSITIONS,
        index="exact",
        progress=progress,
    )
    measured: dict[str, float] = {}
    for temperature in (1.0, 2.0):
        model = knnlm.KNNLM(lm, store, k=1024, lmbda=0.2, temperature=temperature)
        report = model.perplexity(
            knnlm.read_documents(*test), max_tokens=TEST_POSITIONS, progress=progress
        )
        measured["lm"] = report.lm.perplexity
        measured[f"k 1024, T {temperature:.0f}, λ 0.2"] = report.knn.perplexity
    for name, expected in EXPECTED.items():
        print(f"{name:20} expected {expected:.4f}  measured {measured[name]:.4f}")
    write_results(
        Path(__file__).parent / "results" / "reference.json",
        {"entries": store.rows, "expected": EXPECTED, "measured": measured},
    )
    wrong = [n for n, expected in EXPECTED.items() if abs(measured[n] - expected) > TOLERANCE]
    if wrong:
        raise SystemExit(f"differs by more than {TOLERANCE}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
