"""How results look in a terminal: progress bars, tables, coloured text. Knows no arguments."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from knnlm.progress import Advance

if TYPE_CHECKING:
    from knnlm.datastore.datastore import Datastore
    from knnlm.evaluation.perplexity import PerplexityReport
    from knnlm.mixture.parameters import Parameters
    from knnlm.tuning.tune import Tuning

# names and texts are shown as they are: no [markup], no :emoji:
OUT = Console(highlight=False, markup=False, emoji=False)
ERR = Console(stderr=True, highlight=False, markup=False, emoji=False)


class _DoneColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        total = "?" if task.total is None else amount(task.total, unit)
        rate = f"{amount(task.speed, unit)} {unit}/s" if task.speed else ""
        return Text(f"{amount(task.completed, unit)}/{total} {unit}  {rate}")


def amount(number: float, unit: str) -> str:
    """Return a number as people read it: 12,345 tokens, 12.3 M bytes."""
    if unit == "bytes":
        for prefix in ("", "k", "M", "G"):
            if number < 1000:
                return f"{number:.3g} {prefix}".rstrip()
            number /= 1000
        return f"{number:.3g} T"
    return f"{number:,.0f}"


class RichProgress:
    """Draws a bar with rate and remaining time on the standard error."""

    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        """Open a bar; see `knnlm.progress.Progress`."""
        bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            _DoneColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ERR,
            speed_estimate_period=120,
        )
        with bars:
            task = bars.add_task(description, total=total, unit=unit)

            def advance(amount: float, total: float | None = None) -> None:
                if total is not None:
                    bars.update(task, total=total)
                bars.advance(task, amount)

            try:
                yield advance
            except Exception:
                bars.live.transient = True  # a refusal is one line, without a half-drawn bar
                bars.live.stop()
                bars.disable = True
                raise
            bars.update(task, total=bars.tasks[0].completed)


def print_error(message: str) -> None:
    """Print what is wrong on the standard error, in one line."""
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


def print_perplexity(report: "PerplexityReport") -> None:
    """Print the LM and the kNN-LM side by side."""
    weights = weights_line(report.weights, report.parameters)
    cache = "" if report.cache is None else f", a cache of {report.cache.size:,} tokens"
    OUT.print(f"{report.tokens:,} tokens of {report.documents:,} documents, {weights}{cache}")
    table = Table()
    for heading in ("", "LM", "kNN-LM", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, name in [
        ("perplexity", "perplexity"),
        ("nats per token", "nats_per_token"),
        ("word perplexity", "word_perplexity"),
        ("bits per byte", "bits_per_byte"),
    ]:
        lm, knn = getattr(report.lm, name), getattr(report.knn, name)
        table.add_row(label, f"{lm:,.4f}", f"{knn:,.4f}", f"{(knn / lm - 1) * 100:+.1f} %")
    if report.change_error is not None:
        errors = (f"± {report.lm.perplexity_error:,.2f}", f"± {report.knn.perplexity_error:,.2f}")
        change = f"± {report.change_error * 100:.1f} %"
        table.add_row(f"± over {report.errors_over}", *errors, change, style="dim")
    OUT.print(table)
    frequencies = Table()
    for heading in ("in the datastore", "tokens", "LM", "kNN-LM", "change"):
        frequencies.add_column(heading, justify="right")
    for bucket in report.frequencies:
        times = f"{bucket.at_least:,}–{bucket.at_most:,} times" if bucket.at_least else "never"
        lm, knn = bucket.lm_perplexity, bucket.knn_perplexity
        frequencies.add_row(
            times,
            f"{bucket.tokens:,}",
            f"{lm:,.2f}",
            f"{knn:,.2f}",
            f"{(knn / lm - 1) * 100:+.1f} %",
        )
    OUT.print(frequencies)
    seconds = report.seconds
    OUT.print(
        f"helped {report.tokens_helped / report.tokens:.0%} of the tokens, hurt "
        f"{report.tokens_hurt / report.tokens:.0%} ({report.share_hurt:.0%} by more than 0.1 "
        f"nats); LM {seconds.lm:.1f} s, search "
        f"{seconds.search:.1f} s, in all {seconds.total:.1f} s"
    )


def settings_line(parameters: "Sequence[Parameters]") -> str:
    """Return k, λ and T; of each, where there are several datastores."""
    return "; ".join(f"k {p.k}, λ {p.lmbda:g}, T {p.temperature:g}" for p in parameters)


def weights_line(weights: str, parameters: "Sequence[Parameters]") -> str:
    """Return what chooses the weights, and k, λ and T where these are fixed."""
    if weights == "learned":
        return "learned weights"
    if weights == "distance":
        return "λ by distance, " + "; ".join(f"k {p.k}, T {p.temperature:g}" for p in parameters)
    return settings_line(parameters)


def print_tuning(tuning: "Tuning") -> None:
    """Print what was chosen, and how perplexity depends on k and on the way to mix."""
    from knnlm.tuning.fitting import LEAST_TOKENS

    OUT.print(f"{tuning.tokens:,} tokens to tune on")
    for number, (sweep, chosen) in enumerate(zip(tuning.sweeps, tuning.parameters, strict=True)):
        several = len(tuning.sweeps) > 1
        table = Table(title=f"datastore {number + 1} alone" if several else None)
        for heading in ("k", "best λ", "best T", "perplexity"):
            table.add_column(heading, justify="right")
        for trial in sweep.by_k:
            table.add_row(
                str(trial.k),
                f"{trial.lmbda:g}",
                f"{trial.temperature:g}",
                f"{trial.perplexity:.4f}",
                style="bold green" if trial.k == chosen.k and chosen.lmbda else None,
            )
        table.add_row("–", "0", "–", f"{tuning.lm_perplexity:.4f}", style="dim")
        OUT.print(table)
    ways = Table()
    for heading in ("mixture", "perplexity", "change", "hurt by > 0.1 nats"):
        ways.add_column(heading, justify="left" if heading == "mixture" else "right")
    for fit in tuning.fits:
        ways.add_row(
            fit.name + (" (each token held out)" if fit.held_out else ""),
            f"{fit.perplexity:.4f}",
            f"{(fit.perplexity / tuning.lm_perplexity - 1) * 100:+.1f} %",
            f"{fit.share_hurt:.0%}",
        )
    OUT.print(ways)
    if tuning.mixture.gate is not None:
        OUT.print(
            "stored learned weights, which every command uses unless k, λ or T is given; "
            f"--weights fixed: {settings_line(tuning.parameters)}"
        )
    elif not any(parameters.lmbda for parameters in tuning.parameters):
        OUT.print(
            "No setting beats the language model alone on this text: stored λ = 0, which leaves "
            "the model as it is. The datastore may hold text of another kind."
        )
    else:
        OUT.print(
            f"stored {settings_line(tuning.parameters)}: perplexity "
            f"{tuning.lm_perplexity:.3f} → {tuning.knn_perplexity:.3f}"
        )
        if tuning.tokens < LEAST_TOKENS:
            OUT.print(f"learned weights need {LEAST_TOKENS:,} tokens to tune on, or more")


def describe(store: "Datastore") -> dict[str, Any]:
    """Return what `knnlm info` shows, as plain values."""
    from dataclasses import asdict

    from knnlm.index.policy import describe_index

    documents = store.documents()
    parameters = store.parameters
    return {
        "path": str(store.path),
        "entries": len(store),
        "forgotten_entries": store.forgotten_rows,
        "documents": len(documents),
        "incomplete_documents": [d.name for d in documents if not d.complete],
        "shards": len(store.shards),
        "size_bytes": sum(shard.file.size_bytes for shard in store.shards),
        "generation": store.generation,
        "index": describe_index(store),
        "settings": asdict(store.settings),
        "parameters": None if parameters is None else asdict(parameters),
        "tuning": store.tuning,
    }


def _index_line(index: dict[str, Any]) -> str:
    if index["kind"] == "exact":
        return "exact"
    line = (
        f"{index['kind']}, recall {index['recall']:.3f} of {index['k']} at nprobe "
        f"{index['nprobe']}, {index['bytes_per_entry']:.0f} bytes an entry, "
        f"{index['milliseconds_per_query']:.2f} ms a query"
    )
    if index["recall"] < index["target_recall"]:
        line += f"; below the recall {index['target_recall']:g} that was asked for"
    return line


def warn_of_poor_recall(store: "Datastore") -> None:
    """Say on the standard error that an index finds fewer true neighbors than was asked for."""
    from knnlm.index.policy import describe_index

    index = describe_index(store)
    if index["recall"] < index.get("target_recall", 0.0):
        ERR.print(
            f"warning: the index finds {index['recall']:.1%} of the true neighbors, below the "
            f"{index['target_recall']:.1%} asked for; knnlm index {store.path} builds another",
            soft_wrap=True,
        )


def print_store(store: "Datastore") -> None:
    """Print what a datastore holds and where it comes from."""
    facts = describe(store)
    settings = store.settings
    forgotten = facts["forgotten_entries"]
    rows = {
        "entries": f"{facts['entries']:,}"
        + (f" (and {forgotten:,} forgotten; knnlm compact removes them)" if forgotten else ""),
        "documents": f"{facts['documents']:,}",
        "on disk": f"{amount(facts['size_bytes'], 'bytes')}B in {facts['shards']} shards",
        "model": f"{settings.model} ({settings.model_dtype})",
        "keys": f"{settings.key}, {settings.dimension} × {settings.key_dtype}",
        "windows": f"{settings.window} positions, {settings.context} of them context, "
        f"{settings.boundary} boundaries",
        "index": _index_line(facts["index"]),
    }
    if facts["incomplete_documents"]:
        rows["incomplete"] = ", ".join(facts["incomplete_documents"][:3])
    parameters, tuning = store.parameters, store.tuning
    if parameters is None or tuning is None:
        rows["parameters"] = "not tuned; knnlm tune finds the best k, λ and T"
    else:
        rows["parameters"] = (
            f"{settings_line([parameters])}: perplexity "
            f"{tuning['lm_perplexity']:.3f} → {tuning['knn_perplexity']:.3f} on "
            f"{tuning['tokens']:,} tuning tokens"
            + "".join(f", together with {other}" for other in tuning.get("together_with", []))
        )
        if store.is_learned:
            perplexities = {fit["name"]: fit["perplexity"] for fit in tuning["fits"]}
            rows["parameters"] += f"; learned weights {perplexities['learned weights']:.3f}"
    OUT.print(str(store.path), style="bold", markup=False)
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    OUT.print(table)
