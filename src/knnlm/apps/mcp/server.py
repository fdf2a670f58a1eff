"""The tools as a server of the Model Context Protocol, on standard streams or HTTP.

Knows the protocol's official SDK, nothing of how a memory is searched.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeAlias

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import Field

from knnlm import __version__
from knnlm.apps.mcp import memory as limits
from knnlm.apps.mcp.memory import Memory
from knnlm.apps.mcp.results import (
    DocumentsResult,
    ExplainResult,
    SearchResult,
    as_structured,
)
from knnlm.errors import KNNLMError

PATH = "/mcp"
_LAST_RESPONSES_SECONDS = 5
_INSTRUCTIONS = """\
The memory of a language model: documents, stored token by token with the state in which the model \
read them. search finds passages by a text, explain shows which passages account for each token of \
a text, documents lists what is stored. A search compares states of the model, not meanings: a \
sentence as it could stand in the documents finds more than keywords or a question."""
_READS = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)


def _described(description: str, least: int | None = None, most: int | None = None) -> Any:
    """Return the schema of a parameter; the rule itself is checked where the work is done."""
    bounds = {"minimum": least, "maximum": most}
    extra: Any = {name: bound for name, bound in bounds.items() if bound is not None}
    return Field(description=description, json_schema_extra=extra)


_Text: TypeAlias = Annotated[str, _described("The text, as it could stand in the documents.")]
_Passages: TypeAlias = Annotated[
    int, _described("How many passages to return.", 1, limits.MOST_PASSAGES)
]
_Tokens: TypeAlias = Annotated[
    int, _described("How long a passage is, in tokens.", 1, limits.MOST_PASSAGE_TOKENS)
]
_Explained: TypeAlias = Annotated[
    str, _described(f"The text to explain, of at most {limits.MOST_TOKENS} tokens.")
]
_Sources: TypeAlias = Annotated[
    int, _described("How many passages to name for each token.", 0, limits.MOST_SOURCES)
]
_Shown: TypeAlias = Annotated[
    int,
    _described("For how many tokens the readable answer shows them, the most changed ones.", 0),
]
_Pattern: TypeAlias = Annotated[str, _described("Of names, with * ? [ ]; * for all.")]
_Limit: TypeAlias = Annotated[
    int, _described("How many documents to return.", 1, limits.MOST_DOCUMENTS)
]
_Offset: TypeAlias = Annotated[int, _described("How many to leave out at the beginning.", 0)]


def create_server(memory: Memory, name: str) -> MCPServer:
    """Return the server of a memory; name: what clients call it."""
    server = MCPServer(name, instructions=_INSTRUCTIONS, version=__version__, log_level="WARNING")

    def search(
        text: _Text, passages: _Passages = 5, tokens: _Tokens = 128
    ) -> Annotated[CallToolResult, SearchResult]:
        """Find the stored passages nearest to a text, with their documents, the nearest first."""
        with _refusing():
            found = memory.search(text, passages, tokens)
        return _answer(found, found.readable())

    def explain(
        text: _Explained, sources: _Sources = 3, shown: _Shown = 5
    ) -> Annotated[CallToolResult, ExplainResult]:
        """Show which passages and documents account for the probability of a text's tokens."""
        with _refusing():
            explained = memory.explain(text, sources)
        return _answer(explained, explained.readable(max(shown, 0)))

    def documents(
        pattern: _Pattern = "*", limit: _Limit = 100, offset: _Offset = 0
    ) -> Annotated[CallToolResult, DocumentsResult]:
        """List the stored documents and how many tokens each of them has."""
        with _refusing():
            listed = memory.documents(pattern, limit, offset)
        return _answer(listed, listed.readable())

    tools: dict[str, Callable[..., CallToolResult]] = {
        "Search the memory": search,
        "Explain a text": explain,
        "List the documents": documents,
    }
    for title, tool in tools.items():
        server.add_tool(tool, title=title, annotations=_READS, structured_output=True)
    return server


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Make a refusal of ours the answer that the client's model reads."""
    try:
        yield
    except KNNLMError as error:
        raise ToolError(str(error)) from error


def _answer(result: Any, readable: str) -> CallToolResult:
    content = [TextContent(type="text", text=readable)]
    return CallToolResult(content=list(content), structured_content=as_structured(result))


def run_on_streams(server: MCPServer) -> None:
    """Serve a client on the standard streams until it closes them.

    Ctrl-C ends the process at once: a thread of the SDK's waits for the standard input, and Python
    would wait for the thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server.run("stdio")


def http_server(server: MCPServer) -> uvicorn.Server:
    """Return the server for HTTP, at PATH; `run` serves sockets on this machine until Ctrl-C.

    Only requests to this machine's own names are answered, and those of web pages from elsewhere
    are not.
    """
    config = uvicorn.Config(
        server.streamable_http_app(streamable_http_path=PATH),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_RESPONSES_SECONDS,
    )
    return uvicorn.Server(config)
