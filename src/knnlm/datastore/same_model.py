"""Whether a model is the one whose keys are stored."""

from pathlib import Path

from knnlm.datastore.catalog import Settings
from knnlm.errors import DatastoreMismatchError
from knnlm.model.keyed_model import KeyedModel
from knnlm.model.language_model import LanguageModel


def check_same_model(path: Path, ours: Settings, model: KeyedModel) -> None:
    """Refuse a model whose keys or tokens are not comparable with those of a datastore.

    path, ours: the datastore's. For a model without a tokenizer, tokens are not checked; for a
    datastore that was imported without its model, no more than the key and the greatest token are.
    Raises DatastoreMismatchError, naming both models.
    """
    is_known = bool(ours.weights_fingerprint)
    pairs: list[tuple[str, object, object]] = [
        ("key dimension", ours.dimension, model.dimension),
        ("key", ours.key, model.key),
    ]
    if is_known or ours.vocab_size > model.vocab_size:
        pairs.insert(0, ("vocabulary size", ours.vocab_size, model.vocab_size))
    if isinstance(model, LanguageModel) and is_known:
        pairs += [
            ("tokenizer", ours.tokenizer_fingerprint[:12], model.tokenizer_fingerprint[:12]),
            ("start token", ours.start_token, model.start_token),
        ]
    if is_known:
        weights = (ours.weights_fingerprint[:12], model.weights_fingerprint[:12])
        pairs.append(("weights", *weights))
    for property_name, stored, given in pairs:
        if stored != given:
            remedy = "load that model"
            if property_name == "weights":
                remedy = model.remedy_for_weights(ours.model_dtype)
            raise DatastoreMismatchError(
                f"{path} was built with {ours.model} ({property_name} {stored}), not with "
                f"{model.name} ({property_name} {given}); {remedy} or build another datastore"
            )
