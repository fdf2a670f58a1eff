"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from knnlm.choices import Boundary, IndexKind, ModelDtype, Weights

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M"


IndexOption = Annotated[IndexKind, typer.Option(help="How the datastore is searched.")]
Store = Annotated[Path, typer.Argument(help="The datastore's folder.", show_default=False)]
Texts = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders or globs of UTF-8 text (one document a file), .jsonl or .parquet "
        "(one document a row), or hf:NAME[:CONFIG][:SPLIT].",
        show_default=False,
    ),
]
TextColumn = Annotated[
    str, typer.Option(help="The column of .jsonl, .parquet and hf: that holds the text.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A hub name, a folder or a .gguf file; by default the datastore's own.",
        show_default=False,
    ),
]
Dtype = Annotated[
    ModelDtype, typer.Option(help="Precision of the model; auto: the datastore's own.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Window = Annotated[
    int | None, typer.Option(help="Positions the model reads at once.", show_default=False)
]
Context = Annotated[
    int | None,
    typer.Option(help="How many of them the window before has scored.", show_default=False),
]
BoundaryOption = Annotated[
    Boundary | None,
    typer.Option(
        help="document: each starts afresh; stream: all are one stream.", show_default=False
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Stop after so many tokens.", show_default=False)
]
Also = Annotated[
    list[Path] | None,
    typer.Option(
        "--also",
        help="Another datastore of the same model, mixed in with a λ of its own; may be repeated, "
        "and then --k, --lmbda and --temperature too, once for each datastore.",
        show_default=False,
    ),
]
K = Annotated[
    list[int] | None,
    typer.Option("--k", help="Neighbors; by default as tuned.", show_default=False),
]
Lmbda = Annotated[
    list[float] | None,
    typer.Option("--lmbda", help="Weight λ of p_kNN; by default as tuned.", show_default=False),
]
Temperature = Annotated[
    list[float] | None,
    typer.Option("--temperature", help="Of the distances; default as tuned.", show_default=False),
]
Cache = Annotated[
    bool,
    typer.Option("--cache", help="Mix in the continuous cache of the text itself, as tuned."),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        "--weights",
        help="learned: a weight for each token, as tuned; distance: λ by the nearest distance, as "
        "tuned; fixed: one λ and T. By default learned where it was tuned and no k, λ or T is "
        "given, else fixed.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
