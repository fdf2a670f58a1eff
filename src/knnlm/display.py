"""Values → HTML for notebooks: tables, colored text, small plots.

Knows no results. Every text that is given is shown as text, whatever is in it. Colors are
translucent, so that pages may be light or dark.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

_GREEN, _RED = "0,160,60", "220,40,40"
_MOST_OPACITY, _NATS_OF_MOST = 0.6, 3.0
_CELL = "padding:2px 10px;text-align:{}"
_WIDTH, _HEIGHT, _MARGIN = 200, 110, 12


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", bold: int = -1
) -> str:
    """Return a table; the first column is set left, the others right. bold: the number of a row."""
    head = _row("th", columns)
    body = [
        _row("td", row, "font-weight:bold" if number == bold else "")
        for number, row in enumerate(rows)
    ]
    above = (
        f'<caption style="text-align:left;white-space:nowrap">{escape(caption)}</caption>'
        if caption
        else ""
    )
    return f"<table>{above}<thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _row(tag: str, cells: Sequence[str], style: str = "") -> str:
    shown = "".join(
        f'<{tag} style="{_CELL.format("right" if number else "left")}">{escape(cell)}</{tag}>'
        for number, cell in enumerate(cells)
    )
    return f'<tr style="{style}">{shown}</tr>'


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def colored(tokens: Iterable[tuple[str, float, str]]) -> str:
    """Return a text from its tokens: each with its gain in nats, green or red, and a tooltip."""
    spans = "".join(
        f'<span style="background:{_color(gain)}" title="{escape(tip)}">{escape(text)}</span>'
        for text, gain, tip in tokens
    )
    return f'<pre style="white-space:pre-wrap">{spans}</pre>'


def _color(gain: float) -> str:
    opacity = _MOST_OPACITY * min(abs(gain) / _NATS_OF_MOST, 1.0)
    return f"rgba({_GREEN if gain > 0 else _RED},{opacity:.2f})"


def passage(before: str, value: str, after: str, source: str) -> str:
    """Return a passage with its entry's token marked, and where it is from."""
    marked = f'<b style="background:rgba(120,120,120,0.3)">{escape(value)}</b>'
    return (
        f"<div>{escape(source)}</div>"
        '<pre style="white-space:pre-wrap;margin:0 0 6px 20px">'
        f"…{escape(before)}{marked}{escape(after)}…</pre>"
    )


def plot(points: Sequence[tuple[float, float]], line: float, *, label: str, log: bool) -> str:
    """Return a plot of values (x, y) in ascending x, with a dashed horizontal line.

    log: whether x is spaced by its logarithm.
    """
    xs = [math.log(x) if log else x for x, _ in points]
    ys = [y for _, y in points]
    low, high = min(*ys, line), max(*ys, line)
    across = (_WIDTH - 2 * _MARGIN) / ((xs[-1] - xs[0]) or 1.0)
    down = (_HEIGHT - 2 * _MARGIN) / ((high - low) or 1.0)

    def at(y: float) -> float:
        return _MARGIN + (high - y) * down

    drawn = " ".join(
        f"{_MARGIN + (x - xs[0]) * across:.1f},{at(y):.1f}" for x, y in zip(xs, ys, strict=True)
    )
    best = min(points, key=lambda point: point[1])
    caption = f"{label}: best {best[0]:g}, perplexity {best[1]:.3f}"
    return (
        f'<figure style="display:inline-block;margin:4px"><svg width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{escape(caption)}"><rect width="{_WIDTH}" height="{_HEIGHT}" '
        'fill="none" stroke="rgba(128,128,128,0.5)"/>'
        f'<line x1="0" x2="{_WIDTH}" y1="{at(line):.1f}" y2="{at(line):.1f}" stroke="gray" '
        'stroke-dasharray="4"/>'
        f'<polyline points="{drawn}" fill="none" stroke="#3b82c4" stroke-width="2"/></svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
