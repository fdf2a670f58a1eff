"""Threads that each run their own tensor operations, without waiting for one another.

A search is thousands of small independent pieces. Splitting every piece over all cores costs a
barrier each, and on a busy machine a barrier waits for the slowest core; so each thread computes
whole pieces alone.
"""

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads in which torch is single-threaded."""

    def __init__(self, threads: int) -> None:
        default = torch.get_num_threads()
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "knnlm-search")
        started = threading.Barrier(threads)

        def start() -> None:
            torch.get_num_threads()  # a thread takes over the default on its first use: now
            torch.set_num_threads(1)
            started.wait()

        for future in [self._pool.submit(start) for _ in range(threads)]:
            future.result()
        torch.set_num_threads(default)  # the setting is a thread's own, its default everyone's

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Apply a function to each item; results in the order of the items."""
        return list(self._pool.map(function, items))

    def in_turn(
        self, function: Callable[[Item], Result], items: Iterable[Item], ahead: int | None = None
    ) -> Iterator[Result]:
        """Yield what a function returns for each item, in the order of the items.

        ahead: how many items are begun before their results are asked for; None: one more than
        there are threads.
        """
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > (self.threads + 1 if ahead is None else ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Begin a piece of work."""
        return self._pool.submit(function)

    def close(self) -> None:
        """End the threads, when they are done."""
        self._pool.shutdown()

    def chunks(self, total: int, size: int) -> list[range]:
        """Split 0 … total into ranges of at most `size`, at least one for each thread."""
        size = max(1, min(size, -(-total // self.threads)))
        return [range(start, min(total, start + size)) for start in range(0, total, size)]


@cache
def _workers(threads: int) -> Workers:
    return Workers(threads)


def workers() -> Workers:
    """Return the threads of this process: as many as torch is set to use."""
    return _workers(torch.get_num_threads())


def waiting_workers() -> Workers:
    """Return threads for work that waits for the disk: twice as many, so that cores stay busy."""
    return _workers(2 * torch.get_num_threads())


class BackgroundThread:
    """One thread beside those that call `begin`; torch is single-threaded in it.

    While torch's own threads spin, waiting for their next loop, all cores look busy, and Linux may
    wake a thread on the very core that asks for it, which then waits. So it is kept off that core.
    """

    def __init__(self) -> None:
        self._workers = Workers(1)
        self._thread = self._workers.submit(threading.get_native_id).result()
        self._avoided: int | None = None

    def begin(self, function: Callable[[], Result]) -> Future[Result]:
        """Begin a piece of work, and go on."""
        if sys.platform == "linux":
            here = _C.sched_getcpu()
            if here != self._avoided:
                self._avoided = here
                others = os.sched_getaffinity(0) - {here}
                if others:
                    os.sched_setaffinity(self._thread, others)
        return self._workers.submit(function)

    def close(self) -> None:
        """End the thread, when its work is done."""
        self._workers.close()


_C = ctypes.PyDLL(None)
