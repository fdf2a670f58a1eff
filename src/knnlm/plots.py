"""Pictures of results, as PNG files."""

from pathlib import Path

from knnlm.datastore.shards import writing
from knnlm.tuning import Tuning


def plot_tuning(tuning: Tuning, path: Path) -> None:
    """Draw perplexity against k, λ and temperature, each with the other two at their best.

    Raises DatastoreWriteError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    chosen = tuning.parameters
    for axes, trials, name, best, label in [
        (panels[0], tuning.by_k, "k", chosen.k, "neighbors, k"),
        (panels[1], tuning.by_lmbda, "lmbda", chosen.lmbda, "interpolation weight, λ"),
        (panels[2], tuning.by_temperature, "temperature", chosen.temperature, "temperature, T"),
    ]:
        values = [getattr(trial, name) for trial in trials]
        axes.plot(values, [trial.perplexity for trial in trials], marker="o", markersize=3)
        axes.axhline(tuning.lm_perplexity, color="gray", linestyle="--", label="LM alone")
        axes.axvline(best, color="tab:orange", alpha=0.6, label=f"chosen: {best:g}")
        if name != "lmbda":
            axes.set_xscale("log", base=2 if name == "k" else 10)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    worst = max(tuning.lm_perplexity, *(trial.perplexity for trial in tuning.by_k))
    margin = 0.1 * (worst - tuning.knn_perplexity) + 1e-3
    panels[0].set_ylim(tuning.knn_perplexity - margin, worst + margin)
    panels[0].set_ylabel("perplexity")
    figure.suptitle(
        f"{tuning.tokens:,} held-out tokens: LM {tuning.lm_perplexity:.3f}, "
        f"kNN-LM {tuning.knn_perplexity:.3f}",
        fontsize=11,
    )
    with writing(path):
        figure.savefig(path, dpi=120, format="png")
