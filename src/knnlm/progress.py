"""How long work tells its progress; knows nothing of terminals."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]
"""Called with the amount of work done since the last call."""


class Progress(Protocol):
    """Shows one piece of long work at a time; the command line draws bars with it."""

    def task(
        self, description: str, total: float | None, unit: str
    ) -> AbstractContextManager[Advance]:
        """Open a task of `total` units (None: unknown) and yield the function that advances it."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        yield lambda amount: None


SILENT: Progress = _Silent()
"""Shows nothing: the library's default."""
