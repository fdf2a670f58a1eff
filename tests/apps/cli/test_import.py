"""The commands import and export, and what reports say of an unverified datastore."""

import json
from pathlib import Path

import peers
import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.model.language_model import LanguageModel

runner = CliRunner()
SIZES = ["--window", "63", "--context", "31"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with files as knn-transformers writes them."""
    folder = tmp_path_factory.mktemp("work")
    lm = LanguageModel(tiny_llama(), byte_tokenizer())
    lm.save(folder / "tiny")
    tokens = lm.encode(["".join(f"{n}: {PROSE[n:]}" for n in range(9))])[0].tolist()
    arrays = peers.knn_transformers_rows(lm, [tokens], 64, 32)
    peers.write_knn_transformers(folder / "files", *arrays)
    return folder


def run(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_import_and_export(work: Path) -> None:
    files = ["--from", "knn-transformers", "--model", work / "tiny"]
    facts = json.loads(run("import", work / "a.store", work / "files", *files, *SIZES, "--json"))
    assert facts["origin"]["verified"]
    shown = " ".join(run("info", work / "a.store").split())
    assert "from knn-transformers; verified: of" in shown
    out = work / "arrays"
    line = run("export", work / "a.store", out, "--to", "knn-transformers", "--model-type", "llama")
    assert f"{facts['entries']:,} entries of 1 documents, in the order stored" in line
    for path in (work / "files").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    exported = json.loads(run("export", work / "a.store", work / "npy", "--json"))
    assert exported["files"] == ["keys.npy", "vals.npy"]
    again = json.loads(run("import", work / "b.store", work / "npy", "--from", "npy", "--json"))
    assert again["origin"]["verified"], "with the model that the export names"
    assert again["settings"] == facts["settings"]


def test_every_report_says_that_a_datastore_is_unverified(work: Path) -> None:
    store, model = work / "c.store", ["--model", work / "tiny"]
    files = [work / "files", "--from", "knn-transformers", "--key", "ffn_input", *SIZES]
    shown = run("import", store, *files, *model, "--unverified")
    assert "unverified" in shown
    assert "unverified" in run("info", store)
    (work / "held-out.txt").write_text(PROSE)
    report = json.loads(run("eval", store, work / "held-out.txt", *model, "--json"))
    assert report["unverified"] == [str(store)]
    explained = json.loads(run("explain", store, PROSE[:30], *model, "--json"))
    assert explained["unverified"] == [str(store)]
    run("import", store, *model)
    assert "verified: of" in " ".join(run("info", store).split())
    assert json.loads(run("explain", store, PROSE[:30], *model, "--json"))["unverified"] == []


def test_refusals_are_one_line_and_change_nothing(work: Path) -> None:
    before = sorted(work.iterdir())
    files = [work / "files", "--from", "knn-transformers", "--model", work / "tiny"]
    for arguments, message in [
        ([*files, "--key", "output_after_norm", *SIZES], "keys must be those of"),
        ([*files, "--window", "300"], "window must be at most 256"),
        ([work / "nowhere", "--from", "npy", "--model", work / "tiny"], "no such"),
        ([work / "files", *SIZES], "source must be one of"),
        ([], "files must name what to import"),
    ]:
        output = run("import", work / "d.store", *arguments, code=1)
        assert message in output
    assert sorted(work.iterdir()) == before
