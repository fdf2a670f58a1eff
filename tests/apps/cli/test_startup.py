"""What needs no model starts fast: it loads no heavy package."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving import tiny_store
from typer.testing import CliRunner

import knnlm
from knnlm.apps.cli.main import app

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "matplotlib",
    "faiss",
    "datasets",
    "safetensors",
    "numba",
}
PROGRAM = """
import sys
try:
    from knnlm.apps.cli.main import app
    app(sys.argv[1:])
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def run(*arguments: str) -> tuple[str, set[str]]:
    """Run a command in a new process; return its output and the modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout, set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("build", "--help"), ("info", "--help")],
    ids=" ".join,
)
def test_help_and_version_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    out, loaded = run(*arguments)
    assert out
    assert "knnlm.apps.cli.main" in loaded
    assert loaded & {*HEAVY, "rich.progress", "knnlm.datastore.datastore"} == set()


@pytest.mark.parametrize("options", [(), ("--json",), ("--documents",)], ids=" ".join)
def test_info_loads_nothing_heavy(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tiny_store(tmp_path / "docs.store")
    out, loaded = run("info", str(path), *options)
    assert "docs.store" in out.replace("\n", "")  # a long path is wrapped
    assert loaded & HEAVY == set()


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"knnlm {knnlm.__version__}\n")
