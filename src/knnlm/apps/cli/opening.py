"""Preparation that commands share: load the model, open datastores, check requirements."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnlm.choices import Boundary, Coverage, ModelDtype, Weights
from knnlm.errors import DatastoreWriteError, InvalidArgumentError, missing_dependency

if TYPE_CHECKING:
    from knnlm.datastore.datastore import Datastore
    from knnlm.knn_lm import KNNLM
    from knnlm.model.language_model import LanguageModel
    from knnlm.text.windows import Windowing


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which language model to load, in what precision, on which device."""

    name: str | None
    dtype: ModelDtype
    device: str


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """How to mix; k, lmbda and temperature: one value for all datastores, or one for each.

    None or an empty list stands for the tuned values. coverage: what searches on a cluster may
    leave out. pointers, skip: how searches are saved.
    """

    k: list[int] | None = None
    lmbda: list[float] | None = None
    temperature: list[float] | None = None
    weights: Weights | None = None
    cache: bool = False
    coverage: Coverage = Coverage.whole
    pointers: int | None = None
    skip: float = 0.0


def load_model(store: "Datastore", model: ModelOptions) -> "LanguageModel":
    """Load the language model that a datastore was built with; model.name says where from."""
    dtype = None if model.dtype is ModelDtype.auto else model.dtype
    return store.load_model(model.name, dtype=dtype, device=model.device)


def open_model(
    path: Path, also: Sequence[Path] | None, model: ModelOptions, mixture: MixtureOptions
) -> "KNNLM":
    """Open datastores and language model; bad parameters are refused before the model is loaded."""
    from knnlm.apps.cli.reports import warn_of_poor_recall
    from knnlm.datastore.datastore import Datastore
    from knnlm.index.policy import open_index
    from knnlm.index.report import describe_index
    from knnlm.knn_lm import KNNLM
    from knnlm.retrieval.retriever import choose_parameters
    from knnlm.retrieval.saved_searches import choose_saving

    stores = [Datastore(each) for each in (path, *(also or ()))]
    given = {
        "k": _single_or_list(mixture.k),
        "lmbda": _single_or_list(mixture.lmbda),
        "temperature": _single_or_list(mixture.temperature),
    }
    choose_parameters(stores, **given)
    choose_saving(stores, mixture.pointers, mixture.skip)
    for store in stores:
        warn_of_poor_recall(store.path, describe_index(store.catalog))
    lm = load_model(stores[0], model)
    for store in stores:
        store.check_model(lm)
    indexes = [open_index(store, str(lm.device), mixture.coverage) for store in stores]
    return KNNLM(
        lm,
        stores,
        **given,
        index=indexes,
        cache=mixture.cache,
        weights=mixture.weights,
        pointers=mixture.pointers,
        skip=mixture.skip,
    )


def _single_or_list(values: list[Any] | None) -> Any:
    """Return the value of an option given once, which then holds for every datastore."""
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def choose_windowing(
    model: "KNNLM", window: int | None, context: int | None, boundary: Boundary | None
) -> "Windowing":
    """Return the windows asked for; what was not asked for is as in the (first) datastore."""
    from knnlm.text.windows import choose_windowing

    return choose_windowing(
        model.lm.max_window,
        model.lm.name,
        window=window,
        context=context,
        boundary=boundary,
        default=model.windowing,
    )


def check_file_to_write(option: str, path: Path) -> None:
    """Refuse, before any work, a path that cannot be written as a file; names the option.

    Raises InvalidArgumentError and DatastoreWriteError.
    """
    if path.is_dir():
        raise InvalidArgumentError(f"{option} must be a file to write, got the folder {path}")
    if path.is_fifo() or path.is_socket():
        raise InvalidArgumentError(f"{option} must be a file to write, got a pipe, {path}")
    if not path.exists():
        check_writable(path.parent)
    elif not os.access(path, os.W_OK):
        raise DatastoreWriteError(
            f"cannot write {path}: no permission; change its permissions or choose another"
        )


def check_writable(folder: Path) -> None:
    """Raise DatastoreWriteError, before any work, if no file can be created in a folder."""
    if not folder.is_dir():
        rule = "it is not a folder; choose another one"
        if not folder.exists():
            rule = "no such folder; create it first"
        raise DatastoreWriteError(f"cannot write to {folder}: {rule}")
    if not os.access(folder, os.W_OK):
        raise DatastoreWriteError(
            f"cannot write to {folder}: the folder is not writable; change its permissions or "
            "choose another"
        )


def check_server_packages(purpose: str) -> None:
    """Raise MissingDependencyError if a package that the server needs is not installed."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise missing_dependency(package, purpose, "server")
