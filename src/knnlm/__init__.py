"""Give any Hugging Face causal language model a memory of your text, without training it.

    lm = knnlm.LanguageModel.load("HuggingFaceTB/SmolLM2-135M")
    store = knnlm.build("docs.store", lm, knnlm.read_documents("docs/"))
    model = knnlm.KNNLM(lm, store)
    model.perplexity(knnlm.read_documents("held-out/"))

The names below are loaded on first use: importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knnlm.attachment.attachment import Attachment as Attachment
    from knnlm.attachment.attachment import attach as attach
    from knnlm.datastore.datastore import Datastore as Datastore
    from knnlm.errors import AttachmentError as AttachmentError
    from knnlm.errors import DatastoreChangedError as DatastoreChangedError
    from knnlm.errors import DatastoreCorruptError as DatastoreCorruptError
    from knnlm.errors import DatastoreLockedError as DatastoreLockedError
    from knnlm.errors import DatastoreMismatchError as DatastoreMismatchError
    from knnlm.errors import DatastoreNotFoundError as DatastoreNotFoundError
    from knnlm.errors import DatastoreWriteError as DatastoreWriteError
    from knnlm.errors import InvalidArgumentError as InvalidArgumentError
    from knnlm.errors import InvalidTextError as InvalidTextError
    from knnlm.errors import KNNLMError as KNNLMError
    from knnlm.errors import MissingDependencyError as MissingDependencyError
    from knnlm.errors import ModelNotFoundError as ModelNotFoundError
    from knnlm.errors import NonFiniteKeysError as NonFiniteKeysError
    from knnlm.errors import TextNotFoundError as TextNotFoundError
    from knnlm.errors import UnsupportedModelError as UnsupportedModelError
    from knnlm.evaluation.explain import explain as explain
    from knnlm.evaluation.explanation import Explanation as Explanation
    from knnlm.evaluation.explanation import sum_credits as sum_credits
    from knnlm.evaluation.perplexity import PerplexityReport as PerplexityReport
    from knnlm.index.policy import build_index as build_index
    from knnlm.index.policy import open_index as open_index
    from knnlm.index.protocol import Index as Index
    from knnlm.index.protocol import Neighbors as Neighbors
    from knnlm.knn_lm import KNNLM as KNNLM
    from knnlm.knn_lm import Generation as Generation
    from knnlm.maintenance import build as build
    from knnlm.maintenance import compact as compact
    from knnlm.maintenance import verify as verify
    from knnlm.mixture.continuous_cache import CacheParameters as CacheParameters
    from knnlm.mixture.parameters import Parameters as Parameters
    from knnlm.model.language_model import LanguageModel as LanguageModel
    from knnlm.retrieval.retriever import Retriever as Retriever
    from knnlm.text.corpus import Document as Document
    from knnlm.text.corpus import Documents as Documents
    from knnlm.text.corpus import read_documents as read_documents
    from knnlm.text.windows import Windowing as Windowing
    from knnlm.tuning.tune import Tuning as Tuning
    from knnlm.tuning.tune import tune as tune

__version__ = "0.1.0"

_MODULES = {
    "Attachment": "attachment.attachment",
    "AttachmentError": "errors",
    "CacheParameters": "mixture.continuous_cache",
    "Datastore": "datastore.datastore",
    "DatastoreChangedError": "errors",
    "DatastoreCorruptError": "errors",
    "DatastoreLockedError": "errors",
    "DatastoreMismatchError": "errors",
    "DatastoreNotFoundError": "errors",
    "DatastoreWriteError": "errors",
    "Document": "text.corpus",
    "Documents": "text.corpus",
    "Explanation": "evaluation.explanation",
    "Generation": "knn_lm",
    "Index": "index.protocol",
    "InvalidArgumentError": "errors",
    "InvalidTextError": "errors",
    "KNNLM": "knn_lm",
    "KNNLMError": "errors",
    "LanguageModel": "model.language_model",
    "MissingDependencyError": "errors",
    "ModelNotFoundError": "errors",
    "Neighbors": "index.protocol",
    "NonFiniteKeysError": "errors",
    "Parameters": "mixture.parameters",
    "PerplexityReport": "evaluation.perplexity",
    "Retriever": "retrieval.retriever",
    "TextNotFoundError": "errors",
    "Tuning": "tuning.tune",
    "UnsupportedModelError": "errors",
    "Windowing": "text.windows",
    "attach": "attachment.attachment",
    "build": "maintenance",
    "build_index": "index.policy",
    "compact": "maintenance",
    "explain": "evaluation.explain",
    "open_index": "index.policy",
    "read_documents": "text.corpus",
    "sum_credits": "evaluation.explanation",
    "tune": "tuning.tune",
    "verify": "maintenance",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'knnlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"knnlm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
