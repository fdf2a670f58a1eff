"""Pictures of results, as PNG files."""

from pathlib import Path
from typing import Any

from knnlm.datastore.files import writing
from knnlm.mixture.parameters import Parameters
from knnlm.tuning.sweep import Sweep
from knnlm.tuning.tune import Tuning


def plot_tuning(tuning: Tuning, path: Path) -> None:
    """Draw perplexity against k, λ and temperature, each with the other two at their best.

    One row of panels for each datastore. Raises DatastoreWriteError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.4 + 3.2 * len(tuning.sweeps)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(tuning.sweeps), 3, sharey="row", squeeze=False)
    for panels, sweep, parameters in zip(rows, tuning.sweeps, tuning.parameters, strict=True):
        _plot_sweep(panels, sweep, parameters)
    figure.suptitle(
        f"{tuning.tokens:,} held-out tokens: LM {tuning.lm_perplexity:.3f}, "
        f"kNN-LM {tuning.knn_perplexity:.3f}",
        fontsize=11,
    )
    with writing(path):
        figure.savefig(path, dpi=120, format="png")


def _plot_sweep(panels: Any, sweep: Sweep, chosen: Parameters) -> None:
    for axes, trials, name, best, label in [
        (panels[0], sweep.by_k, "k", chosen.k, "neighbors, k"),
        (panels[1], sweep.by_lmbda, "lmbda", chosen.lmbda, "interpolation weight, λ"),
        (panels[2], sweep.by_temperature, "temperature", chosen.temperature, "temperature, T"),
    ]:
        values = [getattr(trial, name) for trial in trials]
        axes.plot(values, [trial.perplexity for trial in trials], marker="o", markersize=3)
        axes.axhline(sweep.lm_perplexity, color="gray", linestyle="--", label="LM alone")
        axes.axvline(best, color="tab:orange", alpha=0.6, label=f"chosen: {best:g}")
        if name != "lmbda":
            axes.set_xscale("log", base=2 if name == "k" else 10)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    worst = max(sweep.lm_perplexity, *(trial.perplexity for trial in sweep.by_k))
    margin = 0.1 * (worst - sweep.knn_perplexity) + 1e-3
    panels[0].set_ylim(sweep.knn_perplexity - margin, worst + margin)
    panels[0].set_ylabel("perplexity")
