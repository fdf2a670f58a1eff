""".gitignore files: what git itself leaves out is left out, and how much that is, is said."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import refusal

from knnlm.errors import InvalidTextError
from knnlm.text.sources import read_documents

FILES = [
    "a.txt",
    "b.log",
    "keep.log",
    "build/x.txt",
    "build/keep.log",
    "src/a.txt",
    "src/b.log",
    "src/build/y.txt",
    "src/gen/z.txt",
    "src/gen/keep.txt",
    "src/deep/er/a.txt",
    "src/deep/er/tmp/t.txt",
    "docs/top.txt",
    "docs/sub/top.txt",
    "docs/white space.txt",
    "own/excluded.txt",
    "café/ü.txt",
]
PATTERNS = {
    ".gitignore": "*.log\n!keep.log\n# a comment\n\nbuild/\n/docs/top.txt\nwhite\\ space.txt\n",
    "src/.gitignore": "gen/*\n!gen/keep.txt\n!b.log\n",
    "src/deep/.gitignore": "**/tmp\ncafé\n",
    ".git/info/exclude": "excluded.txt\n",
}


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tree"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.chdir(root)
    return root


def make_work_tree(root: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    # what the machine's own configuration ignores is no part of this
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    write_patterns(root)


def write_patterns(root: Path) -> None:
    for name, patterns in PATTERNS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(patterns)


def names(source: str, gitignore: bool = True) -> list[str]:
    return [document.name for document in read_documents(source, gitignore=gitignore)]


def seen_by_git(root: Path, folder: str = ".") -> list[str]:
    command = ["git", "-c", "core.excludesFile=/dev/null", "ls-files", "-z", "-co"]
    command += ["--exclude-standard", folder]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    found = [name for name in listed.decode().split("\0") if name]
    return sorted(name for name in found if ".gitignore" not in name)


def test_a_work_tree_is_read_as_git_sees_it(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_work_tree(tree)
    expected = seen_by_git(tree)
    assert 5 < len(expected) < len(FILES) - 3
    with caplog.at_level(logging.WARNING):
        assert names(".") == expected
    assert caplog.messages == [
        "left out 5 files and 3 folders that .gitignore names; --no-gitignore reads them"
    ]
    assert names(str(tree)) == [f"{tree}/{name}" for name in expected]
    for folder in ("src", "src/deep", "docs"):
        assert names(folder) == seen_by_git(tree, folder)
    caplog.clear()
    assert names(".", gitignore=False) == sorted(FILES)
    assert caplog.messages == []


def test_patterns_count_without_git_in_the_folder_that_is_read(tree: Path) -> None:
    make_work_tree(tree)
    expected = seen_by_git(tree)
    shutil.rmtree(tree / ".git")
    assert names(".") == sorted([*expected, "own/excluded.txt"])
    assert "docs/top.txt" in names("docs"), "no work tree, so nothing above counts"


def test_what_is_named_itself_is_read(tree: Path) -> None:
    make_work_tree(tree)
    assert names("b.log") == ["b.log"]
    assert names("*.log") == ["b.log", "keep.log"]
    assert names("build") == ["build/keep.log", "build/x.txt"]
    assert names("src/gen") == ["src/gen/keep.txt"]


def test_a_pattern_that_is_none_is_refused_by_its_file(tree: Path) -> None:
    (tree / "src" / ".gitignore").write_text("!\n")
    with refusal(InvalidTextError, "src/.gitignore must hold patterns", "--no-gitignore"):
        read_documents(".")
    assert names(".", gitignore=False) == sorted(FILES)
