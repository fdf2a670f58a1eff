"""Archives and ignored files in a datastore: what is gone from them goes, the rest stays."""

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE
from made_files import archive

from knnlm.datastore.append import append_documents
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.sources import Changes
from knnlm.model.language_model import LanguageModel
from knnlm.text.sources import read_documents

ONE, TWO, THREE = (f"{number} {PROSE[:60]}" for number in range(3))


def build(lm: LanguageModel, *sources: str, **arguments: Any) -> Datastore:
    documents = read_documents(*sources)
    return append_documents(Path("s"), lm, documents, window=64, context=16, **arguments)


def names(store: Datastore) -> list[str]:
    return sorted(document.name for document in store.documents())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/a.txt").write_text(ONE)
    return tmp_path


def test_what_is_gone_from_an_archive_goes(folder: Path, llama_lm: LanguageModel) -> None:
    rows = '{"text": "row one"}\n{"text": "row two"}\n'
    members = [("x/a.txt", ONE), ("x/b.txt", TWO), ("r.jsonl", rows)]
    Path("docs/all.zip").write_bytes(archive(members))
    store = build(llama_lm, "docs")
    assert store.changes == Changes(added=5)
    assert names(store)[0] == "docs/a.txt"
    assert names(store)[-1] == "docs/all.zip/x/b.txt"
    again = build(llama_lm, str(folder / "docs" / "all.zip"), sync=True)
    assert again.changes == Changes(unchanged=4)

    changed = [("x/a.txt", ONE), ("x/c.txt", THREE), ("r.jsonl", rows[:20])]
    Path("docs/all.zip").write_bytes(archive(changed))
    store = build(llama_lm, "docs")
    assert store.changes == Changes(added=1, unchanged=3, removed=1, gone=1), "rows go, files stay"
    store = build(llama_lm, "docs", sync=True)
    assert store.changes == Changes(unchanged=4, removed=1)
    Path("docs/all.zip").unlink()
    store = build(llama_lm, "docs", sync=True)
    assert store.changes == Changes(unchanged=1, removed=3)
    assert names(store) == ["docs/a.txt"]


def test_a_member_has_not_moved_while_its_archive_is_there(llama_lm: LanguageModel) -> None:
    Path("all.zip").write_bytes(archive([("b.txt", TWO)]))
    build(llama_lm, "all.zip")
    Path("docs/b.txt").write_text(TWO)
    store = build(llama_lm, "docs", "all.zip")
    assert store.changes == Changes(added=2, unchanged=1)
    Path("all.zip").rename("docs/moved.zip")
    store = build(llama_lm, "docs", sync=True)
    assert store.changes == Changes(unchanged=2, moved=1)
    assert names(store) == ["docs/a.txt", "docs/b.txt", "docs/moved.zip/b.txt"]


def test_an_archive_or_its_members_can_be_forgotten(llama_lm: LanguageModel) -> None:
    Path("all.zip").write_bytes(archive([("x/a.txt", ONE), ("x/b.txt", TWO), ("c.txt", THREE)]))
    store = build(llama_lm, "all.zip")
    assert [d.name for d in store.forget(["all.zip/c.txt"])] == ["all.zip/c.txt"]
    assert [d.name for d in store.forget(["all.zip/x"])] == ["all.zip/x/a.txt", "all.zip/x/b.txt"]
    store = build(llama_lm, "all.zip")
    assert len(store.forget(["all.zip"])) == 3


def test_what_is_ignored_from_now_on_goes(
    llama_lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    Path("docs/b.log").write_text(TWO)
    build(llama_lm, "docs")
    Path("docs/.gitignore").write_text("*.log\n")
    with caplog.at_level(logging.WARNING, logger="knnlm.text"):
        store = build(llama_lm, "docs", sync=True)
    assert store.changes == Changes(unchanged=1, removed=1)
    assert "left out 1 files and 0 folders that .gitignore names" in caplog.text
