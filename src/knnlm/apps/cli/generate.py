"""The command `generate`: continue a prompt with the kNN-LM."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import ERR, print_continuation, print_json
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, open_model
from knnlm.choices import Coverage, ModelDtype
from knnlm.rules import check_sampling_temperature, check_top_p

_Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
_MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
_Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Read the prompt as a message, through the model's chat template, and answer it.",
    ),
]


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
    pointers: options.Pointers = None,
    skip: options.Skip = 0.0,
    chat: _Chat = False,
    max_new_tokens: _MaxNewTokens = 64,
    sample: options.Sample = False,
    sampling_temperature: options.SamplingTemperature = 1.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    no_drafts: options.NoDrafts = False,
    coverage: options.Coverage = Coverage.whole,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with the kNN-LM.

    Decoding is greedy unless --sample is given. With --chat the prompt is a question, which a model
    with a chat template answers; `knnlm chat` goes on from there.

        knnlm generate docs.store "The nearest neighbors"
    """
    check_sampling_temperature(sampling_temperature)
    check_top_p(top_p)
    mixture = MixtureOptions(k, lmbda, temperature, weights, cache, coverage, pointers, skip)
    opened = open_model(store, also, ModelOptions(model, dtype, device), mixture)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": sampling_temperature, "top_p": top_p, "top_k": 0}
        if sample
        else {}
    )
    if chat:
        generation = opened.chat(
            [{"role": "user", "content": prompt}],
            max_new_tokens=max_new_tokens,
            seed=seed,
            drafts=not no_drafts,
            **sampling,
        )
    else:
        generation = opened.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            seed=seed,
            drafts=not no_drafts,
            **sampling,
        )
    if as_json:
        print_json(asdict(generation))
    else:
        print_continuation("" if chat else prompt, generation.text)
    if generation.coverage < 1.0:
        ERR.print(
            f"warning: a part of the cluster was late: at least one search looked at only "
            f"{generation.coverage:.1%} of the entries",
            soft_wrap=True,
        )
