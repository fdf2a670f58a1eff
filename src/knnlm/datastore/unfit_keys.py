"""Which keys have distances, and the errors for those that have none.

None is stored: a datastore that holds one is damaged, or is older than this rule.
"""

from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor

from knnlm.errors import DatastoreCorruptError, NonFiniteKeysError

MAX_NORM = 1e18
"""The greatest norm of keys and queries: float32 holds any squared distance between them."""


def measurable(vectors: Float[Tensor, "n dim"]) -> Bool[Tensor, " n"]:
    """Return which keys or queries have distances: all but NaN, infinite and longer than 1e18."""
    return vectors.float().square().sum(dim=1) <= MAX_NORM**2


def why_unmeasurable(vectors: Float[Tensor, "n dim"]) -> str:
    """Return what is wrong with vectors of which one is not `measurable`."""
    finite = bool(vectors.isfinite().all())
    return f"longer than {MAX_NORM:g}" if finite else "not finite"


def unfit_key(
    path: Path, row: int, document: str, key: Float[Tensor, " dim"]
) -> DatastoreCorruptError:
    """Return the error for a stored key, in the file `path`, that is not `measurable`."""
    return DatastoreCorruptError(
        f"{path}: the key of row {row}, in document {document!r}, is "
        f"{why_unmeasurable(key[None])}; restore the datastore from a copy, or forget that "
        "document and run knnlm compact"
    )


def unfit_new_key(
    document: str, keys: Float[Tensor, "new dim"], key_dtype: str, model: str
) -> NonFiniteKeysError:
    """Return the error for the keys of a window, as computed, that cannot be stored.

    model: its name and dtype, as the message shows them.
    """
    if bool(measurable(keys).all()):
        return NonFiniteKeysError(
            f"key_dtype {key_dtype} cannot hold a key of {document} (largest magnitude "
            f"{float(keys.abs().max()):.4g}); build another datastore with key_dtype bfloat16"
        )
    return NonFiniteKeysError(
        f"a key of {document} is {why_unmeasurable(keys)}: {model} overflows there; "
        "load it in float32 or leave the document out"
    )
