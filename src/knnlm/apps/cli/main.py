"""The command `knnlm`: its commands in the order of its help, and how each of them exits."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knnlm import __version__
from knnlm.apps.cli import (
    build,
    chat,
    cluster,
    console,
    demo,
    evaluate,
    explain,
    explore,
    export,
    generate,
    import_,
    index,
    mcp,
    serve,
    store,
    tune,
)
from knnlm.errors import KNNLMError

# typer has no name for the error of wrong usage, only for this kind of it
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Turns errors into one line and exit status 1, an interruption into exit status 130."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options before the command; see `_visible_usage`."""
        with _visible_usage():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _visible_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            console.ERR.print(
                "interrupted: everything committed so far is kept; rerun the same command to "
                "resume",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
        except Exception as error:
            message = _message(error)
            if message is None:
                raise
            console.print_error(message)
            raise typer.Exit(1) from error


@contextmanager
def _visible_usage() -> Iterator[None]:
    """Keep control characters out of the message about wrong usage, which typer prints."""
    try:
        yield
    except _UsageError as error:
        error.message = console.visible(error.message)
        raise


def _message(error: Exception) -> str | None:
    """Return the line that explains an error to people; None for those that are faults of ours."""
    match error:
        case KNNLMError() | ImportError():
            return str(error)
        case OSError():  # from the system: no permission, a file name too long
            if error.errno == errno.EPIPE:
                return None
            reason = error.strerror or str(error) or type(error).__name__
            return reason if error.filename is None else f"{error.filename}: {reason}"
        case MemoryError():
            return f"not enough memory: {error}" if str(error) else "not enough memory"
        case RuntimeError() if "allocate memory" in str(error):  # torch's own
            return f"not enough memory: {error}"
    return None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> bool:
    if asked:
        console.OUT.print(f"knnlm {__version__}")
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
app.command()(chat.chat)
app.command()(explain.explain)
app.command()(explore.explore)
app.command()(serve.serve)
app.command()(mcp.mcp)
app.command()(cluster.cluster)
app.command()(store.info)
app.command()(store.forget)
app.command()(store.compact)
app.command()(store.verify)
app.command("import")(import_.import_store)
app.command()(export.export)
app.command()(demo.demo)


def main() -> None:
    """Run the command line."""
    console.prepare_streams()
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[console.LogHandler()]
    )
    logging.getLogger("knnlm.index").setLevel(logging.INFO)  # what building an index will take
    try:
        app()
    except OSError as error:  # from typer, which prints the help itself
        console.STDOUT.fail(error)
    finally:
        console.STDOUT.flush()
