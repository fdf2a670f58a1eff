"""The command `generate`: continue a prompt with the kNN-LM."""

from typing import Annotated, Any

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import ERR, print_continuation, print_json
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, open_model
from knnlm.choices import Coverage, ModelDtype
from knnlm.rules import check_sampling_temperature, check_top_p

_Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
_MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
_Sample = Annotated[
    bool, typer.Option("--sample", help="Sample instead of taking the most likely token.")
]
_SamplingTemperature = Annotated[
    float, typer.Option(help="With --sample: the softmax temperature; 0 does not sample.")
]
_TopP = Annotated[float, typer.Option(help="With --sample: nucleus sampling.", min=0.0, max=1.0)]
_Seed = Annotated[int, typer.Option(help="With --sample: the random seed.")]


def generate(
    store: options.Store,
    prompt: _Prompt,
    *,
    also: options.Also = None,
    model: options.Model = None,
    k: options.K = None,
    lmbda: options.Lmbda = None,
    temperature: options.Temperature = None,
    cache: options.Cache = False,
    weights: options.Weights = None,
    max_new_tokens: _MaxNewTokens = 64,
    sample: _Sample = False,
    sampling_temperature: _SamplingTemperature = 1.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    coverage: options.Coverage = Coverage.whole,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with the kNN-LM.

    Decoding is greedy unless --sample is given.

        knnlm generate docs.store "The nearest neighbors"
    """
    check_sampling_temperature(sampling_temperature)
    check_top_p(top_p)
    mixture = MixtureOptions(k, lmbda, temperature, weights, cache, coverage)
    opened = open_model(store, also, ModelOptions(model, dtype, device), mixture)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": sampling_temperature, "top_p": top_p, "top_k": 0}
        if sample
        else {}
    )
    generation = opened.generate(prompt, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": generation.text,
                "tokens": generation.tokens,
                "coverage": generation.coverage,
            }
        )
    else:
        print_continuation(prompt, generation.text)
    if generation.coverage < 1.0:
        ERR.print(
            f"warning: a part of the cluster was late: at least one search looked at only "
            f"{generation.coverage:.1%} of the entries",
            soft_wrap=True,
        )
