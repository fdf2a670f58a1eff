"""The pages' snippets run as they are printed, with a tiny model under the name that they use."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from stores import distinct_documents

import knnlm.tuning.fitting
from knnlm.maintenance import build
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel

ROOT = Path(__file__).parents[1]
NAME = "HuggingFaceTB/SmolLM2-135M"


def snippets(page: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert found
    return found


def run(page: str) -> dict[str, Any]:
    """Run a page's Python, one snippet after another, as in one session."""
    names: dict[str, Any] = {"__name__": "snippet"}
    for number, source in enumerate(snippets(page, "python")):
        exec(compile(source, f"{page}, snippet {number}", "exec"), names)
    return names


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, the datastores and the texts that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm = LanguageModel(tiny_llama(), byte_tokenizer(), name=NAME)
    lm.save(tmp_path / NAME)
    lm = LanguageModel.load(NAME, dtype="float32")
    for name in ("docs.store", "other.store"):
        store = build(name, lm, distinct_documents(2), window=64)
        store.save_parameters(Parameters(16, 0.4, 20.0), {})
    for name in ("docs", "held-out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.txt").write_text(PROSE[:200])
    (tmp_path / "held-out.txt").write_text(
        "\n".join([PROSE.strip(), "The nearest zebra.", "Another memory of places."])
    )
    return tmp_path


def test_attaching(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/attaching.md")
    out = capsys.readouterr().out
    assert out.count("To open a datastore") == 2
    assert names["loss"].item() > 0
    assert not names["model"]._forward_hooks
    assert "docs/attaching.md" in (ROOT / "README.md").read_text()


def test_mixing(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knnlm.tuning.fitting, "LEAST_TOKENS", 32)
    names = run("docs/mixing.md")
    assert "fixed weights + cache" in capsys.readouterr().out
    assert names["fixed"].mixer.weights == "fixed"
    assert names["by_distance"].mixer.weights == "distance"
    assert names["with_cache"].mixer.cache == names["tuning"].mixture.cache
    assert "docs/mixing.md" in (ROOT / "README.md").read_text()


def test_lm_eval(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(work / "cache"))
    (work / "tasks").mkdir()
    (task,) = snippets("docs/lm-eval.md", "yaml")
    (work / "tasks" / "held_out.yaml").write_text(task)
    names = run("docs/lm-eval.md")
    scored, report = names["results"]["results"]["held_out"], names["report"]
    assert report.tokens > 100
    assert scored["word_perplexity,none"] == pytest.approx(report.knn.word_perplexity, rel=1e-5)
    assert scored["bits_per_byte,none"] == pytest.approx(report.knn.bits_per_byte, rel=1e-5)
    assert report.knn.perplexity < 0.98 * report.lm.perplexity, "the datastore must matter here"


def test_readme(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(work / "docs.store")  # the README begins without it
    source = "\n".join(snippets("README.md", "python"))
    assert "k=1024" in source
    exec(source.replace("k=1024", "k=16"), {})  # of so few entries
    assert "docs/page.txt" in capsys.readouterr().out
