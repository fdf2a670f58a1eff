"""Killing work where it matters, in a fork of the test process, which has everything imported."""

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from knnlm.datastore import catalog as catalog_module, tables, upgrade
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.connection import connect


def in_child(work: Callable[[], object]) -> BaseProcess:
    """Start work in a fork of this process."""
    assert torch.get_num_threads() == 1, "a fork must not inherit a thread pool"

    def alone() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        work()

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    return child


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ends_by_kill(work: Callable[[], object]) -> bool:
    """Run work in a fork; return whether it was killed and did not end by itself."""
    child = in_child(work)
    child.join(timeout=60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def countdown(count: int) -> Callable[[], None]:
    """Return a function that kills the process when it is called for the count-th time."""
    left = [count]

    def passing() -> None:
        left[0] -= 1
        if left[0] == 0:
            die()

    return passing


def kill_before(owner: Any, name: str, count: int, when: Callable[..., bool]) -> None:
    original, passing = getattr(owner, name), countdown(count)

    def replacement(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            passing()
        return original(*arguments, **named)

    setattr(owner, name, replacement)


def kill_after(owner: Any, name: str, count: int) -> None:
    original, passing = getattr(owner, name), countdown(count)

    def replacement(*arguments: Any, **named: Any) -> Any:
        answer = original(*arguments, **named)
        passing()
        return answer

    setattr(owner, name, replacement)


def kill_after_commit(count: int) -> None:
    original, passing = Catalog.transaction, countdown(count)

    @contextmanager
    def replacement(self: Catalog, *, entries_change: bool = True) -> Iterator[None]:
        with original(self, entries_change=entries_change):
            yield
        passing()

    Catalog.transaction = replacement  # type: ignore[method-assign]


def kill_inside_sqlite(instructions: int) -> None:
    """Die after so many instructions of SQLite, with pages and journal wherever they are then."""
    original, passing = connect, countdown(instructions)

    def replacement(path: Path) -> sqlite3.Connection:
        connection = original(path)
        connection.execute("PRAGMA cache_size = 2")  # pages go to the file before the commit
        connection.set_progress_handler(passing, 1)
        return connection

    for module in (catalog_module, tables, upgrade):
        vars(module)["connect"] = replacement


def set_generation(catalog: Catalog, name: str, value: object) -> bool:
    return name == "generation"


# a child does one of these to itself: the place, and for the how-manieth time it gets there
PLACES: dict[str, Callable[[int], None]] = {
    "before fsync": lambda n: kill_before(os, "fsync", n, lambda *_: True),
    "before rename": lambda n: kill_before(os, "rename", n, lambda *_: True),
    "after rename": lambda n: kill_after(os, "rename", n),
    "before commit": lambda n: kill_before(Catalog, "set", n, set_generation),
    "after commit": kill_after_commit,
}


class Killed(KeyboardInterrupt):
    """The process is no more."""


@contextmanager
def killed_at(event: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Raise Killed at the event-th change of a file and at all later ones: no clean-up runs."""
    passed = [0]

    def passing() -> None:
        passed[0] += 1
        if passed[0] >= event:
            raise Killed

    def after_passing(original: Callable[..., object]) -> Callable[..., object]:
        def change(*arguments: Any, **named: Any) -> object:
            passing()
            return original(*arguments, **named)

        return change

    transaction = Catalog.transaction

    @contextmanager
    def interrupted(self: Catalog, **named: Any) -> Iterator[None]:
        with transaction(self, **named):
            yield
            passing()
        passing()

    with monkeypatch.context() as patched:
        for name in ("fsync", "rename", "unlink"):
            patched.setattr(os, name, after_passing(getattr(os, name)))
        patched.setattr(Catalog, "transaction", interrupted)
        yield passed
