"""Every option and argument of every command, with values that nobody expects.

Whatever is given, a command succeeds or refuses in one line, without a traceback, without a control
character for the terminal, and, where it refuses, without a change on the disk.
"""

import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import PROSE, byte_tokenizer, tiny_llama
from stores import is_progress, snapshot
from typer.core import TyperGroup
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.apps.server.service import Service
from knnlm.model.language_model import LanguageModel

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
HUGE = "9" * 23
NUMBERS = [
    *("0", "-1", HUGE, f"-{HUGE}", "2147483648", "9223372036854775808", "18446744073709551616"),
    *("nan", "inf", "-inf", "1e400", "1e-400", "1e-35", "-0.0", "1e30", "9" * 5000, "", " 5"),
    *("0x10", "1_000", "١٢", "²", "3\x1b[31m", "\udce9"),
]
TEXTS = [
    *("", " ", ".", "-", "*", "**", "[", "~", "~nobody/x", "{}", "%s", "a" * 5000, "two\nlines"),
    *("\x1b]0;OWNED\x07\x1b[2J", "\x9b31m", "a\u202eb\u2066c\u2028d", "caf\udce9", "🙂" * 300),
    *("folder", "pipe", "dangling", "loop", "locked", "empty.txt", "binary.txt", "latin.txt"),
    *(
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "texts/0.txt",
        "texts/0.txt/x",
        "bad\x1b[31m.txt",
    ),
    *("docs.store", "other.store", "hf:", "x.gguf", "rows.jsonl", "a.parquet", "caf\udce9.txt"),
    *("bad\x1b[31m.txt", "texts"),
    *("cuda:99", "Flat", "IDMap,Flat", "IVF9999,Flat", "BIVF8", "PQ4", "IVF4,PQ4x4fs,RFlat"),
    *("127.0.0.1", "::1", "localhost:80", "a..b", HUGE),
]
RUNS = {  # a call of each command that works, and does little
    "build": ["new.store", "texts", "--model", "tiny", "--no-tune"],
    "index": ["docs.store", "--k", "5"],
    "tune": ["docs.store", "held.txt", "--max-k", "4", "--max-tokens", "20"],
    "eval": ["docs.store", "held.txt", "--k", "4", "--max-tokens", "20"],
    "generate": ["docs.store", "The", "--k", "4", "--max-new-tokens", "2", "--sample"],
    "explain": ["docs.store", "The nearest", "--k", "4", "--tokens", "1", "--sources", "1"],
    "explore": ["docs.store", "--port", "0", "--k", "4"],
    "serve": ["docs.store", "--port", "0", "--k", "4"],
    "chat": ["docs.store", "--k", "4"],
    "mcp": ["docs.store", "--k", "4", "--http", "--port", "0"],
    "info": ["docs.store", "--documents"],
    "forget": ["docs.store", "texts/0.txt"],
    "compact": ["docs.store"],
    "verify": ["docs.store"],
    "import": ["new.store", "arrays", "--from", "npy"],
    "export": ["docs.store", "new-arrays"],
    "demo": ["--folder", "demo", "--model", "./nowhere"],  # more takes minutes
}
VALUES_OF_EACH = 5
runner = CliRunner()


def commands() -> dict[str, Any]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


def test_every_command_is_tried() -> None:
    assert {*RUNS, "cluster"} == set(commands())  # a cluster's tests have its own commands


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a datastore, texts, and odd files of every kind."""
    work = tmp_path_factory.mktemp("odd")
    (work / "texts").mkdir()
    (work / "folder").mkdir()
    for number in range(2):
        (work / "texts" / f"{number}.txt").write_text(f"{number}. {PROSE}")
    (work / "held.txt").write_text(PROSE[60:300])
    (work / "empty.txt").write_text("")
    (work / "binary.txt").write_bytes(bytes(9))
    (work / "latin.txt").write_bytes(b"caf\xe9")
    (work / "bad\x1b[31m.txt").write_bytes(b"\xff\x1b[31m")
    (work / "a.parquet").write_bytes(b"PAR1\x1b[31m")
    (work / "x.gguf").write_bytes(b"GGUF\x1b[31m")
    (work / "rows.jsonl").write_text('{"\\u001b[31m": 1}\n')
    (work / "caf\udce9.txt").write_text("text")
    (work / "locked").mkdir(mode=0o000)
    (work / "dangling").symlink_to("nothing")
    (work / "loop").symlink_to("loop")
    LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny").save(work / "tiny")
    before = Path.cwd()
    os.chdir(work)
    try:
        for store in ("docs.store", "other.store"):
            arguments = ["build", store, "texts", "--model", "tiny", "--window", "64", "--no-tune"]
            assert runner.invoke(app, arguments).exit_code == 0
        assert runner.invoke(app, ["export", "docs.store", "arrays"]).exit_code == 0
    finally:
        os.chdir(before)
    return work


@pytest.fixture
def work(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace as the current folder; models are kept, servers end at once."""
    loaded: dict[str, LanguageModel] = {}
    load = LanguageModel.load

    def load_once(name: str, **options: Any) -> LanguageModel:
        key = repr((name, sorted(options.items())))
        if key not in loaded:
            loaded[key] = load(name, **options)
        return loaded[key]

    def run(self: Service, sockets: object) -> None:
        self._on_start()
        self.engine.close()

    monkeypatch.setattr(LanguageModel, "load", load_once)
    monkeypatch.setattr(Service, "run", run)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    restore(pristine, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def restore(pristine: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work, symlinks=True)
    os.mkfifo(work / "pipe")
    os.chdir(work)  # the folder of that name is another one now


def calls(name: str, command: Any) -> Iterator[list[str]]:
    """Yield calls of a command with one odd value each: some for every option and argument."""
    drawn = random.Random(name)
    position = 0
    for parameter in command.params:
        kind = parameter.type_descriptor.annotation
        if kind is bool or "--help" in parameter.opts:
            continue
        numeric = any(f"{number.__name__}" in str(kind) for number in (int, float))
        values = drawn.sample(NUMBERS if numeric else TEXTS, VALUES_OF_EACH)
        for value in values:
            arguments = list(RUNS[name])
            if parameter.param_type_name == "argument":
                arguments[position] = value
            else:
                option = parameter.opts[0]
                arguments = without(arguments, option)
                arguments.append(f"{option}={value}")
            yield [name, *arguments]
        position += parameter.param_type_name == "argument"


def without(arguments: list[str], option: str) -> list[str]:
    """Leave out an option and its value."""
    if option not in arguments:
        return arguments
    place = arguments.index(option)
    return arguments[:place] + arguments[place + 2 :]


@pytest.mark.parametrize("name", RUNS)
def test_odd_values(name: str, work: Path, pristine: Path) -> None:
    before = snapshot(work)
    for arguments in calls(name, commands()[name]):
        result = runner.invoke(app, arguments)
        told = f"knnlm {arguments}\n{result.output[-2000:]}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(told) from result.exception
        assert result.exit_code in (0, 1, 2), told
        assert not CONTROL.search(result.output), told
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        after = snapshot(work)
        if result.exit_code == 0:
            assert errors == [], told
        else:
            assert after == before, told
            assert result.stdout == "" or name == "demo", told
            assert len(errors) == (result.exit_code == 1), told
            assert ("Usage: " in result.stderr) == (result.exit_code == 2), told
        if result.exit_code == 1:
            others = [line for line in result.stderr.splitlines() if line not in errors]
            assert all(is_progress(line) or "WARNING" in line for line in others), told
        if after != before:
            restore(pristine, work)
