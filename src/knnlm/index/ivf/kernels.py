"""The loops of an inverted-file search that tensors cannot express, compiled by numba for the CPU.

Knows arrays, not indexes: scores, candidates, exact distances. Every kernel releases the GIL and
runs on one thread; the caller runs several. NumPy selects and sorts: in batches kernels of our own
took 23 µs a query against 19 for 1,024 of 1,500 candidates, and 13 against 6 for 128 of them.

A *score* is half the squared distance, less a constant of the query, estimated from codes:
half_norm − query_step · key_step · ⟨query code, key code⟩.

Arrays travel in named tuples; unpacking one costs 0.5 µs a call, in all 2 % of a single query's
time.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]
CACHE_LINE = 64
_KEYS_AHEAD = 2
_INFINITE_BITS = 0x7F800000
_PLACE_BITS = 0xFFFFFFFF


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel, at its first use; it releases the GIL."""
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        # sums may be reordered, so that they vectorize; infinities and NaN keep their meaning
        "fastmath": {"reassoc", "contract", "nsz"},
    }
    source = inspect.unwrap(function)  # without what checks types in tests
    try:
        kernel: Callable[..., Any] = njit(cache=True, **options)(source)
    except RuntimeError:  # no folder is writable: compile in every process
        kernel = njit(**options)(source)
    return kernel


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let kernels call what a function generates."""
    generated: Callable[..., Any] = intrinsic(inspect.unwrap(function))
    return generated


@_intrinsic
def as_float32(context: Any, element: Any) -> Any:
    """Widen an element of a key: float32 itself, or 16 bits as `key_bits` gives them."""

    def widen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if element == types.float32:
            return arguments[0]
        if element == types.uint16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        wide = builder.zext(arguments[0], ir.IntType(32))  # bfloat16 is the upper half of float32
        return builder.bitcast(builder.shl(wide, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(element), widen


@_intrinsic
def add_product(context: Any, total: Any, one: Any, other: Any) -> Any:
    """Add the product of two codes to a 32-bit sum; numba's own integers would widen to 64 bits."""

    def add(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = [builder.sext(code, ir.IntType(32)) for code in arguments[1:]]
        return builder.add(arguments[0], builder.mul(*wide))

    return types.int32(types.int32, types.int8, types.int8), add


@_intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the memory at an address to be in the cache soon; harmless at any address."""

    def ask(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        )
        where = builder.inttoptr(arguments[0], pointer)
        builder.call(function, [where, word(0), word(3), word(1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(types.int64), ask


class Scales(NamedTuple):
    """The steps and half norms of some keys; see `Codes`."""

    steps: Array
    half_norms: Array


class Kept(NamedTuple):
    """Candidates of some queries in one list; `counts` says how many are each query's."""

    distances: Array
    positions: Array
    counts: Array


class Pairs(NamedTuple):
    """Pairs of queries and rows: row i with the query at `query_of_row[i]`."""

    queries: Array
    query_of_row: Array
    rows: Array


class Nearest(NamedTuple):
    """The nearest rows of each query and their squared distances [query, k]."""

    distances: Array
    rows: Array


@compiled
def unpack(packed: Array, codes: Array) -> None:
    """Write 4-bit codes, two in each byte, as 8-bit ones [key, code_dim]; see `codes.packed`."""
    pairs, flat = packed.reshape(-1), codes.reshape(-1)
    for j in range(len(pairs)):
        flat[2 * j] = ((pairs[j] & 15) << 1) - 15
        flat[2 * j + 1] = ((pairs[j] >> 4) << 1) - 15


@compiled
def write_scores(
    products: Array, query_steps: Array, keys: Scales, offsets: Array, scores: Array
) -> None:
    """Write the scores of each query's row of code products from its own offset on."""
    for i in range(products.shape[0]):
        step, offset = query_steps[i], offsets[i]
        for j in range(products.shape[1]):
            product = np.float32(products[i, j])
            scores[offset + j] = keys.half_norms[j] - step * keys.steps[j] * product


@compiled
def keep(products: Array, query_steps: Array, bounds: Array, keys: Scales, out: Kept) -> int:
    """Keep the keys whose score is within their query's bound; return how many in all.

    Their scores stand for distances.
    """
    kept = 0
    for i in range(products.shape[0]):
        step, bound, before = query_steps[i], bounds[i], kept
        for j in range(products.shape[1]):
            product = np.float32(products[i, j])
            score = keys.half_norms[j] - step * keys.steps[j] * product
            out.distances[kept] = score
            out.positions[kept] = j
            kept += score <= bound
        out.counts[i] = kept - before
    return kept


@compiled
def exact(queries: Array, query_of_row: Array, keys: Array, candidates: Kept) -> None:
    """Compute the squared distances of candidates from the stored keys, in place."""
    candidate = 0
    address, key_bytes = keys.ctypes.data, keys.strides[0]
    positions = candidates.positions
    for i in range(len(candidates.counts)):
        query = queries[query_of_row[i]]
        for _ in range(candidates.counts[i]):
            if candidate + _KEYS_AHEAD < len(positions):
                ahead = address + positions[candidate + _KEYS_AHEAD] * key_bytes
                for line in range(0, key_bytes, CACHE_LINE):
                    prefetch(ahead + line)
            key = keys[positions[candidate]]
            total = np.float32(0.0)
            for j in range(len(query)):
                difference = query[j] - as_float32(key[j])
                total += difference * difference
            candidates.distances[candidate] = total
            candidate += 1


@compiled
def gather(candidates: Any, keys: Array, positions: Array) -> None:
    """Write each query's candidates as 64-bit sorting keys: the bits of the distance, the place.

    candidates: `Candidates`; starts, counts [query, run] say where a query's runs lie. keys,
    positions: a row for each query; after its candidates +inf and −1.
    """
    bits = candidates.distances.view(np.uint32)
    infinite = np.uint64(_INFINITE_BITS)
    for i in range(len(keys)):
        place = 0
        for run in range(candidates.starts.shape[1]):
            start = candidates.starts[i, run]
            for j in range(start, start + candidates.counts[i, run]):
                keys[i, place] = (np.uint64(bits[j]) << np.uint64(32)) | np.uint64(place)
                positions[i, place] = candidates.positions[j]
                place += 1
        for j in range(place, keys.shape[1]):
            keys[i, j] = (infinite << np.uint64(32)) | np.uint64(j)
            positions[i, j] = -1


@compiled
def scatter(keys: Array, positions: Array, row_of_position: Array, out: Nearest) -> None:
    """Write the distances and rows that the first sorting keys of each query stand for."""
    places = np.uint64(_PLACE_BITS)
    bits = out.distances.view(np.uint32)
    for i in range(out.rows.shape[0]):
        for j in range(out.rows.shape[1]):
            position = positions[i, keys[i, j] & places]
            bits[i, j] = np.uint32(keys[i, j] >> np.uint64(32))
            out.rows[i, j] = row_of_position[position] if position >= 0 else -1


@compiled
def by_block(rows: Array, block_bits: int, blocks: int) -> tuple[Array, Array]:
    """Group candidates by blocks of 2**block_bits rows; return where each block starts, and them.

    Candidates are given by their place in `rows`; within a block they keep their order.
    """
    starts = np.zeros(blocks + 2, np.int64)
    for i in range(len(rows)):
        starts[(rows[i] >> block_bits) + 2] += 1
    for block in range(blocks):
        starts[block + 2] += starts[block + 1]
    places = np.empty(len(rows), np.int32)
    for i in range(len(rows)):
        block = (rows[i] >> block_bits) + 1
        places[starts[block]] = i
        starts[block] += 1
    return starts[: blocks + 1], places


@compiled
def exact_at(candidates: Any, places: Array, keys: Array, first_row: int, distances: Array) -> None:
    """Compute the squared distances of those candidates, at some places, that lie in some keys.

    candidates: `Pairs`. first_row: the row of the first key.
    """
    address, key_bytes = keys.ctypes.data, keys.strides[0]
    queries, query_bytes = candidates.queries.ctypes.data, candidates.queries.strides[0]
    for i in range(len(places)):
        if i + _KEYS_AHEAD < len(places):
            next_place = places[i + _KEYS_AHEAD]
            query_address = queries + candidates.query_of_row[next_place] * query_bytes
            for line in range(0, query_bytes, CACHE_LINE):
                prefetch(query_address + line)
            ahead = candidates.rows[next_place] - first_row
            if 0 <= ahead < len(keys):
                for line in range(0, key_bytes, CACHE_LINE):
                    prefetch(address + ahead * key_bytes + line)
        place = places[i]
        position = candidates.rows[place] - first_row
        if 0 <= position < len(keys):
            query, key = candidates.queries[candidates.query_of_row[place]], keys[position]
            total = np.float32(0.0)
            for d in range(len(query)):
                difference = query[d] - as_float32(key[d])
                total += difference * difference
            distances[place] = total
