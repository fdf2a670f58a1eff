"""Results as tables and lines on the standard output, and the warning about a poor index."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import JustifyMethod
from rich.table import Column, Table

from knnlm.apps.cli.console import ERR, OUT, amount, one_line

if TYPE_CHECKING:
    from knnlm.datastore.sources import Changes
    from knnlm.evaluation.perplexity import PerplexityReport
    from knnlm.mixture.parameters import Parameters
    from knnlm.tuning.sweep import Sweep
    from knnlm.tuning.tune import Tuning


def new_table(*headings: str, left: str | None = None, title: str | None = None) -> Table:
    """Return an empty table of right-aligned columns, but for the one named `left`."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        side: JustifyMethod = "left" if heading == left else "right"
        table.add_column(heading, justify=side, overflow="fold")
    return table


def _change(new: float, old: float) -> str:
    return f"{(new / old - 1) * 100:+.1f} %"


def print_perplexity(report: "PerplexityReport") -> None:
    """Print the perplexity of the LM and of the kNN-LM side by side."""
    weights = weights_line(report.weights, report.parameters)
    cache = "" if report.cache is None else f", a cache of {report.cache.size:,} tokens"
    OUT.print(f"{report.tokens:,} tokens of {report.documents:,} documents, {weights}{cache}")
    table = new_table("", "LM", "kNN-LM", "change", left="")
    for label, name in [
        ("perplexity", "perplexity"),
        ("nats per token", "nats_per_token"),
        ("word perplexity", "word_perplexity"),
        ("bits per byte", "bits_per_byte"),
    ]:
        lm, knn = getattr(report.lm, name), getattr(report.knn, name)
        table.add_row(label, f"{lm:,.4f}", f"{knn:,.4f}", _change(knn, lm))
    if report.change_error is not None:
        errors = (f"± {report.lm.perplexity_error:,.2f}", f"± {report.knn.perplexity_error:,.2f}")
        change = f"± {report.change_error * 100:.1f} %"
        table.add_row(f"± over {report.errors_over}", *errors, change, style="dim")
    OUT.print(table)
    if report.searches is not None:
        OUT.print(
            f"{report.searches.made:,} searches, {report.searches.saved:.1%} of the tokens without"
        )
    _print_frequencies(report)
    seconds = report.seconds
    OUT.print(
        f"helped {report.tokens_helped / report.tokens:.0%} of the tokens, hurt "
        f"{report.tokens_hurt / report.tokens:.0%} ({report.share_hurt:.0%} by more than 0.1 "
        f"nats); LM {seconds.lm:.1f} s, search {seconds.search:.1f} s, total {seconds.total:.1f} s"
    )


def _print_frequencies(report: "PerplexityReport") -> None:
    """Print perplexity by how often a token occurs in the datastore."""
    table = new_table("in the datastore", "tokens", "LM", "kNN-LM", "change")
    for bucket in report.frequencies:
        times = f"{bucket.at_least:,}–{bucket.at_most:,} times" if bucket.at_least else "never"
        lm, knn = bucket.lm_perplexity, bucket.knn_perplexity
        table.add_row(times, f"{bucket.tokens:,}", f"{lm:,.2f}", f"{knn:,.2f}", _change(knn, lm))
    OUT.print(table)


def settings_line(parameters: "Sequence[Parameters]") -> str:
    """Return k, λ and T of each datastore."""
    return "; ".join(f"k {p.k}, λ {p.lmbda:g}, T {p.temperature:g}" for p in parameters)


def weights_line(weights: str, parameters: "Sequence[Parameters]") -> str:
    """Return how the weights are chosen, with those of k, λ and T that are fixed."""
    if weights == "learned":
        return "learned weights"
    if weights == "distance":
        return "λ by distance, " + "; ".join(f"k {p.k}, T {p.temperature:g}" for p in parameters)
    return settings_line(parameters)


def print_tuning(tuning: "Tuning") -> None:
    """Print perplexity by k and by the kind of mixture, and the mixture that was stored."""
    OUT.print(f"{tuning.tokens:,} tokens to tune on")
    if tuning.stored is not None:
        OUT.print(_stored_text_line(asdict(tuning.stored)), soft_wrap=True)
    for number, (sweep, chosen) in enumerate(zip(tuning.sweeps, tuning.parameters, strict=True), 1):
        title = f"datastore {number} alone" if len(tuning.sweeps) > 1 else None
        _print_sweep(sweep, chosen, tuning.lm_perplexity, title)
    table = new_table("mixture", "perplexity", "change", "hurt by > 0.1 nats", left="mixture")
    for fit in tuning.fits:
        table.add_row(
            fit.name + (" (each token held out)" if fit.held_out else ""),
            f"{fit.perplexity:.4f}",
            _change(fit.perplexity, tuning.lm_perplexity),
            f"{fit.share_hurt:.0%}",
        )
    OUT.print(table)
    _print_stored(tuning)


def _stored_text_line(stored: dict[str, Any]) -> str:
    """Return what stored text was tuned on, and what had no vote for it."""
    line = (
        f"{stored['tokens']:,} tokens of the stored text, from {stored['documents']:,} documents, "
        "each without its own votes"
    )
    if stored["copies"]:
        line += f" or those of its copies ({stored['copies']:,} documents)"
    if stored["large"]:
        line += (
            f"; {stored['large']:,} in documents of more than a fifth of the datastore, where only "
            "the text around each token is left out"
        )
    if stored["alone"]:
        line += f"; {stored['alone']:,} with no neighbor left"
    return line


def _print_sweep(
    sweep: "Sweep", chosen: "Parameters", lm_perplexity: float, title: str | None
) -> None:
    table = new_table("k", "best λ", "best T", "perplexity", title=title)
    for trial in sweep.by_k:
        table.add_row(
            str(trial.k),
            f"{trial.lmbda:g}",
            f"{trial.temperature:g}",
            f"{trial.perplexity:.4f}",
            style="bold green" if trial.k == chosen.k and chosen.lmbda else None,
        )
    table.add_row("–", "0", "–", f"{lm_perplexity:.4f}", style="dim")
    OUT.print(table)


def _print_stored(tuning: "Tuning") -> None:
    """Print which mixture commands use from now on."""
    from knnlm.tuning.fitting import LEAST_TOKENS

    if tuning.mixture.gate is not None:
        OUT.print(
            "stored learned weights, which every command uses unless k, λ or T is given; "
            f"with --weights fixed: {settings_line(tuning.parameters)}"
        )
    elif not any(parameters.lmbda for parameters in tuning.parameters):
        OUT.print(
            "No setting beats the language model alone on this text: stored λ = 0, which leaves "
            "the model unchanged. The datastore may hold a different kind of text."
        )
    else:
        OUT.print(
            f"stored {settings_line(tuning.parameters)}: perplexity "
            f"{tuning.lm_perplexity:.3f} → {tuning.knn_perplexity:.3f}"
        )
        if tuning.tokens < LEAST_TOKENS:
            OUT.print(f"learned weights need at least {LEAST_TOKENS:,} tokens to tune on")


def warn_of_poor_recall(path: Path, index: dict[str, Any]) -> None:
    """Warn on the standard error if an index finds fewer true neighbors than asked for.

    index: the facts about the index of the datastore at `path`.
    """
    if "target_recall" in index and index["recall"] < index["target_recall"]:
        ERR.print(
            f"warning: the index finds {index['recall']:.1%} of the true neighbors, below the "
            f"{index['target_recall']:.1%} asked for; knnlm index {path} builds another",
            soft_wrap=True,
        )


def print_store(facts: dict[str, Any]) -> None:
    """Print what a datastore holds and how it was made, from its facts."""
    settings, forgotten = facts["settings"], facts["forgotten_entries"]
    dropped = facts["dropped_index"]
    rows = {
        "entries": f"{facts['entries']:,}"
        + (f" (and {forgotten:,} forgotten; knnlm compact removes them)" if forgotten else ""),
        "documents": f"{facts['documents']:,}",
        "on disk": f"{amount(facts['size_bytes'], 'bytes')}B in {facts['shards']} shards",
        "model": f"{settings['model']} ({settings['model_dtype']})",
        "keys": f"{settings['key']}, {settings['dimension']} × {settings['key_dtype']}",
        "windows": f"{settings['window']} positions, {settings['context']} of them context, "
        f"{settings['boundary']} boundaries" + ", control tokens" * settings["control_tokens"],
        "index": _index_line(facts["index"])
        + (f"; {dropped} is built again by knnlm index, build or compact" if dropped else ""),
        "parameters": _parameters_line(facts["parameters"], facts["tuning"]),
    }
    if facts["origin"] is not None:
        rows["imported"] = _origin_line(facts["origin"])
    if facts["cluster"]:
        cluster = facts["cluster"]
        rows["cluster"] = (
            f"{cluster['shares']} shares × {cluster['replicas']} replicas at {cluster['address']}"
        )
    if facts["incomplete_documents"]:
        rows["incomplete"] = ", ".join(map(one_line, facts["incomplete_documents"][:3]))
    OUT.print(facts["path"], style="bold")
    table = Table("", Column(overflow="fold"), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    OUT.print(table)


def print_changes(store: Path, changes: "Changes") -> None:
    """Print what a build did, in documents, and what it left although it is gone."""
    counts = [
        f"{number:,} {word}"
        for word in ("added", "replaced", "moved", "unchanged", "removed")
        if (number := getattr(changes, word)) or word == "added"
    ]
    OUT.print(f"documents: {', '.join(counts)}", soft_wrap=True)
    if changes.gone:
        OUT.print(
            f"gone from their source and still stored: {changes.gone:,} (knnlm build --sync "
            "forgets them)",
            soft_wrap=True,
        )
    for folder in changes.emptied:
        OUT.print(
            f"nothing is left in {one_line(folder)}, whose documents are still stored: knnlm "
            f"forget {store} {one_line(folder)} forgets them",
            soft_wrap=True,
        )


def _origin_line(origin: dict[str, Any]) -> str:
    """Return where imported entries come from, and whether a model has proved them."""
    line = f"{origin['entries']:,} entries, from {origin['format']}"
    if not origin["verified"]:
        return f"{line}; unverified: no model has proved that the keys are its own"
    proof = origin["proof"]
    return (
        f"{line}; verified: of {proof['windows']} windows read again, {proof['exact']} agree "
        f"exactly and {proof['alike']} nearly"
    )


def _index_line(index: dict[str, Any]) -> str:
    if "nprobe" not in index:  # exact, or built by an older version, which kept no facts
        return str(index["kind"])
    line = (
        f"{index['kind']}, recall {index['recall']:.3f} at k {index['k']} with nprobe "
        f"{index['nprobe']}, {index['bytes_per_entry']:.0f} bytes per entry, "
        f"{index['milliseconds_per_query']:.2f} ms per query"
    )
    if index["recall"] < index["target_recall"]:
        line += f"; below the recall of {index['target_recall']:g} that was asked for"
    return line


def _parameters_line(parameters: dict[str, Any] | None, tuning: dict[str, Any] | None) -> str:
    """Return the stored parameters and their perplexity on the tuning text."""
    if parameters is None or tuning is None:
        return "not tuned; knnlm tune finds the best k, λ and T"
    line = (
        f"k {parameters['k']}, λ {parameters['lmbda']:g}, T {parameters['temperature']:g}: "
        f"perplexity {tuning['lm_perplexity']:.3f} → {tuning['knn_perplexity']:.3f} on "
        f"{tuning['tokens']:,} tuning tokens"
        + "".join(f", together with {other}" for other in tuning.get("together_with", []))
    )
    perplexities = {fit["name"]: fit["perplexity"] for fit in tuning.get("fits", [])}
    learned = perplexities.get("learned weights")
    if learned is not None and learned < perplexities["fixed weights"]:  # else not stored
        line += f"; learned weights {learned:.3f}"
    if tuning.get("stored"):
        line += f"; {_stored_text_line(tuning['stored'])}"
    return line
