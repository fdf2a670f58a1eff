"""`knnlm demo` from its first step to its last, on a tiny model and a tiny library."""

import asyncio
from pathlib import Path

import pytest
from conftest import PROSE
from serving import fresh_lm
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.datastore.datastore import Datastore


def test_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "asyncio"
    library.mkdir()
    for number in range(8):
        (library / f"{number}.py").write_text(f"# {number}\n{PROSE[number * 20 :][:300]}")
    monkeypatch.setattr(asyncio, "__file__", str(library / "__init__.py"))
    fresh_lm().save(tmp_path / "model")
    folder = tmp_path / "demo"
    arguments = ["demo", "--folder", str(folder), "--model", str(tmp_path / "model")]
    for _ in range(2):  # the second time, the datastore is there
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        out = result.stdout
        steps = [
            line[:2] for line in out.splitlines() if line[:2] in {f"{n}." for n in range(1, 9)}
        ]
        assert steps == ["1.", "2.", "3.", "4.", "5."]
        assert "storing 5 files of Python's asyncio" in out
        assert "evaluating on 3 other files" in out
        assert "sources of these 48 tokens" in out
        assert f"info {folder / 'asyncio.store'} --documents" in out
    assert Datastore(folder / "asyncio.store").tuning is not None
