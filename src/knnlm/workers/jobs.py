"""What a build and its workers say to each other: paths and numbers. Arrays lie in files.

Knows neither how messages travel nor who decides what is to be done.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from knnlm import errors
from knnlm.datastore.catalog import ShardFile
from knnlm.datastore.files import writing
from knnlm.errors import DatastoreMismatchError, KNNLMError
from knnlm.model.language_model import LanguageModel
from knnlm.text.windows import Span, Window


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a worker loads the model from; see `LanguageModel`. dtype: of its weights."""

    name: str
    revision: str | None
    key: str
    dtype: str
    weights_fingerprint: str

    @classmethod
    def of(cls, lm: LanguageModel) -> "ModelSource":
        """Return where the workers find a model that the build has loaded."""
        dtype = str(lm.dtype).removeprefix("torch.")
        return cls(lm.name, lm.revision, lm.key, dtype, lm.weights_fingerprint)

    def load(self, device: str, threads: int) -> LanguageModel:
        """Load the model, and have torch use so many threads.

        Raises the errors of `LanguageModel.load`, and DatastoreMismatchError for other weights.
        """
        torch.set_num_threads(threads)
        lm = LanguageModel.load(
            self.name, key=self.key, dtype=self.dtype, device=device, revision=self.revision
        )
        if lm.weights_fingerprint != self.weights_fingerprint:
            raise DatastoreMismatchError(
                f"workers must load the same model, but {self.name} has other weights than the one "
                "given to build: save it with LanguageModel.save and load it from that folder"
            )
        return lm


@dataclass(frozen=True, slots=True)
class Post:
    """What a worker is told first: its model, and where it computes."""

    source: ModelSource
    device: str
    threads: int

    def load(self) -> LanguageModel:
        """Load the model; raises the errors of `ModelSource.load`."""
        return self.source.load(self.device, self.threads)


@dataclass(frozen=True, slots=True)
class Job:
    """A unit for a worker: a file of `save_windows` to be read, a file of a shard to be written.

    alone: windows that are read by themselves first, because a worker ended while it read them.
    """

    windows: Path
    shard: Path
    key_dtype: str
    alone: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded the model."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The worker begins to read these windows of its unit; those before are done.

    alone: only to see whether it survives.
    """

    windows: tuple[int, ...]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """The unit's shard is written."""

    file: ShardFile


@dataclass(frozen=True, slots=True)
class Failed:
    """The model could not be loaded, or the unit not be read: the class of an error, its text."""

    kind: str
    text: str

    @classmethod
    def because(cls, error: Exception) -> "Failed":
        """Describe an error."""
        return cls(type(error).__name__, str(error))

    def known(self) -> KNNLMError | None:
        """Return the error if it is one that knnlm raises on purpose."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, KNNLMError):
            return kind(self.text)
        return None


@dataclass(frozen=True, slots=True)
class Died:
    """The worker is no more."""

    reason: str


Message: TypeAlias = Ready | Reading | Made | Failed | Died


def save_windows(path: Path, windows: Sequence[Window], names: Mapping[int, str]) -> None:
    """Write windows, and the names of their documents by number, for `load_windows`.

    Raises DatastoreWriteError.
    """
    spans = [(number, span) for number, window in enumerate(windows) for span in window.spans]
    arrays = {
        "tokens": np.concatenate([window.tokens for window in windows]),
        "lengths": np.array([len(window.tokens) for window in windows]),
        "contexts": np.array([window.context for window in windows]),
        "spans": np.array([(number, span.document, span.count) for number, span in spans]),
        "in_part": np.array([window.stored is not None for window in windows]),
        "stored": np.concatenate([_stored(window) for window in windows]),
    }
    data = save(arrays, {"names": json.dumps(list(names.items()))})
    with writing(path):
        path.write_bytes(data)


def load_windows(path: Path) -> tuple[list[Window], dict[int, str]]:
    """Read a file of `save_windows`."""
    with safe_open(path, "numpy") as file:
        tokens, lengths, contexts, spans, in_part, stored = map(
            file.get_tensor, ("tokens", "lengths", "contexts", "spans", "in_part", "stored")
        )
        names = dict(json.loads(file.metadata()["names"]))
    of_window: list[list[Span]] = [[] for _ in lengths]
    for number, document, count in spans.tolist():
        of_window[number].append(Span(document, count))
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    chosen = np.split(stored, np.cumsum(lengths - 1 - contexts)[:-1])
    windows = [
        Window(part, context, tuple(its_spans), its_stored if some else None)
        for part, context, its_spans, its_stored, some in zip(
            parts, contexts.tolist(), of_window, chosen, in_part.tolist(), strict=True
        )
    ]
    return windows, names


def _stored(window: Window) -> NDArray[np.bool_]:
    return np.ones(window.new, np.bool_) if window.stored is None else window.stored
