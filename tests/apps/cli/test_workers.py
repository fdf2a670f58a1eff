"""`knnlm build` with many workers: the same datastore, and the exit status of what is set aside."""

import json
import sys
from pathlib import Path

import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from forked_workers import POISON, Trouble, end_at_poison
from stores import snapshot
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.model.language_model import LanguageModel

# newer Pythons warn of forks beside threads; ours use no thread pool
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def arguments(tmp_path: Path, llama_lm: LanguageModel) -> list[str]:
    """A text of three files, and a model."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number}. " + PROSE * (number + 1))
    llama_lm.save(tmp_path / "model")
    return [str(tmp_path / "texts"), "--model", str(tmp_path / "model"), "--window", "64"]


def test_processes_build_what_one_process_builds(tmp_path: Path, arguments: list[str]) -> None:
    for name, options in [("one", []), ("many", ["--workers", "2"])]:
        result = CliRunner().invoke(app, ["build", str(tmp_path / name), *arguments, *options])
        assert result.exit_code == 0, result.stderr
    assert snapshot(tmp_path / "many") == snapshot(tmp_path / "one")


def test_what_is_set_aside_is_named_and_the_exit_status_is_1(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel(tiny_llama(), byte_tokenizer())
    end_at_poison(Trouble(lm, monkeypatch), lm)
    (tmp_path / "texts" / "1.txt").write_text(POISON + PROSE)
    command = ["build", str(tmp_path / "s"), *arguments, "--workers", "2", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    (name,) = json.loads(result.stdout)["changes"]["set_aside"]
    assert Path(name).name == "1.txt"
    last = result.stderr.splitlines()[-1]
    assert last == f"error: reading {name} ended two workers, so that the build set it aside"
    assert json.loads(result.stdout)["documents"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "workers must be at least 1, got 0: leave workers out to use this"),
        (["--workers", "2", "--lease", "0"], "lease must lie in [1, 1e+09], got 0.0"),
        (["--ray", "ray://head:1"], "ray='ray://head:1' must be HOST:PORT of a cluster"),
    ],
)
def test_refusals_come_before_anything_is_written(
    tmp_path: Path, arguments: list[str], options: list[str], message: str
) -> None:
    pytest.importorskip("ray")
    result = CliRunner().invoke(app, ["build", str(tmp_path / "s"), *arguments, *options])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "s").exists()


def test_without_ray_the_extra_is_named(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["build", str(tmp_path / "s"), *arguments, "--ray", "auto"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "pip install 'knnlm[ray]'" in result.stderr
