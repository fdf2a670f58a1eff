"""The command `eval`: the perplexity of the language model and of the kNN-LM."""

from knnlm.apps.cli.console import print_json
from knnlm.apps.cli.opening import choose_windowing, open_model
from knnlm.apps.cli.options import (
    Also,
    BoundaryOption,
    Cache,
    Context,
    Device,
    Dtype,
    Json,
    K,
    Lmbda,
    MaxTokens,
    MixtureOptions,
    Model,
    ModelOptions,
    Store,
    Temperature,
    TextColumn,
    Texts,
    WeightsOption,
    Window,
)
from knnlm.apps.cli.reports import print_perplexity
from knnlm.choices import ModelDtype


def evaluate(
    store: Store,
    text: Texts,
    *,
    also: Also = None,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    cache: Cache = False,
    weights: WeightsOption = None,
    max_tokens: MaxTokens = None,
    window: Window = None,
    context: Context = None,
    boundary: BoundaryOption = None,
    text_column: TextColumn = "text",
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
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
