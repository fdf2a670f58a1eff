"""The arguments and options that several commands share, and those that travel together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from knnlm.choices import Boundary, ModelDtype, Weights

Store = Annotated[Path, typer.Argument(help="The datastore's folder.", show_default=False)]
Texts = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders or globs of UTF-8 text (one document per file), .jsonl or .parquet "
        "files (one document per row), or hf:NAME[:CONFIG][:SPLIT].",
        show_default=False,
    ),
]
TextColumn = Annotated[
    str, typer.Option(help="The column of .jsonl, .parquet and hf: sources that holds the text.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A Hugging Face name, a folder or a .gguf file; by default the model that the "
        "datastore was built with.",
        show_default=False,
    ),
]
Dtype = Annotated[
    ModelDtype,
    typer.Option(help="Precision of the model; auto: the one the datastore was built with."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Window = Annotated[
    int | None,
    typer.Option(
        help="Positions that the model reads at once; by default as in the datastore.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Positions of each window that repeat the previous one and only give context; by "
        "default as in the datastore.",
        show_default=False,
    ),
]
BoundaryOption = Annotated[
    Boundary | None,
    typer.Option(
        help="document: read each document on its own; stream: read all of them as one text. By "
        "default as in the datastore.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Stop after this many tokens.", show_default=False)
]
Also = Annotated[
    list[Path] | None,
    typer.Option(
        "--also",
        help="Another datastore built with the same model, mixed in with its own λ. May be "
        "repeated; then --k, --lmbda and --temperature may be given once for each datastore.",
        show_default=False,
    ),
]
K = Annotated[
    list[int] | None,
    typer.Option("--k", help="Number of neighbors; by default as tuned.", show_default=False),
]
Lmbda = Annotated[
    list[float] | None,
    typer.Option(
        "--lmbda", help="Weight λ of p_kNN, 0 to 1; by default as tuned.", show_default=False
    ),
]
Temperature = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        help="Temperature T of the neighbors' distances; by default as tuned.",
        show_default=False,
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache", help="Also mix in a continuous cache of the text being read, as tuned."
    ),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        "--weights",
        help="How λ is chosen. learned: by a gate for each token, as tuned; distance: by the "
        "distance of the nearest neighbor, as tuned; fixed: one λ and T for all tokens. By "
        "default learned if a gate was tuned and no k, λ or T is given, otherwise fixed.",
        show_default=False,
    ),
]
Port = Annotated[int, typer.Option(help="0 for any free port.", min=0, max=65535)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which language model to load, in what precision, on which device."""

    name: str | None
    dtype: ModelDtype
    device: str


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """How to mix: `k`, `lmbda` and `temperature` hold one value for all datastores or for each.

    None, and an empty list, stand for the tuned values.
    """

    k: list[int] | None = None
    lmbda: list[float] | None = None
    temperature: list[float] | None = None
    weights: Weights | None = None
    cache: bool = False
