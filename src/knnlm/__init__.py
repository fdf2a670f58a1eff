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
    from knnlm.attachment import Attachment as Attachment
    from knnlm.attachment import attach as attach
    from knnlm.attribution import Explanation as Explanation
    from knnlm.attribution import explain as explain
    from knnlm.attribution import sum_credits as sum_credits
    from knnlm.corpus import Document as Document
    from knnlm.corpus import Documents as Documents
    from knnlm.corpus import read_documents as read_documents
    from knnlm.datastore.build import build as build
    from knnlm.datastore.datastore import Datastore as Datastore
    from knnlm.datastore.maintenance import compact as compact
    from knnlm.datastore.maintenance import verify as verify
    from knnlm.errors import KNNLMError as KNNLMError
    from knnlm.index.policy import open_index as open_index
    from knnlm.index.protocol import Index as Index
    from knnlm.index.protocol import Neighbors as Neighbors
    from knnlm.knn_lm import KNNLM as KNNLM
    from knnlm.language_model import LanguageModel as LanguageModel
    from knnlm.memory import Memory as Memory
    from knnlm.mixture.parameters import Parameters as Parameters
    from knnlm.perplexity import PerplexityReport as PerplexityReport
    from knnlm.reading import Windowing as Windowing
    from knnlm.tuning import Tuning as Tuning
    from knnlm.tuning import tune as tune

__version__ = "0.1.0"

_MODULES = {
    "Attachment": "attachment",
    "Datastore": "datastore.datastore",
    "Document": "corpus",
    "Documents": "corpus",
    "Explanation": "attribution",
    "Index": "index.protocol",
    "KNNLM": "knn_lm",
    "KNNLMError": "errors",
    "LanguageModel": "language_model",
    "Memory": "memory",
    "Neighbors": "index.protocol",
    "Parameters": "mixture.parameters",
    "PerplexityReport": "perplexity",
    "Tuning": "tuning",
    "Windowing": "reading",
    "attach": "attachment",
    "build": "datastore.build",
    "compact": "datastore.maintenance",
    "explain": "attribution",
    "open_index": "index.policy",
    "read_documents": "corpus",
    "sum_credits": "attribution",
    "tune": "tuning",
    "verify": "datastore.maintenance",
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
