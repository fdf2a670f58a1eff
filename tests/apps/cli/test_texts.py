"""Every command that reads texts, with every kind of bad text in every place of the corpus."""

import gzip
import os
import random
from pathlib import Path

import pytest
from conftest import PROSE
from stores import snapshot
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.datastore.datastore import Datastore
from knnlm.model.language_model import LanguageModel

runner = CliRunner()
BAD: dict[str, bytes] = {  # by the end of its name; what each is refused for
    "latin.txt": PROSE.encode() * 4000 + b"caf\xe9",
    "utf16.txt": PROSE.encode("utf-16"),
    "bare.txt": PROSE.encode("utf-16-le"),
    "cut.txt.gz": gzip.compress(PROSE.encode())[:-9],
    "plain.gz": PROSE.encode(),
    "syntax.jsonl": b'{"text": "a"}\n' * 50 + b"{",
    "list.jsonl": b'{"text": "a"}\n[1]\n',
    "number.ndjson": b'{"text": "a"}\n{"text": 3}\n',
    "half.jsonl": rb'{"text": "a"}' + b"\n" + rb'{"text": "\ud800"}',
    "column.jsonl": b'{"body": "a"}\n',
    "column.csv": b"a,b\n1,2\n",
    "fields.csv": b"text,b\nx,1\nx\n",
    "quote.tsv": b'text\tb\n"x\t1\n',
    "array.json": b'[{"text": "a"}, {"text": {}}]',
    "cut.json": b'[{"text": "a"}',
    "not.parquet": b"PAR1 and no more",
    "cut.zip": b"PK\x03\x04\x14",
    "not.ipynb": b"[]",
    "caf\udce9.txt": b"a name that UTF-8 cannot hold",
}
COMMANDS = {
    "new": ["build", "new.store", "corpus", "--model", "model", "--no-tune"],
    "build": ["build", "docs.store", "corpus", "--no-tune"],
    "eval": ["eval", "docs.store", "corpus", "--k", "4"],
    "tune": ["tune", "docs.store", "corpus", "--max-k", "4"],
    "index": ["index", "docs.store", "--queries", "corpus", "--k", "4"],
}


@pytest.fixture
def work(tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("corpus").mkdir()
    for number in range(3):
        Path(f"corpus/{number}5.txt").write_text(f"{number}. {PROSE}")
    llama_lm.save(tmp_path / "model")
    arguments = ["build", "docs.store", "corpus/05.txt", "--model", "model", "--no-tune"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_after_a_refusal_nothing_is_changed(
    command: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("texts are checked before the model is loaded")

    monkeypatch.setattr(LanguageModel, "load", load)
    drawn = random.Random(command)
    for name, data in BAD.items():
        bad = Path("corpus", f"{drawn.choice('013')}0-{name}")
        bad.write_bytes(data)
        before = snapshot(work)
        result = runner.invoke(app, COMMANDS[command])
        told = f"{name}: {result.output}"
        assert result.exit_code == 1, told
        assert isinstance(result.exception, SystemExit), told
        assert result.stderr.startswith("error: "), told
        assert result.stderr.count("\n") == 1, told
        assert bad.name.encode(errors="backslashreplace").decode() in result.stderr, told
        assert snapshot(work) == before, told
        bad.unlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_skipped_files_are_named_at_the_end(command: str, work: Path) -> None:
    for name, data in BAD.items():
        Path("corpus", name).write_bytes(data)
    Path("corpus/b.png").write_bytes(b"\x89PNG\r\n and text")
    result = runner.invoke(app, [*COMMANDS[command], "--skip-bad"])
    assert result.exit_code == 0, result.output
    listed = result.stderr[result.stderr.index("left out ") :].splitlines()
    assert listed[0] == f"left out {len(BAD)} that cannot be read:"
    assert len(listed) == len(BAD) + 1
    for name in BAD:
        assert sum(name.encode(errors="backslashreplace").decode() in line for line in listed) == 1
    if command in ("new", "build"):
        store = Datastore("new.store" if command == "new" else "docs.store")
        assert sum(".txt" in document.name for document in store.documents()) == 3


def test_texts_from_the_standard_input(work: Path) -> None:
    text = "What followed there is a guess at what follows here.\n"
    for arguments in (
        ["build", "docs.store", "-", "--no-tune"],
        ["eval", "docs.store", "/dev/stdin", "--k", "4"],
        ["explain", "docs.store", "-", "--k", "4"],
        ["index", "docs.store", "--queries", "-", "--k", "4"],
    ):
        result = runner.invoke(app, arguments, input=text)
        assert result.exit_code == 0, result.output
    assert [document.name for document in Datastore("docs.store").documents()][1:] == ["-"]
    result = runner.invoke(app, ["explain", "docs.store", "-", "--encoding", "nonsense"], input="")
    assert result.exit_code == 1
    assert "encoding must be the name of a text encoding" in result.stderr


def test_a_file_that_changes_after_the_check(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole documents before it are stored and indexed, one line tells, the status is 1."""
    load = LanguageModel.load

    def change(*arguments: object, **options: object) -> LanguageModel:
        Path("corpus/15.txt").write_bytes(b"caf\xe9")
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "load", change)
    result = runner.invoke(app, [*COMMANDS["new"], "--index", "ivf"])
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "corpus/15.txt must be UTF-8" in line
    assert "what came before it is stored, the rest is left out" in line
    store = Datastore("new.store")
    assert [(each.name, each.complete) for each in store.documents()] == [("corpus/05.txt", True)]
    assert list(Path("new.store/index").glob("ivf*")), "it is indexed"


@pytest.mark.parametrize("store", [os.fsdecode(b"caf\xe9.store"), os.fsdecode(b"\xff/s.store")])
def test_a_datastore_has_a_path_in_utf8(store: str, work: Path) -> None:
    before = snapshot(work)
    for arguments in (
        ["build", store, "corpus", "--model", "model"],
        ["info", store],
        ["eval", store, "corpus"],
        ["verify", store],
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert "must have a path in UTF-8" in result.stderr
        assert snapshot(work) == before


def test_a_text_that_may_be_a_mistyped_path_is_told(work: Path) -> None:
    for text, told in [("corpus/9.txt", True), ("notes.md", True), ("The nearest.", False)]:
        result = runner.invoke(app, ["explain", "docs.store", text, "--k", "4"])
        assert result.exit_code == 0, result.output
        assert (f"note: {text} is no file" in result.stderr) == told
