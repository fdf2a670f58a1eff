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
    from knnlm.datastore.build import build as build
    from knnlm.datastore.datastore import Datastore as Datastore
    from knnlm.datastore.maintenance import compact as compact
    from knnlm.datastore.maintenance import verify as verify
    from knnlm.errors import KNNLMError as KNNLMError
    from knnlm.evaluation.explain import explain as explain
    from knnlm.evaluation.explanation import Explanation as Explanation
    from knnlm.evaluation.explanation import sum_credits as sum_credits
    from knnlm.evaluation.perplexity import PerplexityReport as PerplexityReport
    from knnlm.index.policy import open_index as open_index
    from knnlm.index.protocol import Index as Index
    from knnlm.index.protocol import Neighbors as Neighbors
    from knnlm.knn_lm import KNNLM as KNNLM
    from knnlm.mixture.parameters import Parameters as Parameters
    from knnlm.model.language_model import LanguageModel as LanguageModel
    from knnlm.model.reading import Windowing as Windowing
    from knnlm.retrieval.retriever import Retriever as Retriever
    from knnlm.text.corpus import Document as Document
    from knnlm.text.corpus import Documents as Documents
    from knnlm.text.corpus import read_documents as read_documents
    from knnlm.tuning.tune import Tuning as Tuning
    from knnlm.tuning.tune import tune as tune

__version__ = "0.1.0"

_MODULES = {
    "Attachment": "attachment.attachment",
    "Datastore": "datastore.datastore",
    "Document": "text.corpus",
    "Documents": "text.corpus",
    "Explanation": "evaluation.explanation",
    "Index": "index.protocol",
    "KNNLM": "knn_lm",
    "KNNLMError": "errors",
    "LanguageModel": "model.language_model",
    "Retriever": "retrieval.retriever",
    "Neighbors": "index.protocol",
    "Parameters": "mixture.parameters",
    "PerplexityReport": "evaluation.perplexity",
    "Tuning": "tuning.tune",
    "Windowing": "model.reading",
    "attach": "attachment.attachment",
    "build": "datastore.build",
    "compact": "datastore.maintenance",
    "explain": "evaluation.explain",
    "open_index": "index.policy",
    "read_documents": "text.corpus",
    "sum_credits": "evaluation.explanation",
    "tune": "tuning.tune",
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
