"""The pages about other libraries: every snippet runs as it is printed, but for a server's port."""

import ast
import fnmatch
import html.parser
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from serving import TEMPLATE, serving, wait_for
from stores import distinct_documents

from knnlm import display
from knnlm.datastore.datastore import Datastore
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel

ROOT = Path(__file__).parents[1]
NAME = "HuggingFaceTB/SmolLM2-135M"


def snippets(page: str, language: str = "python") -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert found
    assert page in (ROOT / "README.md").read_text()
    return found


def run(page: str, replacing: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a page's Python in one session; `shown` has the values of snippets' last lines."""
    names: dict[str, Any] = {"__name__": "snippet", "shown": []}
    for number, source in enumerate(snippets(page)):
        for old, new in (replacing or {}).items():
            source = source.replace(old, new)
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{page}, snippet {number}", "exec"), names)
        if last is not None:
            assert isinstance(last, ast.Expr)
            value = eval(compile(ast.Expression(last.value), page, "eval"), names)
            names["shown"].append(value)
    return names


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: a tiny model under the real one's name."""
    work = tmp_path_factory.mktemp("pages")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    LanguageModel(tiny_llama(), tokenizer, name=NAME).save(work / NAME)
    lm = LanguageModel.load(work / NAME, dtype="float32")
    lm.name = NAME
    store = build(work / "docs.store", lm, distinct_documents(3), window=64)
    store.save_parameters(Parameters(16, 0.4, 20.0), {})
    for name in ("docs", "held-out"):
        (work / name).mkdir()
        (work / name / "page.txt").write_text(PROSE[:200])
    return work


@pytest.fixture
def work(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return prepared


@pytest.fixture
def served(work: Path) -> Iterator[dict[str, str]]:
    """A server of the datastore; how its address differs from that on the pages."""

    def opened() -> KNNLM:
        return KNNLM(LanguageModel.load(NAME, dtype="float32"), Datastore("docs.store"))

    with serving(opened, name="docs.store") as server:
        yield {"http://127.0.0.1:8000": server.url}


def test_mcp(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mcp", reason="mcp is not installed: pip install '.[mcp]'")
    from knnlm.apps.mcp.memory import Memory
    from knnlm.apps.mcp.server import create_server, http_server

    (configuration,) = snippets("docs/mcp.md", "json")
    (server,) = json.loads(configuration)["mcpServers"].values()
    assert server["args"][0] == "mcp"
    memory = Memory(KNNLM(NAME, "docs.store"))
    listener = socket.create_server(("127.0.0.1", 0))
    running = http_server(create_server(memory, "docs.store"))
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    wait_for(lambda: running.started)
    run("docs/mcp.md", {"127.0.0.1:8000": f"127.0.0.1:{listener.getsockname()[1]}"})
    running.should_exit = True
    thread.join(30)
    listener.close()
    out = capsys.readouterr().out
    assert out.startswith("[1] d")
    assert len(re.findall(r"^d\d [\d.]+$", out, re.M)) == 2
    assert len(re.findall(r"^d\d \d+ .", out, re.M)) == 2


# the library warns of what it deprecates itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_langchain(served: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    names = run("docs/langchain.md", served)
    chat, question = names["chat"], "How do I create a task?"
    expected = KNNLM(NAME, "docs.store", k=16, temperature=20.0, lmbda=0.4).chat(
        [{"role": "user", "content": question}], max_new_tokens=40
    )
    assert chat.invoke(question).content == expected.text
    out = capsys.readouterr().out
    assert out.count(expected.text) == 2, "whole and as a stream"
    documents = names["retriever"].invoke(PROSE[:40])
    assert len(documents) == 4
    assert {document.metadata["source"] for document in documents} <= {"d0", "d1", "d2"}
    scores = [document.metadata["score"] for document in documents]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_llama_index(served: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    names = run("docs/llama-index.md", served)
    found = names["retriever"].retrieve(PROSE[:40])
    expected = KNNLM(NAME, "docs.store").search(PROSE[:40], passages=4)
    assert [(node.text, node.score) for node in found] == [(e.text, e.score) for e in expected]
    expected_text = KNNLM(NAME, "docs.store").generate("To open a datastore", max_new_tokens=40)
    assert names["ServedMemory"]().complete("To open a datastore").text == expected_text.text
    assert expected_text.text in capsys.readouterr().out


class Commit(NamedTuple):
    oid: str


class Hub:
    """Repositories in folders, with what the real one adds to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: dict[str, bool] = {}

    def create_repo(self, name: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        self.private[name] = private

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str,
        folder_path: str,
        path_in_repo: str,
        ignore_patterns: Sequence[str],
    ) -> Commit:
        commit = self.folder / ("a" * 40)
        for file in Path(folder_path).rglob("*"):
            name = file.relative_to(folder_path).as_posix()
            if file.is_file() and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                (commit / path_in_repo / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, commit / path_in_repo / name)
        (commit / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        return Commit(commit.name)

    def download(
        self, repo_id: str, *, repo_type: str, revision: str, allow_patterns: str, local_dir: str
    ) -> str:
        shutil.copytree(self.folder / revision, local_dir, dirs_exist_ok=True)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True)
        return local_dir


def test_hub(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", staticmethod(hub.create_repo))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", staticmethod(hub.upload_folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    (work / "docs.store" / "writer.lock").touch()
    names = run("docs/hub.md")
    assert hub.private == {"you/docs-memory": True}
    assert names["shared"].path == Path("downloaded/docs.store")
    assert sorted(file.name for file in Path("downloaded/docs.store").iterdir()) == [
        "catalog.sqlite",
        "shards",
    ]
    out = capsys.readouterr().out
    assert "nearest" in out, "the text is there for everyone to read"
    assert names["commit"].oid in out
    shard = next(Path("docs.store/shards").iterdir())
    damaged = tmp_path / names["commit"].oid / "docs.store" / "shards" / shard.name
    damaged.write_bytes(shard.read_bytes()[:-1] + b"x")
    shutil.rmtree("downloaded")
    with pytest.raises(AssertionError, match=shard.name):
        exec(snippets("docs/hub.md")[2], names)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_trainer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[gguf]'")
    names = run("docs/trainer.md")
    reports = names["callback"].reports
    assert len(reports) == 2
    assert reports[1].lm.perplexity < reports[0].lm.perplexity, "the model has learned"
    assert all(report.knn.perplexity < report.lm.perplexity for report in reports)
    assert names["mixed"] < names["alone"]
    assert capsys.readouterr().out.count("with the memory") == 2


class Checked(html.parser.HTMLParser):
    """Checks that every tag that is opened is closed, and collects the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_jupyter(work: Path) -> None:
    explanations, one, report, sweep = run("docs/jupyter.md")["shown"]
    shown = Checked(explanations._repr_html_())
    assert shown.text.startswith("To open a datastore, call")
    assert "the language model" in shown.text
    assert f"token {one.sources[0].position}" in Checked(one._repr_html_()).text
    assert f"{report.knn.perplexity:.4f}" in Checked(report._repr_html_()).text
    shown = Checked(sweep._repr_html_())
    assert shown.tags >= {"svg", "polyline"}
    assert f"k {sweep.parameters.k}, λ {sweep.parameters.lmbda:g}" in shown.text


def test_notebooks_show_text_as_text() -> None:
    evil = "<script>alert('1')</script> & \"quoted\" "
    for source in [
        display.table([evil], [[evil]], caption=evil),
        display.colored([(evil, 1.0, evil)]),
        display.passage(evil, evil, evil, evil),
        display.paragraph(evil),
        display.plot([(1.0, 2.0), (2.0, 3.0)], 2.5, label=evil, log=True),
    ]:
        shown = Checked(source)
        assert "script" not in shown.tags
        assert evil in shown.text
