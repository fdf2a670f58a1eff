"""Inner products of 8-bit codes, in whichever arithmetic is fastest on this processor.

Both ways give the same integers: a sum of up to 1,040 products of 7-bit magnitudes is below 2²⁴,
so float32 holds it exactly.
"""

import threading
import timeit
from collections.abc import Callable
from functools import cache, partial

import torch
from jaxtyping import Float32, Int8, Int32
from torch import Tensor

LARGEST_EXACT_CODE_DIM = 2**24 // 127**2


_buffers = threading.local()


def buffer(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """Return `size` elements that this thread may overwrite until it asks for them again."""
    held: Tensor | None = getattr(_buffers, name, None)
    if held is None or len(held) < size:
        # a fresh array costs more in page faults than the arithmetic that fills it
        held = torch.empty(size + size // 2, dtype=dtype)
        setattr(_buffers, name, held)
    return held[:size]


def integer_products(
    queries: Int8[Tensor, "query code_dim"], keys: Int8[Tensor, "key code_dim"]
) -> Int32[Tensor, "query key"]:
    """Return the products in int32; see `products`."""
    shape = len(queries), len(keys)
    out = buffer("integers", shape[0] * shape[1], torch.int32).view(shape)
    return torch._int_mm(queries, keys.T, out=out)


def float_products(
    queries: Int8[Tensor, "query code_dim"], keys: Int8[Tensor, "key code_dim"]
) -> Float32[Tensor, "query key"]:
    """Return the products in float32; see `products`."""
    shape = len(queries), len(keys)
    out = buffer("floats", shape[0] * shape[1], torch.float32).view(shape)
    left = buffer("left", queries.numel(), torch.float32).view(queries.shape)
    right = buffer("right", keys.numel(), torch.float32).view(keys.shape)
    return torch.mm(left.copy_(queries), right.copy_(keys).T, out=out)


@cache
def products() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the faster way to compute ⟨query code, key code⟩ of all pairs, exactly.

    Both are tried for a millisecond. Products are valid until the thread's next call.
    """
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-127, 128, (128, 256), generator=generator).to(torch.int8)
    keys = torch.randint(-127, 128, (512, 256), generator=generator).to(torch.int8)
    try:
        same = torch.equal(integer_products(queries, keys).float(), float_products(queries, keys))
    except (RuntimeError, AttributeError):  # integer products are not there on every processor
        return float_products
    integer_seconds, float_seconds = (
        min(timeit.repeat(partial(multiply, queries, keys), number=1))
        for multiply in (integer_products, float_products)
    )
    return integer_products if same and integer_seconds < float_seconds else float_products
