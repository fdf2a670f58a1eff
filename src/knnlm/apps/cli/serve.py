"""The command `serve`: a kNN-LM behind OpenAI's completions protocol."""

from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, check_server_packages, open_model
from knnlm.apps.cli.reports import weights_line
from knnlm.choices import Coverage, ModelDtype

if TYPE_CHECKING:
    from knnlm.apps.engine.engine import ModelFacts

_Host = Annotated[
    str,
    typer.Option(
        help="The address to listen on; one that other machines can reach needs an API key."
    ),
]
_ApiKey = Annotated[
    str | None,
    typer.Option(
        help="The key that clients must send; better set in the environment.",
        envvar="KNNLM_API_KEY",
    ),
]
_CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        help="The origin of web pages that may use the server from a browser, like "
        "https://example.org; '*' for all, by default none. May be repeated."
    ),
]
_Name = Annotated[
    str | None,
    typer.Option(help="The model name that clients use; by default the datastore folder's name."),
]
_MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens in a completion.")]
_MaxBatch = Annotated[int, typer.Option(help="Completions generated at the same time.")]
_MaxQueue = Annotated[int, typer.Option(help="Completions that may wait for their turn.")]
_MaxBody = Annotated[int, typer.Option(help="Maximum size of a request in bytes.")]
_Grace = Annotated[
    float,
    typer.Option(help="Seconds that running completions have to finish when the server stops."),
]


def serve(
    store: options.Store,
    *,
    also: options.Also = None,
    host: _Host = "127.0.0.1",
    port: options.Port = 8000,
    api_key: _ApiKey = None,
    cors_origin: _CorsOrigin = None,
    name: _Name = None,
    max_tokens: _MaxTokens = 1024,
    max_batch: _MaxBatch = 16,
    max_queue: _MaxQueue = 256,
    max_body: _MaxBody = 1 << 20,
    grace: _Grace = 30.0,
    model: options.Model = None,
    k: options.K = None,
    lmbda: options.Lmbda = None,
    temperature: options.Temperature = None,
    weights: options.Weights = None,
    no_drafts: options.NoDrafts = False,
    coverage: options.Coverage = Coverage.whole,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
) -> None:
    """Serve the kNN-LM to OpenAI clients: completions, log-probabilities, sources.

    Each request may set its own k, λ and temperature. On SIGTERM or Ctrl-C the server finishes
    the running completions and exits with status 0. See docs/serving.md.

        knnlm serve docs.store
    """
    check_server_packages("serving")
    from knnlm.apps.engine.limits import Limits
    from knnlm.apps.server.service import Service, check_exposure, listen

    limits = Limits(
        max_tokens=max_tokens,
        max_batch=max_batch,
        max_queue=max_queue,
        max_body_bytes=max_body,
        grace_seconds=grace,
    )
    check_exposure(host, api_key)
    served = name or store.resolve().name
    mixture = MixtureOptions(k, lmbda, temperature, weights, coverage=coverage)
    service = Service(
        lambda: open_model(store, also, ModelOptions(model, dtype, device), mixture),
        name=served,
        limits=limits,
        api_key=api_key,
        cors_origins=cors_origin or (),
        drafts=not no_drafts,
        on_start=lambda: OUT.print(f"{url} serves {served} ({_described(facts)})", soft_wrap=True),
    )
    address = f"[{host}]" if ":" in host else host
    with listen(host, port) as listener:
        url = f"http://{address}:{listener.getsockname()[1]}/v1"
        facts = service.open()
        service.run(sockets=[listener])


def _described(facts: "ModelFacts") -> str:
    """Return the entries and the mixture of every datastore."""
    return "; ".join(
        f"{entries:,} entries, {weights_line(facts.weights, [parameters])}"
        for entries, parameters in zip(facts.entries, facts.parameters, strict=True)
    )
