"""How long work tells its progress; knows nothing of terminals."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Advance(Protocol):
    """Called with the work done since the last call, and a better estimate of all of it."""

    def __call__(self, amount: float, total: float | None = None) -> None:
        """Advance by `amount` units, of `total` now expected."""


@runtime_checkable
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
        yield lambda amount, total=None: None


SILENT: Progress = _Silent()
"""Shows nothing: the library's default."""
