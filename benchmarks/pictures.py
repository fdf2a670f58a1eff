"""Draw the results of search.py, tax.py and growth.py: docs/search.png, tax.png and growth.png.

python benchmarks/pictures.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs"
OURS, OTHER = "#c0392b", "#5d6d7e"
STYLES: dict[str, tuple[str, str, str]] = {  # name in the results: label, color, marker
    "knnlm ivf float16": ("knnlm", OURS, "o"),
    "knnlm ivf compressed": ("knnlm compressed", "#e59866", "o"),
    "FAISS IVF,Flat": ("FAISS IVF,Flat", "#1b4f72", "s"),
    "FAISS IVF,SQ8": ("FAISS IVF,SQ8", "#2e86c1", "D"),
    "FAISS IVF,RaBitQ + SQ8 refine": ("FAISS IVF,RaBitQ + SQ8", "#48a999", "^"),
    "FAISS IVF,PQ64": ("FAISS IVF,PQ64", "#85929e", "v"),
}


def results(name: str) -> dict[str, Any]:
    """Read the results of a benchmark."""
    contents: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return contents


def plain(value: float, _: object = None) -> str:
    """Format the number of a tick without an exponent."""
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def tidy(axes: Axes) -> None:
    """Remove the frame and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e5e7e9", linewidth=0.7)
    axes.set_axisbelow(True)


def save(figure: Any, name: str) -> None:
    """Save a picture."""
    figure.savefig(PICTURES / f"{name}.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_search() -> None:
    """Draw recall against queries per second."""
    measured = results("search")
    ks = sorted({point["k"] for kind in measured["kinds"] for point in kind["curve"]}, reverse=True)
    figure, panels = plt.subplots(1, len(ks), figsize=(10, 4.2), sharey=True, squeeze=False)
    for axes, k in zip(panels[0], ks, strict=True):
        for kind in measured["kinds"]:
            points = [point for point in kind["curve"] if point["k"] == k]
            if points:
                label, color, marker = STYLES[kind["name"]]
                axes.plot(
                    [point["recall"] for point in points],
                    [1e3 / point["milliseconds"] for point in points],
                    marker=marker,
                    markersize=4.5,
                    color=color,
                    label=label,
                    linewidth=2.2 if color == OURS else 1.4,
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.set_title(f"k = {k:,}", fontsize=11)
        axes.set_xlabel(f"recall of the {k:,} nearest")
        tidy(axes)
    panels[0][0].set_ylabel("queries per second, in batches of 4,096")
    panels[0][0].legend(fontsize=8.5, frameon=False, loc="lower left")
    figure.suptitle(
        f"{measured['entries']:,} keys of SmolLM2-135M, {measured['nlist']:,} lists, "
        f"{measured['provenance']['machine']['cores']} CPU cores",
        fontsize=11,
    )
    figure.tight_layout()
    save(figure, "search")


def draw_tax() -> None:
    """Draw the time of an evaluation against the size of the datastore."""
    measured = results("tax")
    sizes = measured["sizes"]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    entries = [size["entries"] for size in sizes]
    ways = dict.fromkeys(one["way"] for size in sizes for one in size["settings"])
    for number, way in enumerate(ways):
        points = [
            (size["entries"], one["tax"])
            for size in sizes
            for one in size["settings"]
            if one["way"] == way
        ]
        color = (OURS, "#e59866", "#7d3c98", "#c39bd3")[number % 4]
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=f"knnlm, {way}")
    for number, (name, facts) in enumerate(
        measured.get("knn_transformers", {}).get("kinds", {}).items()
    ):
        axes.plot(
            [measured["knn_transformers"]["entries"]],
            [facts["tax"]],
            marker=("s", "D")[number % 2],
            linestyle="none",
            color="#1b4f72",
            label=f"knn-transformers, {name}: {facts['tax']:.1f}×",
        )
    axes.axhline(1.0, color=OTHER, linewidth=1, linestyle="--", label="the LM alone")
    axes.set_xlim(0, max(entries) * 1.08)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (1, 1.1, 1.2, 1.5, 2, 3, 5, 10) if low <= tick <= high])
    axes.set_xlabel("entries")
    axes.set_ylabel("time of an evaluation, relative to the LM alone")
    axes.legend(fontsize=8.5, frameon=False)
    tidy(axes)
    save(figure, "tax")


def draw_growth() -> None:
    """Draw the time per query against the size of the datastore."""
    measured = results("growth")
    sizes = [size for size in measured["sizes"] if size["limit_bytes"] is None]
    entries = [size["entries"] for size in sizes]
    times = [size["search"]["milliseconds_per_query"] for size in sizes]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.plot(entries, times, marker="o", color=OURS, linewidth=2.2, label="knnlm, auto")
    axes.plot(
        entries,
        [times[0] * (size / entries[0]) ** 0.5 for size in entries],
        color=OTHER,
        linestyle="--",
        linewidth=1,
        label="∝ √N",
    )
    for size, time, facts in zip(entries, times, sizes, strict=True):
        axes.annotate(
            f"{time:.2g} ms, recall {facts['search']['recall']:.2f}",
            (size, time),
            xytext=(-4, -16) if size == entries[-1] else (4, -14),
            textcoords="offset points",
            fontsize=8.5,
            ha="right" if size == entries[-1] else "left",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_yticks([m * 10.0**e for e in range(-2, 2) for m in (1, 2, 5)])
    axes.set_ylim(0.6 * times[0], 1.3 * times[0] * (entries[-1] / entries[0]) ** 0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel("entries")
    axes.set_ylabel("ms per query, in batches of 4,096")
    axes.set_title(f"k = {measured['k']:,}", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False)
    tidy(axes)
    save(figure, "growth")


if __name__ == "__main__":
    draw_search()
    draw_tax()
    draw_growth()
