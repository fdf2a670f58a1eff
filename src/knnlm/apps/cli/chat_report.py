"""An answer colored by gain and loss, and the stored passages that wrote it."""

from typing import TYPE_CHECKING

from rich.text import Text

from knnlm.apps.cli.console import OUT, one_line
from knnlm.apps.cli.explain_report import colored, passage_text

if TYPE_CHECKING:
    from knnlm.evaluation.explanation import Explanation

_SHOWN = 5


def print_written(explanations: "list[Explanation]") -> None:
    """Print an answer, and the passages with the most votes for what it says."""
    from knnlm.apps.cli.conversation import written_by_passages

    if not explanations:
        OUT.print("there is no answer yet")
        return
    OUT.print(colored(explanations), soft_wrap=True)
    OUT.print(
        Text.assemble(("green", "green"), ": the datastore helped, ", ("red", "red"), ": it hurt")
    )
    written = written_by_passages(explanations)
    if not written:
        OUT.print("\nno passage voted for any of it")
    for one in written[:_SHOWN]:
        source = one.source
        OUT.print(
            Text.assemble(
                "\n",
                (repr(one.text), "bold"),
                f"  {one.votes:.2f} votes, ",
                (f"{one_line(source.document)}, token {one.first}", "cyan"),
                "\n    …",
                passage_text(source.before),
                (passage_text(source.value), "reverse"),
                passage_text(source.after),
                "…",
            ),
            soft_wrap=True,
        )
    if len(written) > _SHOWN:
        OUT.print(f"\n… and {len(written) - _SHOWN:,} passages with fewer votes", style="dim")
