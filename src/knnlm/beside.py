"""A thread whose work overlaps with this one's, on another core."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from knnlm.index.ivf_workers import Workers

Result = TypeVar("Result")


class Beside:
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
