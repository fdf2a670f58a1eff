"""The command `explain`: why the kNN-LM gives each token its probability."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.apps.cli import console
from knnlm.apps.cli.explain_report import print_explanations
from knnlm.apps.cli.options import (
    Also,
    Cache,
    Device,
    Dtype,
    Json,
    K,
    Lmbda,
    Model,
    Store,
    Temperature,
    WeightsOption,
)
from knnlm.apps.cli.text_commands import check_writable, open_model
from knnlm.choices import ModelDtype
from knnlm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from knnlm.evaluation.explanation import Explanation


def explain(
    store: Store,
    text: Annotated[
        str, typer.Argument(help="A text, or the path of a UTF-8 file.", show_default=False)
    ],
    also: Also = None,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    cache: Cache = False,
    weights: WeightsOption = None,
    generate: Annotated[
        int,
        typer.Option(help="Continue the text by so many tokens, and explain those.", min=0),
    ] = 0,
    tokens: Annotated[
        int, typer.Option(help="Show the sources of so many tokens, the most changed first.", min=0)
    ] = 5,
    at: Annotated[
        list[int] | None,
        typer.Option(
            help="Show the sources of this token, by its number from 0; may be repeated.",
            min=0,
            show_default=False,
        ),
    ] = None,
    sources: Annotated[int, typer.Option(help="Sources named for each token.", min=1)] = 3,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one page to look at in a browser, without a server; see explore.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show for each token of a text what the datastore changed, and which passages spoke for it.

    The text comes coloured: green where the datastore helped, red where it hurt. Neighbors are
    grouped by what they vote for; the table at the end adds up what each document gave. See
    docs/attributions.md for what a weight means.

        knnlm explain docs.store "def create_task(self, coro):"
    """
    import knnlm

    if _is_file(text):
        text = "".join(block for d in knnlm.read_documents(text) for block in d.blocks())
    if html is not None:
        if html.is_dir():
            raise InvalidArgumentError(f"html must be a file to write, got the folder {html}")
        check_writable(html.parent)
    opened = open_model(
        store, also, model, dtype, device, k, lmbda, temperature, cache=cache, weights=weights
    )
    generated: list[int] = []
    if generate:
        generated = opened.generate(text, max_new_tokens=generate).tokens
    analysis = None
    if html is None:
        explanations = opened.explain(text, generated=generated, sources=sources)
    else:
        from knnlm.apps.explorer.analysis import analyze_and_explain

        analysis, explanations = analyze_and_explain(opened, text, generated, sources)
    first = len(explanations) - len(generated) if generated else 0
    chosen = _choose(at, tokens, explanations, first)
    if html is not None and analysis is not None:
        from knnlm.apps.explorer.page import standalone_page

        html.write_text(standalone_page(analysis), encoding="utf-8")
    if as_json:
        new = explanations[first:]
        plain: dict[str, Any] = {
            "tokens": [explanation.to_dict() for explanation in new],
            "documents": [asdict(credit) for credit in knnlm.sum_credits(new)],
        }
        if generated:
            plain["text"] = opened.lm.decode(generated)
        console.print_json(plain)
        return
    print_explanations(explanations, chosen, first)
    if html is not None:
        console.OUT.print(f"page: {html}", soft_wrap=True)


def _choose(
    at: list[int] | None, tokens: int, explanations: "list[Explanation]", first: int
) -> list[int]:
    """Return the numbers of the tokens whose sources are shown."""
    if at:
        if max(at) >= len(explanations):
            raise InvalidArgumentError(
                f"at must be below {len(explanations)}, the number of tokens, got {max(at)}"
            )
        return sorted(set(at))
    new = range(first, len(explanations))
    return sorted(sorted(new, key=lambda number: -abs(explanations[number].gain))[:tokens])


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False
