"""Explanations as text colored by gain and loss, the neighbors' votes, and their passages."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from knnlm.apps.cli.console import OUT, one_line, visible
from knnlm.apps.cli.reports import new_table

if TYPE_CHECKING:
    from knnlm.evaluation.explanation import Explanation, Source, Vote

_MIN_COLORED_NATS = 0.1
_MAX_DOCUMENTS = 10


def print_explanations(
    explanations: Sequence["Explanation"], shown: Sequence[int], first: int = 0
) -> None:
    """Print the text, the sources of the tokens numbered in `shown`, and each document's share.

    first: the number of the first token that is colored and counted; those before it are a prompt.
    """
    OUT.print(colored(explanations, first), soft_wrap=True)
    OUT.print(
        Text.assemble(("green", "green"), ": the datastore helped, ", ("red", "red"), ": it hurt\n")
    )
    if shown:
        _print_probabilities(explanations, shown)
    for number in shown:
        _print_votes(number, explanations[number])
    _print_documents(explanations[first:])


def colored(explanations: Sequence["Explanation"], first: int = 0) -> Text:
    """Return the text with its tokens from number `first` on colored by gain and loss."""
    text = Text()
    for number, explanation in enumerate(explanations):
        style = "dim" if number < first else _gain_style(explanation.gain)
        text.append(visible(explanation.text), style=style)
    return text


def _print_probabilities(explanations: Sequence["Explanation"], shown: Sequence[int]) -> None:
    table = new_table("", "token", "p_LM", "p_kNN", "p", "nats", left="token")
    for number in shown:
        explanation = explanations[number]
        table.add_row(
            str(number),
            OUT.render_str(repr(explanation.name), style="bold"),
            f"{math.exp(explanation.lm_log_prob):.3f}",
            f"{explanation.knn_prob:.3f}",
            f"{math.exp(explanation.log_prob):.3f}",
            Text(f"{explanation.gain:+.2f}", _gain_style(explanation.gain)),
        )
    OUT.print(table)


def _print_votes(number: int, explanation: "Explanation") -> None:
    """Print the tokens that the neighbors vote for, and below each its sources."""
    OUT.print(Text.assemble(f"\ntoken {number} ", (repr(explanation.name), "bold")))
    without_sources = []
    for vote in explanation.votes:
        sources = [source for source in explanation.sources if source.token == vote.token]
        if not sources and vote.token != explanation.token:
            without_sources.append(vote)
            continue
        style = "bold green" if vote.token == explanation.token else "bold"
        OUT.print(Text.assemble("  ", (repr(vote.text), style), f" {_described(vote)}"))
        for source in sources:
            _print_source(source)
    if without_sources:
        others = "; ".join(f"{vote.text!r} {_described(vote)}" for vote in without_sources)
        OUT.print(f"  others: {others}", style="dim", soft_wrap=True)


def _described(vote: "Vote") -> str:
    neighbors = "1 neighbor" if vote.neighbors == 1 else f"{vote.neighbors:,} neighbors"
    return f"{vote.weight:.1%} of the vote, {neighbors}"


def _print_source(source: "Source") -> None:
    OUT.print(
        Text.assemble(
            f"    {source.weight:6.1%}  d² {source.squared_distance:<8.4g} ",
            (f"{one_line(source.document)}, token {source.position}", "cyan"),
            "\n            ",
            "…" if source.before else "",
            passage_text(source.before),
            (passage_text(source.value), "reverse"),
            passage_text(source.after),
            "…",
        ),
        soft_wrap=True,
    )


def _print_documents(explanations: Sequence["Explanation"]) -> None:
    """Print how much of the tokens' probability came from the LM and from each document."""
    from knnlm.evaluation.explanation import sum_credits

    document_credits = sum_credits(explanations)
    tokens = len(explanations)
    from_lm = tokens - sum(credit.tokens for credit in document_credits)
    several = len({credit.store for credit in document_credits} - {""}) > 1
    table = new_table("", "tokens", "share", left="", title=f"sources of these {tokens:,} tokens")
    table.add_row(Text("the language model", "italic"), f"{from_lm:.1f}", f"{from_lm / tokens:.1%}")
    for credit in document_credits[:_MAX_DOCUMENTS]:
        name = f"{credit.store}: {credit.document}" if several else credit.document
        table.add_row(
            OUT.render_str(one_line(name)), f"{credit.tokens:.1f}", f"{credit.tokens / tokens:.1%}"
        )
    others = document_credits[_MAX_DOCUMENTS:]
    if others:
        rest = sum(credit.tokens for credit in others)
        name = f"{len(others):,} more documents"
        table.add_row(Text(name, "dim"), f"{rest:.1f}", f"{rest / tokens:.1%}")
    OUT.print()
    OUT.print(table)


def _gain_style(gain: float) -> str:
    if abs(gain) < _MIN_COLORED_NATS:
        return ""
    return ("green" if gain > 0 else "red") + (" bold" if abs(gain) > 1 else "")


def passage_text(text: str) -> str:
    """Return a part of a passage on one line."""
    return visible(text.replace("\r", "").replace("\n", "⏎").replace("\t", "→"))
