"""The command `mcp`: a datastore as tools of the Model Context Protocol."""

import contextlib
from typing import Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import ERR, OUT
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, open_model
from knnlm.choices import ModelDtype
from knnlm.errors import import_optional

_HOST = "127.0.0.1"

_Http = Annotated[
    bool,
    typer.Option(
        "--http", help="Serve streamable HTTP on this machine, instead of the standard streams."
    ),
]
_Name = Annotated[
    str | None,
    typer.Option(help="The server's name for clients; by default the datastore folder's name."),
]


def mcp(
    store: options.Store,
    *,
    also: options.Also = None,
    http: _Http = False,
    port: options.Port = 8000,
    name: _Name = None,
    model: options.Model = None,
    k: options.K = None,
    lmbda: options.Lmbda = None,
    temperature: options.Temperature = None,
    weights: options.Weights = None,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
) -> None:
    """Offer a datastore to the tools of assistants: search, explain and documents over MCP.

    A client starts this command and speaks to it on its standard input and output, on which there
    is nothing but the protocol. With --http it serves any client on this machine until Ctrl-C. See
    docs/mcp.md.

        knnlm mcp docs.store
    """
    import_optional("mcp", "the MCP server", "mcp")
    from knnlm.apps.mcp.memory import Memory
    from knnlm.apps.mcp.server import PATH, create_server, http_server, run_on_streams
    from knnlm.apps.server.listening import listen

    served = name or store.resolve().name

    def open_memory() -> Memory:
        mixture = MixtureOptions(k, lmbda, temperature, weights)
        return Memory(open_model(store, also, ModelOptions(model, dtype, device), mixture))

    if not http:
        server = create_server(open_memory(), served)
        ERR.print(f"{served} serves an MCP client on the standard streams", soft_wrap=True)
        run_on_streams(server)
        return
    with listen(_HOST, port) as listener:
        server = create_server(open_memory(), served)
        url = f"http://{_HOST}:{listener.getsockname()[1]}{PATH}"
        OUT.print(f"{url} serves {served}; stop it with Ctrl-C", soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):  # raised again once all has ended
            http_server(server).run(sockets=[listener])
