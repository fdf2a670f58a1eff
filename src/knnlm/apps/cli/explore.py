"""The command `explore`: the explorer, a page in the browser, on this machine."""

import webbrowser
from typing import Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, check_server_packages, open_model
from knnlm.choices import ModelDtype

_Browser = Annotated[bool, typer.Option("--browser", help="Also open the page in the browser.")]


def explore(
    store: options.Store,
    *,
    also: options.Also = None,
    port: options.Port = 8000,
    browser: _Browser = False,
    model: options.Model = None,
    k: options.K = None,
    lmbda: options.Lmbda = None,
    temperature: options.Temperature = None,
    weights: options.Weights = None,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
) -> None:
    """Serve a page on this machine that shows which passages changed each token of a text.

    Sliders change k, λ and temperature instantly, without searching again. `knnlm serve` offers
    the same page to other machines. Stop it with Ctrl-C.

        knnlm explore docs.store
    """
    check_server_packages("the explorer")
    from knnlm.apps.server.service import Service, listen

    listener = listen("127.0.0.1", port)

    def announce() -> None:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/explorer"
        OUT.print(f"{url} explores {store}; stop it with Ctrl-C", soft_wrap=True)
        if browser:
            webbrowser.open(url)

    mixture = MixtureOptions(k, lmbda, temperature, weights)
    service = Service(
        lambda: open_model(store, also, ModelOptions(model, dtype, device), mixture),
        name=store.resolve().name,
        on_start=announce,
    )
    with listener:
        service.open()
        service.run(sockets=[listener])
