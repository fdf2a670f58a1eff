"""Give any Hugging Face causal language model a memory of your text, without training it.

    lm = knnlm.LanguageModel.load("HuggingFaceTB/SmolLM2-135M")
    store = knnlm.build("docs.store", lm, knnlm.read_documents("docs/"))
    model = knnlm.KNNLM(lm, store)
    model.perplexity(knnlm.read_documents("held-out/"))

Importing the package imports no torch: whatever needs it is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING

from knnlm.errors import (
    AttachmentError as AttachmentError,
    ClusterError as ClusterError,
    DatastoreChangedError as DatastoreChangedError,
    DatastoreCorruptError as DatastoreCorruptError,
    DatastoreLockedError as DatastoreLockedError,
    DatastoreMismatchError as DatastoreMismatchError,
    DatastoreNotFoundError as DatastoreNotFoundError,
    DatastoreWriteError as DatastoreWriteError,
    InvalidArgumentError as InvalidArgumentError,
    InvalidTextError as InvalidTextError,
    KNNLMError as KNNLMError,
    MissingDependencyError as MissingDependencyError,
    ModelNotFoundError as ModelNotFoundError,
    NonFiniteKeysError as NonFiniteKeysError,
    TextNotFoundError as TextNotFoundError,
    UnsupportedModelError as UnsupportedModelError,
    WorkerError as WorkerError,
)

if TYPE_CHECKING:
    from knnlm.attachment.attachment import Attachment as Attachment, attach as attach
    from knnlm.choices import (
        ArrayFormat as ArrayFormat,
        Boundary as Boundary,
        Coverage as Coverage,
        IndexKind as IndexKind,
        Key as Key,
        KeyDtype as KeyDtype,
        ModelDtype as ModelDtype,
        Similarity as Similarity,
        TextFormat as TextFormat,
        Weights as Weights,
    )
    from knnlm.datastore.catalog import Settings as Settings
    from knnlm.datastore.compaction import Compaction as Compaction
    from knnlm.datastore.datastore import Datastore as Datastore, Passage as Passage
    from knnlm.datastore.overlap import Overlap as Overlap
    from knnlm.datastore.sources import Changes as Changes
    from knnlm.datastore.stored_cluster import StoredCluster as StoredCluster
    from knnlm.datastore.tables import StoredDocument as StoredDocument
    from knnlm.datastore.verification import Verification as Verification
    from knnlm.evaluation.explain import explain as explain
    from knnlm.evaluation.explanation import (
        Credit as Credit,
        Explanation as Explanation,
        Explanations as Explanations,
        Source as Source,
        Vote as Vote,
        sum_credits as sum_credits,
    )
    from knnlm.evaluation.passages import FoundPassage as FoundPassage
    from knnlm.evaluation.perplexity import (
        Measure as Measure,
        PerplexityReport as PerplexityReport,
        Seconds as Seconds,
    )
    from knnlm.evaluation.saved_searches import Searches as Searches
    from knnlm.evaluation.tally import FrequencyBucket as FrequencyBucket
    from knnlm.exchange.exporting import (
        Exported as Exported,
        export_datastore as export_datastore,
    )
    from knnlm.exchange.importing import (
        import_datastore as import_datastore,
        prove_import as prove_import,
    )
    from knnlm.exchange.proof import Proof as Proof
    from knnlm.index.cluster.control import (
        ActorReport as ActorReport,
        cluster_status as cluster_status,
        start_cluster as start_cluster,
        stop_cluster as stop_cluster,
    )
    from knnlm.index.policy import (
        build_index as build_index,
        keep_index as keep_index,
        open_index as open_index,
    )
    from knnlm.index.protocol import Index as Index, Neighbors as Neighbors
    from knnlm.knn_lm import KNNLM as KNNLM, Generation as Generation
    from knnlm.maintenance import build as build, compact as compact, verify as verify
    from knnlm.mixture.continuous_cache import CacheParameters as CacheParameters
    from knnlm.mixture.parameters import Parameters as Parameters
    from knnlm.mixture.stored import TunedMixture as TunedMixture
    from knnlm.model.language_model import LanguageModel as LanguageModel
    from knnlm.progress import Advance as Advance, Progress as Progress
    from knnlm.retrieval.retriever import Retriever as Retriever
    from knnlm.text.documents import Document as Document, Documents as Documents
    from knnlm.text.sources import read_documents as read_documents
    from knnlm.text.windows import Windowing as Windowing
    from knnlm.tuning.fitting import Fit as Fit
    from knnlm.tuning.stored_text import StoredSample as StoredSample
    from knnlm.tuning.sweep import Sweep as Sweep, Trial as Trial
    from knnlm.tuning.tune import Tuning as Tuning, tune as tune
    from knnlm.tuning.upkeep import keep_tuned as keep_tuned

__version__ = "0.1.0"

# what takes long to load: module → names
_LAZY = {
    "attachment.attachment": ("Attachment", "attach"),
    "choices": (
        *("ArrayFormat", "Boundary", "Coverage", "IndexKind", "Key", "KeyDtype", "ModelDtype"),
        *("Similarity", "TextFormat", "Weights"),
    ),
    "datastore.catalog": ("Settings",),
    "datastore.compaction": ("Compaction",),
    "datastore.datastore": ("Datastore", "Passage"),
    "datastore.overlap": ("Overlap",),
    "datastore.sources": ("Changes",),
    "datastore.tables": ("StoredDocument",),
    "datastore.verification": ("Verification",),
    "evaluation.explain": ("explain",),
    "evaluation.explanation": (
        *("Credit", "Explanation", "Explanations", "Source", "Vote", "sum_credits"),
    ),
    "evaluation.passages": ("FoundPassage",),
    "evaluation.perplexity": ("Measure", "PerplexityReport", "Seconds"),
    "evaluation.saved_searches": ("Searches",),
    "evaluation.tally": ("FrequencyBucket",),
    "exchange.exporting": ("Exported", "export_datastore"),
    "exchange.importing": ("import_datastore", "prove_import"),
    "exchange.proof": ("Proof",),
    "datastore.stored_cluster": ("StoredCluster",),
    "index.cluster.control": ("ActorReport", "cluster_status", "start_cluster", "stop_cluster"),
    "index.policy": ("build_index", "keep_index", "open_index"),
    "index.protocol": ("Index", "Neighbors"),
    "knn_lm": ("Generation", "KNNLM"),
    "maintenance": ("build", "compact", "verify"),
    "mixture.continuous_cache": ("CacheParameters",),
    "mixture.parameters": ("Parameters",),
    "mixture.stored": ("TunedMixture",),
    "model.language_model": ("LanguageModel",),
    "progress": ("Advance", "Progress"),
    "retrieval.retriever": ("Retriever",),
    "text.documents": ("Document", "Documents"),
    "text.sources": ("read_documents",),
    "text.windows": ("Windowing",),
    "tuning.fitting": ("Fit",),
    "tuning.stored_text": ("StoredSample",),
    "tuning.sweep": ("Sweep", "Trial"),
    "tuning.tune": ("Tuning", "tune"),
    "tuning.upkeep": ("keep_tuned",),
}
_MODULES = {name: module for module, names in _LAZY.items() for name in names}

__all__ = sorted([*_MODULES, *(name for name in globals() if name.endswith("Error"))])


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'knnlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"knnlm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
