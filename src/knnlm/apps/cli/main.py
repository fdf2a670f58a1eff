"""The command `knnlm`: its commands in the order of its help, and how each of them exits."""

import errno
import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knnlm import __version__
from knnlm.apps.cli import (
    build,
    console,
    demo,
    evaluate,
    explain,
    explore,
    generate,
    index,
    serve,
    store,
    tune,
)
from knnlm.errors import KNNLMError


class _Commands(TyperGroup):
    """Turns errors into one line and exit status 1, an interruption into exit status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KNNLMError as error:
            console.print_error(str(error))
            raise typer.Exit(1) from error
        except OSError as error:  # from the system: no permission, a file name too long
            if error.errno in (None, errno.EPIPE):
                raise
            console.print_error(f"{error.filename}: {error.strerror}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            console.ERR.print(
                "interrupted: everything committed so far is kept; rerun the same command to "
                "resume",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"knnlm {__version__}")
        raise typer.Exit
    return asked


_Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
]


@app.callback()
def _knnlm(*, version: _Version = False) -> None:
    """Give any Hugging Face causal language model a memory of your text, without training it."""


app.command()(build.build)
app.command()(index.index)
app.command()(tune.tune)
app.command("eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(explain.explain)
app.command()(explore.explore)
app.command()(serve.serve)
app.command()(store.info)
app.command()(store.forget)
app.command()(store.compact)
app.command()(store.verify)
app.command()(demo.demo)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
