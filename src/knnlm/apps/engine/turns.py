"""Work in turns: a generator that yields where others may go on, and returns its result.

Knows no model and no job.
"""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Value = TypeVar("Value")

Turns: TypeAlias = Generator[None, None, Value]
"""Work that yields after every part of it, and returns a value."""


def finish(turns: Turns[Value]) -> Value:
    """Do all of the work at once."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            value: Value = end.value
            return value
