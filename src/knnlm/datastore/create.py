"""Opening a datastore to store documents with a language model, or creating it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knnlm.choices import KeyDtype, parse_choice
from knnlm.datastore.catalog import SHARDS, Catalog, Settings, catalog_exists
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, LOCK_NAME, writer_lock, writing
from knnlm.datastore.tables import FILE_NAME
from knnlm.errors import DatastoreMismatchError, DatastoreWriteError, InvalidArgumentError
from knnlm.model.language_model import LanguageModel
from knnlm.rules import check_flag
from knnlm.text.windows import Windowing, choose_windowing


def open_or_create(
    path: Path,
    lm: LanguageModel,
    *,
    window: int | None,
    context: int | None,
    boundary: str | None,
    control_tokens: bool | None,
    key_dtype: str | None,
) -> Datastore:
    """Open the datastore at `path`, checked against the model and the given settings, or create it.

    Raises InvalidArgumentError, DatastoreMismatchError, DatastoreLockedError, DatastoreWriteError.
    """
    if control_tokens is not None:
        check_flag("control_tokens", control_tokens)
    if catalog_exists(path):
        store = Datastore(path)
        if store.is_unverified:
            raise DatastoreMismatchError(
                f"{path} was imported unverified, so that nothing can be added to it; prove it "
                f"first: knnlm import {path} --model MODEL"
            )
        asked = {"window": window, "context": context, "boundary": boundary}
        _check_same(store, asked | {"control_tokens": control_tokens, "key_dtype": key_dtype})
        store.check_model(lm)
        store.windowing.check_positions(lm.max_window, lm.name)
        return store
    windowing = choose_windowing(
        lm.max_window,
        lm.name,
        window=window,
        context=context,
        boundary=boundary,
        control_tokens=control_tokens,
    )
    return _create(path, _new_settings(lm, windowing, key_dtype or KeyDtype.float16))


def model_settings(lm: LanguageModel) -> dict[str, Any]:
    """Return the settings that a model decides, by name; the dimension is the keys' own."""
    return {
        "model": lm.name,
        "revision": lm.revision,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "weights_fingerprint": lm.weights_fingerprint,
        "tokenizer_fingerprint": lm.tokenizer_fingerprint,
        "vocab_size": lm.vocab_size,
        "start_token": lm.start_token,
        "key": lm.key,
    }


def _new_settings(lm: LanguageModel, windowing: Windowing, dtype: str) -> Settings:
    parse_choice(KeyDtype, "key_dtype", dtype)
    return Settings(
        **model_settings(lm),
        dimension=lm.dimension,
        key_dtype=dtype,
        window=windowing.window,
        context=windowing.context,
        boundary=windowing.boundary,
        control_tokens=windowing.control_tokens,
    )


def _check_same(store: Datastore, asked: Mapping[str, object]) -> None:
    for name, value in asked.items():
        stored = getattr(store.settings, name)
        if value is not None and value != stored:
            raise DatastoreMismatchError(
                f"{store.path} was built with {name} {stored}, not {value}; leave {name} out or "
                "build another datastore"
            )


def _create(path: Path, settings: Settings) -> Datastore:
    """Create an empty datastore in a new folder, or in the leftovers of a killed build."""
    leftovers = {SHARDS, LOCK_NAME, FILE_NAME + ASIDE}  # of a build that was killed early
    is_new = not path.exists()
    with writing(path):
        if path.exists() and not path.is_dir():
            raise InvalidArgumentError(f"{path} is a file, not a folder; name a new folder")
        if path.exists() and not {entry.name for entry in path.iterdir()} <= leftovers:
            raise InvalidArgumentError(
                f"{path} is a folder with other files in it, not a datastore; name a new folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / SHARDS).mkdir(exist_ok=True)
    with writer_lock(path):
        try:
            if not catalog_exists(path):
                Catalog.create(path, settings)
        except DatastoreWriteError:
            if is_new:
                shutil.rmtree(path)
            raise
    return Datastore(path)
