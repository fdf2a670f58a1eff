"""Tuning a datastore on its own text when it is new, and again when it has grown."""

import logging
from pathlib import Path

from knnlm.choices import Weights
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.errors import DatastoreCorruptError, KNNLMError
from knnlm.knn_lm import KNNLM
from knnlm.model.language_model import LanguageModel
from knnlm.progress import SILENT, Progress
from knnlm.tuning.stored_text import DEFAULT_TOKENS
from knnlm.tuning.tune import Tuning, tune

GROWTH = 1.25
"""A datastore that has so many times the entries that it was tuned with is tuned again."""
_PART = 20  # of the new entries: a token takes about twice as long as when it was built
_LEAST_TOKENS = 8192  # from fewer, gates learn little

_LOG = logging.getLogger(__name__)


def keep_tuned(
    store: Datastore | str | Path, lm: LanguageModel, progress: Progress = SILENT
) -> Tuning | None:
    """Tune a datastore on its own text, and store what was found, if it is time to.

    It is time if the datastore was never tuned, or if it was tuned on its own text alone and has
    grown by a quarter since, or what was stored then cannot be read, as after an update. What was
    tuned on held-out text, or together with other datastores, stays. Reads a twentieth of the new
    entries, which takes about a tenth of the time of building them, but at least 8,192 tokens, if
    there are so many, and at most 65,536. Returns None where nothing was done. Where tuning fails,
    the datastore stays as it is, and a warning says why.
    """
    store = open_datastore(store)
    before = _entries_when_tuned(store)
    if len(store) < max(GROWTH * before, 1):
        return None
    tokens = tokens_to_tune_on(len(store) - before)
    try:
        model = KNNLM(lm, store, weights=Weights.fixed)
        tuning = tune(model, max_tokens=tokens, progress=progress)
        tuning.save(store)
    except KNNLMError as error:
        _LOG.warning("%s is built, but could not be tuned: %s", store.path, error)
        return None
    return tuning


def tokens_to_tune_on(new_entries: int) -> int:
    """Return how many stored tokens a build reads again at its end."""
    return min(max(new_entries // _PART, _LEAST_TOKENS), DEFAULT_TOKENS)


def _entries_when_tuned(store: Datastore) -> int:
    """Return how many entries the datastore had; as many as now if its tuning is to stay."""
    if store.parameters is None:
        return 0
    origin = store.tuning or {}
    if origin.get("stored") is None or origin["text"] or origin["together_with"]:
        return len(store)
    try:
        store.mixture()
    except DatastoreCorruptError:
        return 0  # damaged, or with a gate of another version: only tuning again mends it
    entries: int = origin["entries"]
    return entries
