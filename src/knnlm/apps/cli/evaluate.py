"""The command `eval`: the perplexity of the language model and of the kNN-LM."""

from knnlm.apps.cli import options
from knnlm.apps.cli.console import print_json
from knnlm.apps.cli.opening import MixtureOptions, ModelOptions, choose_windowing, open_model
from knnlm.apps.cli.reports import print_perplexity
from knnlm.choices import ModelDtype


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
    max_tokens: options.MaxTokens = None,
    window: options.Window = None,
    context: options.Context = None,
    boundary: options.Boundary = None,
    text_column: options.TextColumn = "text",
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of the language model and of the kNN-LM on held-out text.

    Both score every token once. Use text that is neither in the datastore nor was used for tuning.

        knnlm eval docs.store held-out/test
    """
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    documents = knnlm.read_documents(*text, text_column=text_column)
    mixture = MixtureOptions(k, lmbda, temperature, weights, cache)
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
