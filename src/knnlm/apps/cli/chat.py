"""The command `chat`: a conversation with the kNN-LM in the terminal."""

import importlib
import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.chat_report import print_written
from knnlm.apps.cli.console import OUT, print_error, print_piece
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, open_model
from knnlm.choices import ModelDtype
from knnlm.errors import InvalidArgumentError, KNNLMError, import_optional
from knnlm.rules import check_whole

if TYPE_CHECKING:
    from knnlm.apps.cli.conversation import Conversation

_System = Annotated[
    str | None, typer.Option(help="What the model is told before the conversation begins.")
]
_MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")]

_HELP = """\
/sources     the passages that wrote the last answer
/lmbda 0.4   give the neighbors another weight λ; /lmbda alone takes the first one again
/clear       begin a new conversation
/quit        end; so does Ctrl-D
Ctrl-C ends an answer. The arrow keys edit what you write and go back to what you wrote."""


def chat(
    store: options.Store,
    *,
    also: options.Also = None,
    model: options.Model = None,
    k: options.K = None,
    lmbda: options.Lmbda = None,
    temperature: options.Temperature = None,
    weights: options.Weights = None,
    system: _System = None,
    max_new_tokens: _MaxNewTokens = 512,
    sample: options.Sample = False,
    sampling_temperature: options.SamplingTemperature = 1.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    no_drafts: options.NoDrafts = False,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
) -> None:
    """Talk to the kNN-LM in the terminal; needs a model with a chat template.

    Answers appear as they are written, and are the likeliest unless --sample is given. /sources
    shows which passages wrote the last one, /lmbda changes the weight of the neighbors, /help lists
    the commands. What is written to the standard input by another program is answered line by line.

        knnlm chat docs.store --system "You explain asyncio."
    """
    import_optional("prometheus_client", "knnlm chat", "server")
    from knnlm.apps.cli.conversation import Conversation
    from knnlm.apps.engine.sampling import SamplingOptions

    check_whole("max_new_tokens", max_new_tokens)
    sampling = SamplingOptions(sampling_temperature if sample else 0.0, top_p, seed)
    mixture = MixtureOptions(k, lmbda, temperature, weights)
    opened = open_model(store, also, ModelOptions(model, dtype, device), mixture)
    conversation = Conversation(opened, system, max_new_tokens, sampling, drafts=not no_drafts)
    OUT.print(f"{opened.lm.name} with {store}: write something, or /help", soft_wrap=True)
    _prepare_input()
    while (line := _read_line()) is not None and line != "/quit":
        try:
            if line.startswith("/"):
                _command(line, conversation)
            elif line:
                for text in conversation.answer(line):
                    print_piece(text)
                OUT.print()
        except KNNLMError as error:
            print_error(str(error))


def _prepare_input() -> None:
    """Let people edit what they write, where Python can."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused by name
    if sys.stdin.isatty():
        try:
            importlib.import_module("readline")  # `input` then has history and editing keys
        except ImportError:  # on Windows, whose console has its own
            return


def _read_line() -> str | None:
    """Return the next line without the spaces around it; None at the end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:  # the line is dropped
            OUT.print()


def _command(line: str, conversation: "Conversation") -> None:
    name, _, value = line.partition(" ")
    match name:
        case "/help":
            OUT.print(_HELP)
        case "/sources":
            print_written(conversation.explanations)
        case "/lmbda":
            conversation.lmbda = _number(value) if value.strip() else None
            OUT.print(f"λ is {value.strip() or 'as at the beginning'}")
        case "/clear":
            conversation.clear()
        case _:
            raise InvalidArgumentError(f"{name} is no command here: /help lists them")


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidArgumentError(f"lmbda must be a number, got {value.strip()!r}") from None
