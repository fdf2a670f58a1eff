"""Named tuples of tensors that have a row for each query: selected, and joined again."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

Rows = TypeVar("Rows", bound=tuple[Tensor, ...])


def select(rows: Rows, queries: slice | Int[Tensor, " some"]) -> Rows:
    """Return the rows of some of the queries."""
    return type(rows)(*(column[queries] for column in rows))


def join(parts: Sequence[Rows]) -> Rows:
    """Join the rows of consecutive queries."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))
