"""The terminal: results on the standard output, errors and warnings on the standard error."""

import json
from typing import Any

from rich.console import Console

# names and texts are shown as they are: no [markup], no :emoji:
OUT = Console(highlight=False, markup=False, emoji=False)
ERR = Console(stderr=True, highlight=False, markup=False, emoji=False)


def amount(number: float, unit: str) -> str:
    """Return a number as people read it: 12,345 tokens, 12.3 M bytes."""
    if unit == "bytes":
        for prefix in ("", "k", "M", "G"):
            if number < 1000:
                return f"{number:.3g} {prefix}".rstrip()
            number /= 1000
        return f"{number:.3g} T"
    return f"{number:,.0f}"


def print_error(message: str) -> None:
    """Print an error message on the standard error, on one line."""
    ERR.print(f"error: {' '.join(message.split())}", soft_wrap=True)


def print_json(value: object) -> None:
    """Print one JSON value on one line; infinite and undefined numbers become null."""
    OUT.print(json.dumps(_finite(value), ensure_ascii=False), soft_wrap=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
