"""The command `explore`: a page in the browser that shows why."""

import webbrowser
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
from knnlm.apps.cli.serve import check_installed
from knnlm.apps.cli.text_commands import open_model
from knnlm.choices import ModelDtype


def explore(
    store: Store,
    also: Also = None,
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535)] = 8000,
    browser: Annotated[
        bool, typer.Option("--browser", help="Open the page in the browser too.")
    ] = False,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    weights: WeightsOption = None,
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
) -> None:
    """Open a page on this machine: paste a text, see which passages spoke for each token.

    Sliders change k, λ and temperature at once, without another search. `knnlm serve` has the same
    page, for others too. Ctrl-C ends it.

        knnlm explore docs.store
    """
    check_installed("the explorer", "explorer")
    from knnlm.apps.server.service import Service, listen

    listener = listen("127.0.0.1", port)

    def announce() -> None:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/explorer"
        console.OUT.print(f"{url} explores {store}; Ctrl-C ends it", soft_wrap=True)
        if browser:
            webbrowser.open(url)

    service = Service(
        lambda: open_model(
            store, also, model, dtype, device, k, lmbda, temperature, weights=weights
        ),
        name=store.resolve().name,
        on_start=announce,
    )
    with listener:
        service.open()
        service.run(sockets=[listener])
