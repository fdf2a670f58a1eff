"""docs/cli.md describes the command line as it is now."""

import importlib.util
from pathlib import Path

import typer
from typer.core import TyperGroup

from knnlm.apps.cli.main import app

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = {
    "build",
    "index",
    "tune",
    "eval",
    "generate",
    "chat",
    "explain",
    "explore",
    "serve",
    "mcp",
    "cluster",
    "info",
    "forget",
    "compact",
    "verify",
    "import",
    "export",
    "demo",
}


def rendered() -> str:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page: str = module.render()
    return page


def test_the_page_is_what_the_generator_makes() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == rendered(), "docs/cli.md is out of date: make docs"


def test_every_command_and_option_is_on_the_page() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert set(group.commands) == COMMANDS
    sections = {part.partition("\n")[0]: part for part in page.split("## knnlm ")[1:]}
    assert list(sections) == list(group.commands)
    for name, command in group.commands.items():
        section = sections[name]
        assert f"[`knnlm {name}`](#knnlm-{name})" in page
        assert (command.help or "").partition("\n")[0] in section
        assert f"\nknnlm {name} [OPTIONS]" in section, "its usage"
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            shown = f"`{parameter.opts[0]}" if is_option else f"`{str(parameter.name).upper()}"
            assert shown in section
            help_text = str(getattr(parameter, "help", ""))
            assert help_text
            assert help_text in section
