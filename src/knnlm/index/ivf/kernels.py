"""The loops of an inverted-file search that tensors cannot express, compiled by numba for the CPU.

Knows arrays, not indexes: scores, candidates, exact distances, selection. Every kernel releases
the GIL and runs on one thread; the caller runs several.

A *score* is half the squared distance, less a constant of the query, estimated from codes:
half_norm − query_step · key_step · ⟨query code, key code⟩.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]
_INSERTION_SORT_BELOW = 16
CACHE_LINE = 64
_KEYS_AHEAD = 2


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel, at its first use; it releases the GIL."""

    def compile_it(cache: bool) -> Callable[..., Any]:
        kernel: Callable[..., Any] = njit(
            nogil=True,
            cache=cache,
            error_model="numpy",
            # sums may be reordered, so that they vectorize; infinities and NaN keep their meaning
            fastmath={"reassoc", "contract", "nsz"},
        )(inspect.unwrap(function))
        return kernel

    try:
        return compile_it(cache=True)
    except RuntimeError:  # no folder is writable: compile in every process
        return compile_it(cache=False)


def _as_float32(context: Any, element: Any) -> Any:
    """Widen an element of a key: float32 itself, or float16 given as its 16 bits."""

    def widen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if element == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(element), widen


as_float32 = intrinsic(inspect.unwrap(_as_float32))


def _add_product(context: Any, total: Any, one: Any, other: Any) -> Any:
    """Add the product of two codes to a 32-bit sum; numba's own integers would widen to 64 bits."""

    def add(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = [builder.sext(code, ir.IntType(32)) for code in arguments[1:]]
        return builder.add(arguments[0], builder.mul(*wide))

    return types.int32(types.int32, types.int8, types.int8), add


add_product = intrinsic(inspect.unwrap(_add_product))


def _prefetch(context: Any, address: Any) -> Any:
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


prefetch = intrinsic(inspect.unwrap(_prefetch))


def _select(values: Array, rank: int) -> Any:
    """Return the value of a rank (0: the smallest), reordering the values."""
    low, high = 0, len(values) - 1
    while high - low >= _INSERTION_SORT_BELOW:
        first, middle, last = values[low], values[(low + high) >> 1], values[high]
        pivot = max(min(first, middle), min(max(first, middle), last))
        below = low
        for i in range(low, high + 1):  # no branch to mispredict: every element is swapped
            value = values[i]
            values[i] = values[below]
            values[below] = value
            below += value < pivot
        if rank < below:
            high = below - 1
            continue
        equal = below
        for i in range(below, high + 1):
            value = values[i]
            values[i] = values[equal]
            values[equal] = value
            equal += value <= pivot
        if rank < equal:
            return pivot
        low = equal
    for i in range(low + 1, high + 1):
        value = values[i]
        j = i - 1
        while j >= low and values[j] > value:
            values[j + 1] = values[j]
            j -= 1
        values[j + 1] = value
    return values[rank]


select = compiled(_select)


def _write_scores(
    products: Array,
    query_steps: Array,
    key_steps: Array,
    half_norms: Array,
    offsets: Array,
    scores: Array,
) -> None:
    """Write the scores of each query's row of code products from its own offset on."""
    for i in range(products.shape[0]):
        step, offset = query_steps[i], offsets[i]
        for j in range(products.shape[1]):
            scores[offset + j] = half_norms[j] - step * key_steps[j] * np.float32(products[i, j])


write_scores = compiled(_write_scores)


def _thresholds(
    scores: Array, starts: Array, ranks: Array, unbounded: float, first: int, out: Array
) -> None:
    """Find the score at each query's rank among its own; `unbounded` where the rank is −1."""
    for i in range(len(out)):
        query = first + i
        if ranks[query] < 0:
            out[i] = unbounded
        else:
            out[i] = select(scores[starts[query] : starts[query + 1]], ranks[query])


thresholds = compiled(_thresholds)


def _keep(
    products: Array,
    query_steps: Array,
    bounds: Array,
    key_steps: Array,
    half_norms: Array,
    scores: Array,
    positions: Array,
    counts: Array,
) -> int:
    """Append the keys whose score is within their query's bound; return how many in all."""
    kept = 0
    for i in range(products.shape[0]):
        step, bound, before = query_steps[i], bounds[i], kept
        for j in range(products.shape[1]):
            score = half_norms[j] - step * key_steps[j] * np.float32(products[i, j])
            scores[kept] = score
            positions[kept] = j
            kept += score <= bound
        counts[i] = kept - before
    return kept


keep = compiled(_keep)


def _exact(
    queries: Array, query_of_row: Array, keys: Array, positions: Array, counts: Array, out: Array
) -> None:
    """Compute squared distances of candidates, grouped by query, from the stored keys."""
    candidate = 0
    address, key_bytes = keys.ctypes.data, keys.strides[0]
    for i in range(len(counts)):
        query = queries[query_of_row[i]]
        for _ in range(counts[i]):
            if candidate + _KEYS_AHEAD < len(positions):
                ahead = address + positions[candidate + _KEYS_AHEAD] * key_bytes
                for line in range(0, key_bytes, CACHE_LINE):
                    prefetch(ahead + line)
            key = keys[positions[candidate]]
            total = np.float32(0.0)
            for j in range(len(query)):
                difference = query[j] - as_float32(key[j])
                total += difference * difference
            out[candidate] = total
            candidate += 1


exact = compiled(_exact)


def _sort(distances: Array, positions: Array, spare: Array, spare_positions: Array) -> None:
    """Sort distances ≥ 0 with their positions; a radix sort, as their bits sort like integers."""
    bits, spare_bits = distances.view(np.uint32), spare.view(np.uint32)
    ends = np.zeros((3, 2048), np.int64)
    for i in range(len(bits)):
        value = bits[i]
        ends[0, value & 2047] += 1
        ends[1, (value >> 11) & 2047] += 1
        ends[2, value >> 22] += 1
    for digit in range(3):
        total = 0
        for i in range(2048):
            count = ends[digit, i]
            ends[digit, i] = total
            total += count
    for i in range(len(bits)):
        place = ends[0, bits[i] & 2047]
        ends[0, bits[i] & 2047] = place + 1
        spare_bits[place] = bits[i]
        spare_positions[place] = positions[i]
    for i in range(len(bits)):
        place = ends[1, (spare_bits[i] >> 11) & 2047]
        ends[1, (spare_bits[i] >> 11) & 2047] = place + 1
        bits[place] = spare_bits[i]
        positions[place] = spare_positions[i]
    for i in range(len(bits)):
        place = ends[2, bits[i] >> 22]
        ends[2, bits[i] >> 22] = place + 1
        spare_bits[place] = bits[i]
        spare_positions[place] = positions[i]
    bits[:] = spare_bits[: len(bits)]
    positions[:] = spare_positions[: len(bits)]


sort = compiled(_sort)


def _nearest(
    distances: Array,
    positions: Array,
    starts: Array,
    counts: Array,
    row_of_position: Array,
    first: int,
    out_distances: Array,
    out_rows: Array,
) -> None:
    """Gather each query's runs of candidates and write its nearest, ascending; +inf and −1 after.

    starts, counts [query, run]: where the runs lie in distances and positions.
    """
    k = out_distances.shape[1]
    capacity = 0
    for i in range(len(out_distances)):
        capacity = max(capacity, counts[first + i].sum())
    near = np.empty(capacity, np.float32)
    near_positions = np.empty(capacity, np.int64)
    spare = np.empty(capacity, np.float32)
    spare_positions = np.empty(capacity, np.int64)
    for i in range(len(out_distances)):
        query = first + i
        found = 0
        for run in range(starts.shape[1]):
            start = starts[query, run]
            for j in range(counts[query, run]):
                near[found] = distances[start + j]
                near_positions[found] = positions[start + j]
                found += 1
        if found > k:
            spare[:found] = near[:found]
            limit = select(spare[:found], k - 1)
            below = 0
            for j in range(found):
                below += near[j] < limit
            ties = k - below
            kept = 0
            for j in range(found):
                if near[j] < limit or (near[j] == limit and ties > 0):
                    ties -= near[j] == limit
                    near[kept] = near[j]
                    near_positions[kept] = near_positions[j]
                    kept += 1
            found = kept
        sort(near[:found], near_positions[:found], spare, spare_positions)
        out_distances[i, :found] = near[:found]
        for j in range(found):
            out_rows[i, j] = row_of_position[near_positions[j]]
        out_distances[i, found:] = np.inf
        out_rows[i, found:] = -1


nearest = compiled(_nearest)


def _exact_in_block(
    queries: Array, first: int, rows: Array, keys: Array, first_row: int, out: Array
) -> None:
    """Compute squared distances [query, candidate] of those candidates that lie in a block of rows.

    first: the query of the first candidates. first_row: the row of the block's first key.
    """
    address, key_bytes = keys.ctypes.data, keys.strides[0]
    for i in range(rows.shape[0]):
        query = queries[first + i]
        for j in range(rows.shape[1]):
            position = rows[i, j] - first_row
            if 0 <= position < len(keys):
                if j + _KEYS_AHEAD < rows.shape[1]:
                    ahead = rows[i, j + _KEYS_AHEAD] - first_row
                    if 0 <= ahead < len(keys):
                        for line in range(0, key_bytes, CACHE_LINE):
                            prefetch(address + ahead * key_bytes + line)
                key = keys[position]
                total = np.float32(0.0)
                for d in range(len(query)):
                    difference = query[d] - as_float32(key[d])
                    total += difference * difference
                out[i, j] = total


exact_in_block = compiled(_exact_in_block)
