"""The memory's tools, called by the protocol's own client in this process, on pipes and by HTTP."""

import asyncio
import json
import shlex
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from serving import wait_for
from stores import distinct_documents
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.apps.mcp.memory import Memory
from knnlm.datastore.datastore import Datastore
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel

pytest.importorskip("mcp", reason="the SDK is not installed: pip install '.[mcp]'")
from mcp import Client, StdioServerParameters, types

from knnlm.apps.mcp.server import create_server

Use = Callable[[Client], Awaitable[Any]]
TEXT = "What followed there is a guess"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a datastore that was built with it."""
    folder = tmp_path_factory.mktemp("mcp")
    LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny").save(folder / "model")
    lm = LanguageModel.load(folder / "model", dtype="float32")
    build(folder / "docs.store", lm, distinct_documents(5), window=64, context=16)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> KNNLM:
    lm = LanguageModel.load(folder / "model", dtype="float32")
    return KNNLM(lm, Datastore(folder / "docs.store"), k=12, lmbda=0.4, temperature=10.0)


def ask(server: Any, use: Use) -> Any:
    async def asking() -> Any:
        async with Client(server) as client:
            return await use(client)

    return asyncio.run(asking())


def call(model: KNNLM, tool: str, **arguments: Any) -> types.CallToolResult:
    server = create_server(Memory(model), "docs.store")
    answer = ask(server, lambda client: client.call_tool(tool, arguments))
    assert isinstance(answer, types.CallToolResult)
    return answer


def text_of(answer: types.CallToolResult) -> str:
    (content,) = answer.content
    assert isinstance(content, types.TextContent)
    return content.text


def result_of(answer: types.CallToolResult) -> Any:
    assert not answer.is_error, text_of(answer)
    return answer.structured_content


def test_the_tools_describe_themselves(model: KNNLM) -> None:
    server = create_server(Memory(model), "docs.store")
    listed = ask(server, lambda client: client.list_tools())
    tools = {tool.name: tool for tool in listed.tools}
    assert set(tools) == {"search", "explain", "documents"}
    for tool in tools.values():
        assert tool.description
        assert tool.output_schema is not None
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint
        assert all(one["description"] for one in tool.input_schema["properties"].values())
    bounds = tools["search"].input_schema["properties"]["passages"]
    assert (bounds["minimum"], bounds["maximum"], bounds["default"]) == (1, 50, 5)
    assert tools["search"].input_schema["required"] == ["text"]


def test_search_finds_a_stored_sentence_in_its_document(model: KNNLM) -> None:
    sentence = "3 and 9: "  # only d3 begins so
    answer = call(model, "search", text=sentence, passages=2, tokens=32)
    first, second = result_of(answer)["passages"]
    assert first["document"] == "d3"
    assert first["text"].startswith(sentence)
    assert first["score"] > second["score"]
    assert first["stop"] - first["start"] == 32
    assert text_of(answer).startswith(f"[1] d3, tokens {first['start']} to {first['stop'] - 1} ")
    assert first["text"] in text_of(answer)


def test_search_and_python_find_the_same(model: KNNLM) -> None:
    found = model.search(TEXT, passages=3)
    passages = result_of(call(model, "search", text=TEXT, passages=3))["passages"]
    assert passages == [passage.to_dict() for passage in found]


def test_explain_says_what_the_library_says(model: KNNLM) -> None:
    answer = call(model, "explain", text=TEXT, sources=2, shown=1)
    result = result_of(answer)
    explained = model.explain(TEXT, sources=2)
    assert [one["text"] for one in result["tokens"]] == [one.name for one in explained]
    assert [one["gain"] for one in result["tokens"]] == pytest.approx([e.gain for e in explained])
    assert [len(one["sources"]) for one in result["tokens"]] == [2] * len(explained)
    assert sum(one["share"] for one in result["documents"]) < 1.0
    assert text_of(answer).count("\ntoken ") == 1
    assert f"perplexity {result['perplexity_lm']:.2f} by the language model" in text_of(answer)


def test_documents_are_listed_in_pages(model: KNNLM) -> None:
    answer = call(model, "documents", limit=2, offset=3)
    result = result_of(answer)
    assert result["total"] == 5
    assert [one["document"] for one in result["documents"]] == ["d3", "d4"]
    assert text_of(answer).startswith("documents 4 to 5 of 5")
    assert result_of(call(model, "documents", pattern="d[12]"))["total"] == 2
    assert text_of(call(model, "documents", pattern="x*")) == "none of 0 documents from number 0 on"


@pytest.mark.parametrize(
    ("tool", "arguments", "reason"),
    [
        ("search", {"text": ""}, "must have 1 to 63 tokens, got 0"),
        ("search", {"text": PROSE}, "must have 1 to 63 tokens, got"),
        ("search", {"text": TEXT, "passages": 0}, "passages must be at least 1, got 0"),
        ("search", {"text": TEXT, "tokens": 9999}, "tokens must be at most 1024, got 9999"),
        ("search", {"text": "\ud800"}, "text must be text in UTF-8"),
        ("explain", {"text": ""}, "text must have 1 to 1024 tokens, got 0"),
        ("explain", {"text": TEXT, "sources": 11}, "sources must be at most 10, got 11"),
        ("documents", {"offset": -1}, "offset must be at least 0, got -1"),
        ("search", {}, "Field required"),
        ("forget", {}, "Unknown tool: forget"),
    ],
)
def test_refusals_say_why(model: KNNLM, tool: str, arguments: Any, reason: str) -> None:
    answer = call(model, tool, **arguments)
    assert answer.is_error
    assert reason in text_of(answer)


def test_what_is_stored_later_is_found(folder: Path, tmp_path: Path) -> None:
    lm = LanguageModel.load(folder / "model", dtype="float32")
    build(tmp_path / "store", lm, distinct_documents(2), window=64)
    model = KNNLM(lm, tmp_path / "store", lmbda=0.4)
    memory = Memory(model)
    assert memory.documents("*", 10, 0).total == 2
    build(tmp_path / "store", lm, distinct_documents(3))
    assert memory.documents("*", 10, 0).total == 3
    Datastore(tmp_path / "store").forget(["d0"])
    found = memory.search("0 and 0", 50, 16)
    assert "d0" not in {passage.document for passage in found.passages}


def test_standard_streams_carry_the_protocol_alone(folder: Path) -> None:
    command = shlex.join([sys.executable, "-m", "knnlm", "mcp", str(folder / "docs.store")])
    seen, errors = folder / "stdout", folder / "stderr"
    server = StdioServerParameters(
        command="sh",
        args=["-c", f"{command} --model {folder}/model 2> {errors} | tee {seen}"],
        env={"PYTHONPATH": ":".join(sys.path)},
    )

    async def use(client: Client) -> types.CallToolResult:
        assert (await client.call_tool("search", {"text": ""})).is_error
        return await client.call_tool("documents", {})

    assert result_of(ask(server, use))["total"] == 5
    lines = seen.read_text().splitlines()
    assert len(lines) >= 3
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in lines)
    assert "docs.store serves an MCP client" in errors.read_text()


@pytest.fixture
def url(model: KNNLM) -> Iterator[str]:
    """A server over HTTP, in a thread until the end of the test."""
    import uvicorn

    from knnlm.apps.mcp.server import http_server

    listener = socket.create_server(("127.0.0.1", 0))
    server: uvicorn.Server = http_server(create_server(Memory(model), "docs.store"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
    server.should_exit = True
    thread.join(30)
    listener.close()
    assert not thread.is_alive()


def test_http_answers_several_clients(url: str, model: KNNLM) -> None:
    async def use(client: Client) -> types.CallToolResult:
        answers = [client.call_tool("search", {"text": TEXT, "passages": 1}) for _ in range(3)]
        first, *others = await asyncio.gather(*answers)
        assert all(other.structured_content == first.structured_content for other in others)
        return first

    async def two() -> list[types.CallToolResult]:
        async with Client(url) as one, Client(url) as other:
            return list(await asyncio.gather(use(one), use(other)))

    (expected,) = model.search(TEXT, passages=1)
    for answer in asyncio.run(two()):
        assert result_of(answer)["passages"] == [expected.to_dict()]


def test_http_is_for_this_machine_alone(url: str) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    for headers, status in [
        ({"Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 403),
    ]:
        answer = httpx2.post(url, json=message, headers={"Accept": "application/json", **headers})
        assert answer.status_code == status


def test_the_command_refuses_before_it_serves(folder: Path) -> None:
    runner = CliRunner()
    answer = runner.invoke(app, ["mcp", str(folder / "none.store")])
    assert answer.exit_code == 1
    assert answer.stdout == ""
    assert "none.store" in answer.stderr
    listener = socket.create_server(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
    with listener:
        answer = runner.invoke(app, ["mcp", str(folder / "docs.store"), "--http", "--port", port])
    assert answer.exit_code == 1
    assert "cannot listen on host 127.0.0.1" in answer.stderr


def test_the_command_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    answer = CliRunner().invoke(app, ["mcp", str(folder / "docs.store")])
    assert answer.exit_code == 1
    assert "pip install 'knnlm[mcp]'" in answer.stderr
