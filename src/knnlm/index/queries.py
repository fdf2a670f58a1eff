"""Real queries to measure an index with: keys of text that is not in the datastore.

Stored keys are easier to find than they: each has the rest of its own document for neighbors.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import cut_documents, read_keys
from knnlm.progress import SILENT, Progress
from knnlm.text.corpus import Document

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

    Raises DatastoreMismatchError for another model than the datastore's, and InvalidArgumentError
    for documents without text.
    """
    store.check_model(lm)
    windows = cut_documents(lm, documents, store.windowing, max_tokens)
    keys: list[Tensor] = []
    with progress.task("read held-out text", max_tokens, "tokens") as advance:
        while some := list(islice(windows, _WINDOWS_AT_ONCE)):
            of_window = dict(read_keys(lm, some))
            for window_keys in of_window.values():
                lm.check_numbers(window_keys, finite=True)
            keys += [of_window[number].float().cpu() for number in range(len(some))]
            advance(sum(window.new for window in some))
    if not keys:
        raise InvalidArgumentError("the documents to take queries from hold no text; give others")
    return torch.cat(keys)
