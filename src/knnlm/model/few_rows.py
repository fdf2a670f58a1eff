"""Passes over a few positions: products with weights in the order that is faster for them.

MKL multiplies two to four rows with a matrix in twice the time of one row; with the factors
exchanged it takes no longer than for one. Results differ by rounding alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

_ROWS = range(2, 5)


class FewRows:
    """Lets the linear layers of a model on a CPU multiply few rows fast, inside a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear
            and module.weight.is_cpu
            and module.weight.dtype == torch.float32
            and "forward" not in vars(module)
        ]
        self._helps: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]

    @contextmanager
    def reading(self, rows: int) -> Iterator[None]:
        """Apply to a pass that reads this many positions, where it helps."""
        layers = self._layers if self._helps and rows in _ROWS else []
        for layer in layers:
            layer.forward = partial(_exchanged, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def _exchanged(
    layer: nn.Linear, inputs: Float[Tensor, "*position in"]
) -> Float[Tensor, "*position out"]:
    rows = inputs.reshape(-1, inputs.shape[-1])
    outputs = torch.mm(layer.weight, rows.T).T.contiguous()
    if layer.bias is not None:
        outputs += layer.bias
    return outputs.view(*inputs.shape[:-1], -1)
