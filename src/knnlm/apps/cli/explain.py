"""The command `explain`: why the kNN-LM gives each token its probability."""

import errno
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import ERR, OUT, print_json
from knnlm.apps.cli.explain_report import print_explanations
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, check_file_to_write, open_model
from knnlm.apps.cli.texts import TextOptions, checked_texts
from knnlm.choices import ModelDtype, TextFormat
from knnlm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from knnlm.evaluation.explanation import Explanation
    from knnlm.knn_lm import KNNLM

_Text = Annotated[
    str, typer.Argument(help="A text, the path of a file, or - for the standard input.")
]
_Generate = Annotated[
    int, typer.Option(help="Continue the text by this many tokens and explain only those.", min=0)
]
_Tokens = Annotated[
    int,
    typer.Option(
        help="Show the sources of this many tokens, those with the largest change.", min=0
    ),
]
_At = Annotated[
    list[int] | None,
    typer.Option(
        help="Show the sources of this token instead, counted from 0; may be repeated.", min=0
    ),
]
_Sources = Annotated[int, typer.Option(help="Sources to show for each token.", min=1)]
_Html = Annotated[
    Path | None,
    typer.Option(help="Also write the page that knnlm explore shows, as one HTML file."),
]

_PATH = re.compile(r"[\w.~/-]+\.\w{1,5}")  # what may be the path of a file, mistyped


def explain(
    store: options.Store,
    text: _Text,
    *,
    also: options.Also = None,
    model: options.Model = None,
    k: options.K = None,
    lmbda: options.Lmbda = None,
    temperature: options.Temperature = None,
    cache: options.Cache = False,
    weights: options.Weights = None,
    generate: _Generate = 0,
    tokens: _Tokens = 5,
    at: _At = None,
    sources: _Sources = 3,
    html: _Html = None,
    text_column: options.TextColumn = "text",
    id_column: options.IdColumn = None,
    encoding: options.Encoding = "utf-8",
    text_format: options.Format = TextFormat.auto,
    skip_bad: options.SkipBad = False,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Show how the datastore changed each token's probability, and the passages responsible.

    The text is printed in color: green where the datastore helped, red where it hurt. Neighbors
    are grouped by the token they vote for; the table at the end adds up the share of each
    document. See docs/attributions.md for the meaning of the weights.

        knnlm explain docs.store "def create_task(self, coro):"
    """
    text = _read_text(text, TextOptions(text_column, id_column, encoding, text_format, skip_bad))
    if html is not None:
        check_file_to_write("html", html)
    mixture = MixtureOptions(k, lmbda, temperature, weights, cache)
    opened = open_model(store, also, ModelOptions(model, dtype, device), mixture)
    generated = opened.generate(text, max_new_tokens=generate).tokens if generate else []
    if html is None:
        explanations: Sequence[Explanation] = opened.explain(
            text, generated=generated, sources=sources
        )
    else:
        explanations = _explain_on_page(html, opened, text, generated, sources)
    first = len(explanations) - len(generated) if generated else 0
    shown = _check_at(at, len(explanations)) or _most_changed(explanations, first, tokens)
    if as_json:
        unverified = {"unverified": list(opened.mixer.unverified)}
        value, text = (
            _to_dict(explanations[first:]) | unverified,
            "".join(one.text for one in explanations[first:]),
        )
        print_json(value | {"text": text} if generated else value)
        return
    print_explanations(explanations, shown, first)
    if html is not None:
        OUT.print(f"page: {html}", soft_wrap=True)


def _read_text(text: str, reading: TextOptions) -> str:
    """Return the contents of the file that an argument names, or else the argument itself."""
    from knnlm.text.pipes import is_pipe

    try:
        is_file = is_pipe(text) or Path(text).is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        is_file = False
    if not is_file:
        if _PATH.fullmatch(text):
            ERR.print(f"note: {text} is no file, and is explained as a text", soft_wrap=True)
        return text
    with checked_texts([text], reading) as documents:
        return "".join(block for document in documents for block in document.blocks())


def _explain_on_page(
    path: Path, model: "KNNLM", text: str, generated: list[int], sources: int
) -> "list[Explanation]":
    """Write the explorer's page of a text, and return its explanations from the same reading."""
    from knnlm.apps.explorer.analysis import analyze_and_explain
    from knnlm.apps.explorer.page import standalone_page
    from knnlm.datastore.files import writing

    analysis, explanations = analyze_and_explain(model, text, generated, sources)
    with writing(path):
        path.write_text(standalone_page(analysis), encoding="utf-8")
    return explanations


def _check_at(at: list[int] | None, length: int) -> list[int]:
    """Return the token numbers asked for, in order; raises InvalidArgumentError."""
    if at and max(at) >= length:
        raise InvalidArgumentError(
            f"at must be below {length}, the number of tokens, got {max(at)}"
        )
    return sorted(set(at or ()))


def _most_changed(explanations: "Sequence[Explanation]", first: int, count: int) -> list[int]:
    """Return the numbers of the tokens from `first` on with the largest gain or loss, in order."""
    numbers = range(first, len(explanations))
    return sorted(sorted(numbers, key=lambda number: -abs(explanations[number].gain))[:count])


def _to_dict(explanations: "Sequence[Explanation]") -> dict[str, Any]:
    from knnlm.evaluation.explanation import sum_credits

    return {
        "tokens": [explanation.to_dict() for explanation in explanations],
        "documents": [asdict(credit) for credit in sum_credits(explanations)],
    }
