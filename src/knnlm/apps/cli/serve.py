"""The command `serve`: a kNN-LM behind OpenAI's completions protocol."""

import importlib.util
from typing import Annotated

import typer

from knnlm.apps.cli import console
from knnlm.apps.cli.options import (
    Also,
    Device,
    Dtype,
    K,
    Lmbda,
    Model,
    Store,
    Temperature,
    WeightsOption,
)
from knnlm.apps.cli.text_commands import open_model
from knnlm.choices import ModelDtype
from knnlm.errors import missing_dependency


def check_installed(purpose: str, extra: str) -> None:
    """Refuse, in one line, where a package that the server needs is missing."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise missing_dependency(package, purpose, extra)


def serve(
    store: Store,
    also: Also = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine's need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The key that clients must send; better kept in the environment.",
            envvar="KNNLM_API_KEY",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="What clients call the model; by default the folder's name.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens that a completion may have at most.")
    ] = 1024,
    max_batch: Annotated[int, typer.Option(help="Completions generated at once.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Completions that may wait.")] = 256,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.")] = 1 << 20,
    grace: Annotated[
        float, typer.Option(help="Seconds for what runs when the server is stopped.")
    ] = 30.0,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    weights: WeightsOption = None,
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
) -> None:
    """Serve the kNN-LM to OpenAI clients: completions, log-probabilities, sources.

    Requests may choose their own k, λ and temperature. SIGTERM or Ctrl-C finishes what runs and
    ends with exit status 0. See docs/serving.md.

        knnlm serve docs.store
    """
    check_installed("serving", "server")
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
    listener = listen(host, port)

    def announce() -> None:
        shown = f"[{host}]" if ":" in host else host
        parameters = "; ".join(
            f"{entries:,} entries, {console.weights_line(facts.weights, [of_one])}"
            for entries, of_one in zip(facts.entries, facts.parameters, strict=True)
        )
        console.OUT.print(
            f"http://{shown}:{listener.getsockname()[1]}/v1 serves {served} ({parameters})",
            soft_wrap=True,
        )

    served = name or store.resolve().name
    service = Service(
        lambda: open_model(
            store, also, model, dtype, device, k, lmbda, temperature, weights=weights
        ),
        name=served,
        limits=limits,
        api_key=api_key,
        on_start=announce,
    )
    with listener:
        facts = service.open()
        service.run(sockets=[listener])
