"""The command `eval`: the perplexity of the language model and of the kNN-LM."""

from knnlm.apps.cli import options
from knnlm.apps.cli.console import print_json
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, choose_windowing, open_model
from knnlm.apps.cli.reports import print_perplexity
from knnlm.apps.cli.texts import TextOptions, checked_texts
from knnlm.choices import ModelDtype, TextFormat


def evaluate(
    store: options.Store,
    text: options.Texts,
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
    max_tokens: options.MaxTokens = None,
    window: options.Window = None,
    context: options.Context = None,
    boundary: options.Boundary = None,
    text_column: options.TextColumn = "text",
    id_column: options.IdColumn = None,
    encoding: options.Encoding = "utf-8",
    text_format: options.Format = TextFormat.auto,
    skip_bad: options.SkipBad = False,
    gitignore: options.Gitignore = True,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of the language model and of the kNN-LM on held-out text.

    Both score every token once. Use text that is neither in the datastore nor was used for tuning.

        knnlm eval docs.store held-out/test
    """
    from knnlm.apps.cli.progress_bar import RichProgress

    reading = TextOptions(
        text_column, id_column, encoding, text_format, skip_bad, gitignore=gitignore
    )
    mixture = MixtureOptions(k, lmbda, temperature, weights, cache, pointers=pointers, skip=skip)
    with checked_texts(text, reading) as documents:
        opened = open_model(store, also, ModelOptions(model, dtype, device), mixture)
        report = opened.perplexity(
            documents,
            windowing=choose_windowing(opened, window, context, boundary),
            max_tokens=max_tokens,
            progress=RichProgress(),
        )
        if as_json:
            print_json(report.to_dict())
        else:
            print_perplexity(report)
