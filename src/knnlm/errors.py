"""Every error that knnlm raises on purpose.

Each one is a `KNNLMError` and also the built-in error that a caller who does not know knnlm would
catch. Messages are one line: the argument, the rule, the value it had, and the remedy.
"""

import importlib
from typing import Any


class KNNLMError(Exception):
    """Base of all errors raised on purpose; the command line prints it in one line and exits 1."""


class InvalidArgumentError(KNNLMError, ValueError):
    """An argument breaks its rule: λ outside [0, 1], k < 1, context ≥ window, …."""


class TextNotFoundError(KNNLMError, FileNotFoundError):
    """A text source names no file, no folder, no match and no dataset."""


class InvalidTextError(KNNLMError, ValueError):
    """A text source was found but cannot be read: not UTF-8, malformed, empty, a missing column."""


class ModelNotFoundError(KNNLMError, OSError):
    """A language model or its tokenizer cannot be loaded."""


class UnsupportedModelError(KNNLMError, ValueError):
    """The model is not a decoder-only language model, or lacks something that was requested."""


class NonFiniteKeysError(KNNLMError, ValueError):
    """A key is NaN or infinite, or too large for the datastore's key dtype."""


class DatastoreNotFoundError(KNNLMError, FileNotFoundError):
    """The path is not a knnlm datastore."""


class DatastoreMismatchError(KNNLMError, ValueError):
    """The datastore was built with another model, tokenizer or setting than the one in use."""


class DatastoreLockedError(KNNLMError, BlockingIOError):
    """Another process is writing to the datastore."""


class DatastoreCorruptError(KNNLMError, OSError):
    """Files of the datastore are missing, damaged, unreadable, or of an unknown format."""


class DatastoreWriteError(KNNLMError, OSError):
    """The datastore cannot be written: disk full, no permission."""


class DatastoreChangedError(KNNLMError, RuntimeError):
    """The datastore was compacted since it was opened; open it again."""


class WorkerError(KNNLMError, RuntimeError):
    """The workers of a build cannot go on: none starts, or they end again and again."""


class ClusterError(KNNLMError, ConnectionError):
    """A datastore's cluster cannot be reached, is late, or holds another state of the datastore."""


class AttachmentError(KNNLMError, RuntimeError):
    """A datastore is attached to a model that already has one, or detached from one without."""


class MissingDependencyError(KNNLMError, ImportError):
    """An optional package is not installed; the message has the `pip install` line."""


def missing_dependency(package: str, purpose: str, extra: str) -> MissingDependencyError:
    """Return the error for an optional package that is not installed, with the remedy."""
    return MissingDependencyError(
        f"{purpose} needs the package {package}: pip install 'knnlm[{extra}]' "
        f"(from a clone: pip install '.[{extra}]')"
    )


def import_optional(module: str, purpose: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises MissingDependencyError if the package is not installed. Whatever else prevents the
    import, such as too little memory, keeps its own error.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise missing_dependency(package, purpose, extra) from None
