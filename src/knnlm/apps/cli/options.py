"""The arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M"


class Boundary(StrEnum):
    """Whether documents see each other."""

    document = "document"
    stream = "stream"


class KeyDtype(StrEnum):
    """Precision of the keys on disk."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Dtype(StrEnum):
    """Precision of the model's arithmetic."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(StrEnum):
    """What chooses how much each token's neighbors count."""

    tuned = "tuned"
    distance = "distance"
    fixed = "fixed"


class Key(StrEnum):
    """Which hidden state of the last layer is the key."""

    ffn_input = "ffn_input"
    ffn_input_before_norm = "ffn_input_before_norm"
    attention_input = "attention_input"
    attention_input_before_norm = "attention_input_before_norm"
    output = "output"
    output_after_norm = "output_after_norm"


class IndexKind(StrEnum):
    """How a datastore is searched."""

    auto = "auto"
    exact = "exact"
    ivf = "ivf"
    compressed = "compressed"
    faiss = "faiss"


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
ModelDtype = Annotated[
    Dtype, typer.Option(help="Precision of the model; auto: the datastore's own.")
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
    Weights,
    typer.Option(
        "--weights",
        help="tuned: learned weights where tune stored them; distance: λ by the nearest distance; "
        "fixed: one λ and T.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
