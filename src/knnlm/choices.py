"""The values that named choices take, shared by the library and the command line.

Each choice is a string enum: wherever one is an argument, its plain string works too. Imports
nothing heavy, so that the command line can show its help without loading torch.
"""

from enum import StrEnum
from typing import TypeVar

from knnlm.errors import InvalidArgumentError

Choice = TypeVar("Choice", bound=StrEnum)


class Boundary(StrEnum):
    """Whether documents see each other: each starts afresh, or all are one stream."""

    document = "document"
    stream = "stream"


class Key(StrEnum):
    """Which hidden state of the last layer is the key (Khandelwal et al. 2020, Table 5).

    The paper's choice, and the default, is ffn_input; output_after_norm is what the LM head reads.
    """

    ffn_input = "ffn_input"
    ffn_input_before_norm = "ffn_input_before_norm"
    attention_input = "attention_input"
    attention_input_before_norm = "attention_input_before_norm"
    output = "output"
    output_after_norm = "output_after_norm"


class KeyDtype(StrEnum):
    """Precision of the keys on disk."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class ModelDtype(StrEnum):
    """Precision of the model's arithmetic; auto is float32 on a CPU, else the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class IndexKind(StrEnum):
    """How a datastore is searched; auto chooses by its size and the machine's memory.

    ivf copies the keys, compressed reads the datastore's own, codes needs no keys once it is built.
    """

    auto = "auto"
    exact = "exact"
    ivf = "ivf"
    compressed = "compressed"
    codes = "codes"
    faiss = "faiss"


class Weights(StrEnum):
    """What chooses the weight of each token's neighbors.

    learned: the gate that `tune` learned. distance: λ by the nearest distance (Drozdov et al.
    2022), as tuned. fixed: one λ and T for all tokens, the paper's.
    """

    learned = "learned"
    distance = "distance"
    fixed = "fixed"


class Coverage(StrEnum):
    """What a search on a cluster may leave out: nothing, or the entries of shares that are late."""

    whole = "whole"
    partial = "partial"


class TextFormat(StrEnum):
    """What a text file holds; auto goes by the end of its name.

    One document: as text, or in a web page, a PDF or a notebook. Or rows, a document in each.
    """

    auto = "auto"
    text = "text"
    html = "html"
    pdf = "pdf"
    notebook = "notebook"
    jsonl = "jsonl"
    json = "json"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"


class ArrayFormat(StrEnum):
    """The files in which a datastore is kept elsewhere: two arrays, or Arrow's tables.

    original: of Khandelwal et al. 2020, like knn-transformers and knn-box raw arrays without a
    header. arrow: columns keys and vals, as of Memory Decoder. npy: NumPy's own files.
    """

    original = "original"
    knn_transformers = "knn-transformers"
    knn_box = "knn-box"
    arrow = "arrow"
    npy = "npy"


class Similarity(StrEnum):
    """How the continuous cache compares hidden states: −‖h − h_i‖², or the paper's h·h_i."""

    distance = "distance"
    dot = "dot"


def parse_choice(choices: type[Choice], argument: str, value: str) -> Choice:
    """Return `value` as one of `choices`; raises InvalidArgumentError, naming the argument."""
    try:
        return choices(value)
    except ValueError:
        raise InvalidArgumentError(
            f"{argument} must be one of {', '.join(choices)}, got {value!r}"
        ) from None
