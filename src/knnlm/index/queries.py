"""Real queries to measure an index with: keys of text that is not in the datastore.

Stored keys are easier to find than they: each has the rest of its own document for neighbors.
"""

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.overlap import find_overlap
from knnlm.errors import InvalidArgumentError
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import EncodedDocument, cut_documents, read_keys
from knnlm.progress import SILENT, Progress
from knnlm.text.documents import Document

TOKENS = 8192
_WINDOWS_AT_ONCE = 8


def held_out_queries(
    lm: LanguageModel,
    store: Datastore,
    documents: Iterable[Document],
    max_tokens: int = TOKENS,
    progress: Progress = SILENT,
) -> Float[Tensor, "query dim"]:
    """Read the first `max_tokens` of some documents, in the datastore's windows; return the keys.

    Warns of text that is stored. Raises DatastoreMismatchError for another model than the
    datastore's, and InvalidArgumentError for documents without text.
    """
    store.check_model(lm)
    read: list[EncodedDocument] = []
    windows = cut_documents(lm, documents, store.windowing, max_tokens, on_document=read.append)
    keys: list[Tensor] = []
    targets: list[Int32[np.ndarray, " _"]] = []
    with progress.task("read held-out text", max_tokens, "tokens") as advance:
        while some := list(islice(windows, _WINDOWS_AT_ONCE)):
            of_window = dict(read_keys(lm, some))
            for window_keys in of_window.values():
                lm.check_numbers(window_keys, finite=True)
            targets += [window.targets for window in some]
            keys += [of_window[number].float().cpu() for number in range(len(some))]
            advance(sum(window.new for window in some))
    if not keys:
        raise InvalidArgumentError("the documents to take queries from hold no text; give others")
    find_overlap([store], read, targets)
    return torch.cat(keys)
