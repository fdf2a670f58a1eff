"""Progress bars on the standard error; apart from the console, because help needs none."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from knnlm.apps.cli.console import ERR, amount
from knnlm.progress import Advance


class _AmountColumn(ProgressColumn):
    """How much is done, of how much, how fast, and what else there is to say."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        total = "?" if task.total is None else amount(task.total, unit)
        rate = f"{amount(task.speed, unit)} {unit}/s" if task.speed else ""
        note = f"  {task.fields['note']}" if task.fields["note"] else ""
        return Text(f"{amount(task.completed, unit)}/{total} {unit}  {rate}{note}")


class RichProgress:
    """Draws a bar with rate and remaining time; see `knnlm.progress.Progress`.

    transient: whether a bar disappears when its task is done.
    """

    def __init__(self, transient: bool = False) -> None:
        self._transient = transient

    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        """Draw a bar for as long as the context is open."""
        bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            _AmountColumn(Column(no_wrap=True)),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ERR,
            speed_estimate_period=120,
        )
        with bars:
            task = bars.add_task(description, total=total, unit=unit, note="")

            def advance(amount: float, total: float | None = None, note: str | None = None) -> None:
                if total is not None:
                    bars.update(task, total=total)
                if note is not None:
                    bars.update(task, note=note)
                bars.advance(task, amount)

            try:
                yield advance
            except Exception:
                _remove(bars)  # leave the error message alone, no half-drawn bar
                raise
            bars.update(task, total=bars.tasks[0].completed)
            if self._transient:
                _remove(bars)


def _remove(bars: Progress) -> None:
    bars.live.transient = True
    bars.live.stop()
    bars.disable = True
