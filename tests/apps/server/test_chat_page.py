"""docs/chat.md: every snippet runs, as it is printed but for the server's address and name."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from serving import TEMPLATE, serving
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.datastore.datastore import Datastore
from knnlm.knn_lm import KNNLM
from knnlm.model.language_model import LanguageModel

PAGE = Path(__file__).parents[3] / "docs" / "chat.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SNIPPETS: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page speaks of: a tiny model under the real one's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    LanguageModel(tiny_llama(), tokenizer, name=NAME).save(tmp_path / NAME)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.txt").write_text(PROSE * 3)
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROSE[:60]}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": talk}))
    return tmp_path


def test_the_page(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for kind, text in SNIPPETS if kind == "bash" for line in text.splitlines()]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "knnlm"
        done = CliRunner().invoke(app, arguments, input="Hello\n/sources\n/quit\n")
        assert done.exit_code == 0, (command, done.output)
    assert len(commands) == 4

    def open_model() -> KNNLM:
        lm = LanguageModel.load(work / NAME, dtype="float32", device="cpu")
        return KNNLM(lm, Datastore("docs.store"))

    names: dict[str, Any] = {}
    with serving(open_model) as served:
        for source in (text for kind, text in SNIPPETS if kind == "python"):
            here = source.replace("http://127.0.0.1:8000", served.url)
            exec(here.replace('model="docs.store"', 'model="tiny"'), names)
    out = capsys.readouterr().out
    assert names["answer"].choices[0].message.content in out
    assert "docs/page.txt" in out
    assert names["reply"].text in out
    assert PROSE[:60] in out
    names["client"].close()
    assert "docs/chat.md" in (PAGE.parents[1] / "README.md").read_text()
