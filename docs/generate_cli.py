"""Write docs/cli.md from the command line itself: python docs/generate_cli.py."""

import re
from pathlib import Path

import typer
from typer.core import TyperGroup

from knnlm.apps.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
_HEAD = """\
# The command line

<!-- Written by docs/generate_cli.py (make docs); a test fails when it is out of date. -->

{about}

TEXT stands for any number of files, folders or globs of text (one document per file), `.jsonl`,
`.csv`, `.tsv`, `.parquet` and `.json` files (one document per row, see `--text-column`),
`hf:NAME[:CONFIG][:SPLIT]`, or `-` for the standard input; [texts.md](texts.md) says what can be
read, and what every refusal means. Results go to the standard output, with `--json` as one line of
JSON; progress and errors go to the standard error. Invalid input changes nothing on disk and gives
one line that begins with `error:` and exit status 1; wrong usage gives exit status 2, an
interruption 130. `knnlm --version` prints the version.

| command | |
|---|---|
"""


def render() -> str:
    """Return the page: every command, its help, its arguments, its options and their defaults."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    context = typer.Context(group, info_name="knnlm", terminal_width=100)
    parts = [_HEAD.format(about=group.help)]
    sections = []
    for name in group.list_commands(context):
        command = group.commands[name]
        paragraphs = (command.help or "").split("\n\n")
        parts.append(f"| [`knnlm {name}`](#knnlm-{name}) | {_one_line(paragraphs[0])} |\n")
        inner = typer.Context(command, info_name=name, parent=context)
        usage = re.sub(r"{(\w+)}", _upper, command.get_usage(inner).removeprefix("Usage: "))
        usage = re.sub(r"\[\w+\]", lambda match: match[0].upper(), usage)
        sections += [f"## knnlm {name}", *map(_paragraph, paragraphs), _code(usage)]
        records = [
            (parameter.param_type_name, record)
            for parameter in command.get_params(inner)
            if (record := parameter.get_help_record(inner)) and "--help" not in parameter.opts
        ]
        for kind in ("argument", "option"):
            rows = [_row(*record) for record_kind, record in records if record_kind == kind]
            if rows:
                sections.append("\n".join([f"| {kind} | | default |", "|---|---|---|", *rows]))
    return "".join(parts) + "\n" + "\n\n".join(sections) + "\n"


def _upper(match: re.Match[str]) -> str:
    return match[1].upper()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _paragraph(text: str) -> str:
    is_example = text.startswith("    ")
    return _code("\n".join(map(str.strip, text.splitlines()))) if is_example else text.strip()


def _row(name: str, described: str) -> str:
    """Return a table row from a line of `--help`: `text  [default: value; rule]`."""
    if not name.startswith("-"):  # an argument: `text... <list[str]>`
        name = name.partition(" ")[0].upper()
    text, _, facts = described.removesuffix("]").partition("  [")
    default = facts.removeprefix("default: ") if facts != "required" else "required"
    cells = [f"`{name}`", text, default]
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
