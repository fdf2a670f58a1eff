"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from knnlm import choices

Store = Annotated[Path, typer.Argument(help="The datastore's folder.")]
Texts = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders or globs of UTF-8 text, .html, .pdf or .ipynb (one document per "
        "file), .jsonl, .csv, .tsv, .parquet or .json files (one document per row), .zip archives "
        "of all these, hf:NAME[:CONFIG][:SPLIT], or - for the standard input. See docs/texts.md."
    ),
]
TextColumn = Annotated[
    str, typer.Option(help="The column of rows that holds the text; a.b is the field b of a.")
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        help="The column of rows that tells them apart when they are read again; by default their "
        "text does."
    ),
]
Encoding = Annotated[
    str,
    typer.Option(help="The encoding of the texts: utf-8, utf-16, cp1252, latin-1, shift_jis, …"),
]
Format = Annotated[
    choices.TextFormat,
    typer.Option(
        help="What the files hold: text, html, pdf or notebook (one document per file) or rows; "
        "auto goes by the ends of their names."
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out files and rows that cannot be read, and name them all at the end.",
    ),
]
Gitignore = Annotated[
    bool,
    typer.Option(
        "--gitignore/--no-gitignore",
        help="Whether to leave out of folders what their .gitignore files say.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A Hugging Face name, a folder or a .gguf file; by default the model that the "
        "datastore was built with."
    ),
]
Dtype = Annotated[
    choices.ModelDtype,
    typer.Option(help="Precision of the model; auto: the one the datastore was built with."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Window = Annotated[
    int | None,
    typer.Option(help="Positions that the model reads at once; by default as in the datastore."),
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Positions of each window that repeat the previous one and only give context; by "
        "default as in the datastore."
    ),
]
Boundary = Annotated[
    choices.Boundary | None,
    typer.Option(
        help="document: read each document on its own; stream: read all of them as one text. By "
        "default as in the datastore."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens.")]
Also = Annotated[
    list[Path] | None,
    typer.Option(
        help="Another datastore built with the same model, mixed in with its own λ. May be "
        "repeated; then --k, --lmbda and --temperature may be given once for each datastore."
    ),
]
K = Annotated[list[int] | None, typer.Option(help="Number of neighbors; by default as tuned.")]
Lmbda = Annotated[
    list[float] | None, typer.Option(help="Weight λ of p_kNN, 0 to 1; by default as tuned.")
]
Temperature = Annotated[
    list[float] | None,
    typer.Option(help="Temperature T of the neighbors' distances; by default as tuned."),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache", help="Also mix in a continuous cache of the text being read, as tuned."
    ),
]
Weights = Annotated[
    choices.Weights | None,
    typer.Option(
        help="How λ is chosen. learned: by a gate for each token, as tuned; distance: by the "
        "distance of the nearest neighbor, as tuned; fixed: one λ and T for all tokens. By "
        "default learned if a gate was tuned and no k, λ or T is given, otherwise fixed."
    ),
]
Pointers = Annotated[
    int | None,
    typer.Option(
        help="Save searches: search only where fewer entries than this follow the last "
        "neighbors in their texts (RetoMaton).",
        min=1,
    ),
]
Skip = Annotated[
    float,
    typer.Option(
        help="Save searches: leave out this share of them, where the language model is sure, as "
        "tuned.",
        min=0.0,
        max=1.0,
    ),
]
Sample = Annotated[
    bool, typer.Option("--sample", help="Sample instead of taking the most likely token.")
]
SamplingTemperature = Annotated[
    float, typer.Option(help="With --sample: the softmax temperature; 0 does not sample.")
]
TopP = Annotated[float, typer.Option(help="With --sample: nucleus sampling.", min=0.0, max=1.0)]
Seed = Annotated[int, typer.Option(help="With --sample: the random seed.")]
NoDrafts = Annotated[
    bool,
    typer.Option(
        "--no-drafts",
        help="Read one token at a time. By default the model also reads guesses from the datastore "
        "with it, which changes no word, where that is faster.",
    ),
]
Coverage = Annotated[
    choices.Coverage,
    typer.Option(
        help="With a cluster whose shares do not all answer in time. whole: that is an error; "
        "partial: go on without the entries of the late ones, and say so."
    ),
]
Port = Annotated[int, typer.Option(help="0 for any free port.", min=0, max=65535)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
