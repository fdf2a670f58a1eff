"""How long-running work reports its progress; knows nothing of terminals."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Advance(Protocol):
    """Reports work done since the last call."""

    def __call__(self, amount: float, total: float | None = None, note: str | None = None) -> None:
        """Advance by `amount` units; `total` is a new estimate of all units.

        note: what else there is to say now, in a few words; None: no change.
        """


@runtime_checkable
class Progress(Protocol):
    """Shows one long-running task at a time; the command line draws a bar for it."""

    def task(
        self, description: str, total: float | None, unit: str
    ) -> AbstractContextManager[Advance]:
        """Open a task of `total` units (None: unknown) and yield the function that advances it."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        yield lambda amount, total=None, note=None: None


SILENT: Progress = _Silent()
"""Shows nothing: the library's default."""
