"""The command `generate`: continue a prompt with the kNN-LM."""

from typing import Annotated, Any

import typer

from knnlm.apps.cli.console import print_json
from knnlm.apps.cli.opening import open_model
from knnlm.apps.cli.options import (
    Also,
    Cache,
    Device,
    Dtype,
    Json,
    K,
    Lmbda,
    MixtureOptions,
    Model,
    ModelOptions,
    Store,
    Temperature,
    WeightsOption,
)
from knnlm.choices import ModelDtype

_Prompt = Annotated[str, typer.Argument(help="The text to continue.", show_default=False)]
_MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
_Sample = Annotated[
    bool, typer.Option("--sample", help="Sample instead of taking the most likely token.")
]
_SamplingTemperature = Annotated[
    float, typer.Option(help="With --sample: the softmax temperature.", min=0.01)
]
_TopP = Annotated[float, typer.Option(help="With --sample: nucleus sampling.", min=0.01, max=1.0)]
_Seed = Annotated[int, typer.Option(help="With --sample: the random seed.")]


def generate(
    store: Store,
    prompt: _Prompt,
    *,
    also: Also = None,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    cache: Cache = False,
    weights: WeightsOption = None,
    max_new_tokens: _MaxNewTokens = 64,
    sample: _Sample = False,
    sampling_temperature: _SamplingTemperature = 1.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with the kNN-LM.

    Decoding is greedy unless --sample is given.

        knnlm generate docs.store "The nearest neighbors"
    """
    mixture = MixtureOptions(k, lmbda, temperature, weights, cache)
    opened = open_model(store, also, ModelOptions(model, dtype, device), mixture)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": sampling_temperature, "top_p": top_p, "top_k": 0}
        if sample
        else {}
    )
    generation = opened.generate(prompt, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    if as_json:
        print_json({"prompt": prompt, "text": generation.text, "tokens": generation.tokens})
    else:
        typer.secho(prompt, dim=True, nl=False)  # unlike rich, wraps no line and expands no tab
        typer.echo(generation.text)
