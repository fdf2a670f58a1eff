"""Tuning: read and search a text once, then fit every way to mix to it in seconds.

The text is the datastore's own, each document without its own votes, or held-out text, or both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knnlm import display
from knnlm.choices import Weights
from knnlm.datastore.overlap import Overlap
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.mixture.parameters import Parameters, parameters_to_dict
from knnlm.mixture.stored import TunedMixture
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.retriever import Stores, as_stores
from knnlm.rules import LARGEST, check_k, check_seed, check_whole
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing
from knnlm.tuning.fitting import Fit, fit_mixture
from knnlm.tuning.held_out import HeldOutText, read_held_out
from knnlm.tuning.stored_text import DEFAULT_TOKENS, StoredSample, read_stored
from knnlm.tuning.sweep import Sweep, sweep
from knnlm.tuning.weights import fit_lmbdas

MAX_K = 1024


@dataclass(frozen=True, slots=True)
class Tuning:
    """The settings that predict a text best.

    parameters: of each datastore, with fixed weights. sweeps: of each datastore alone; where there
    are several, k and T are those of its sweep, and the λ are fitted together. fits: what each way
    to mix gives. mixture: beyond the parameters, a continuous cache and weights for each token.
    overlap: how much of the held-out text is stored. stored: what the datastore's own text was, if
    it was tuned on.
    """

    parameters: tuple[Parameters, ...]
    tokens: int
    lm_perplexity: float
    knn_perplexity: float
    sweeps: tuple[Sweep, ...]
    fits: tuple[Fit, ...]
    mixture: TunedMixture
    overlap: Overlap | None
    stored: StoredSample | None

    def _repr_html_(self) -> str:
        """Return what each way to mix gives, and the sweeps, for notebooks."""
        rows = [("the LM alone", f"{self.lm_perplexity:.3f}", "")]
        rows += [(fit.name, f"{fit.perplexity:.3f}", f"{fit.share_hurt:.0%}") for fit in self.fits]
        columns = ("mixture", "perplexity", "tokens hurt by more than 0.1 nats")
        caption = f"{self.tokens:,} tokens to tune on"
        shown = display.table(columns, rows, caption=caption)
        return shown + "".join(sweep._repr_html_() for sweep in self.sweeps)

    def save(self, stores: Stores, text: Sequence[str] = ()) -> None:
        """Store each datastore's parameters as its defaults, with where they come from.

        stores: those of the tuned model, in their order. text: the names of the held-out text.
        """
        stores = as_stores(stores)
        for store, parameters in zip(stores, self.parameters, strict=True):
            others = [str(other.path) for other in stores if other is not store]
            origin: dict[str, Any] = {
                "text": list(text),
                "stored": None if self.stored is None else asdict(self.stored),
                "entries": len(store),
                "tokens": self.tokens,
                "lm_perplexity": self.lm_perplexity,
                "knn_perplexity": self.knn_perplexity,
                "together_with": others,
            }
            if store is stores[0]:
                origin["fits"] = [asdict(fit) for fit in self.fits]
                store.save_parameters(parameters, origin, self.mixture, stores[1:])
            else:
                store.save_parameters(parameters, origin)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `parameters` as `parameters_to_dict` gives them."""
        return {
            "parameters": parameters_to_dict(self.parameters),
            "tokens": self.tokens,
            "lm_perplexity": self.lm_perplexity,
            "knn_perplexity": self.knn_perplexity,
            "sweeps": [asdict(each) for each in self.sweeps],
            "fits": [asdict(fit) for fit in self.fits],
            "overlap": None if self.overlap is None else asdict(self.overlap),
            "stored": None if self.stored is None else asdict(self.stored),
            "mixture": {
                "cache": asdict(self.mixture.cache),
                "lmbdas": self.mixture.lmbdas,
                "by_distance": self.mixture.by_distance is not None,
                "learned": self.mixture.gate is not None,
                "learned_with_cache": self.mixture.cache_gate is not None,
            },
        }


def tune(
    model: KNNLM | Stores,
    documents: Iterable[Document] | None = None,
    *,
    stored: bool | None = None,
    max_k: int | None = None,
    windowing: Windowing | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Tuning:
    """Find the k ≤ max_k (1,024), λ and temperature that predict a text best.

    model: or the datastores alone, which are then opened with their own language model.
    documents: held-out text; without it, the (first) datastore's own text is tuned on, where a
    document has no vote for its own tokens, nor have its copies. stored: whether to use that text
    too; by default where there are no documents. seed: which part of it is read. windowing: of the
    documents; stored text is read as it was built. max_tokens: of the documents, by default all;
    of stored text, by default 65,536.

    For several datastores, first k and temperature of each alone, then all λ together. Then a
    continuous cache and, for a text of at least 2,048 tokens, the weights of each token: by gates,
    and for a single datastore by distance. Raises InvalidArgumentError, and DatastoreMismatchError
    where the stored keys are not those that the model computes again.
    """
    if not isinstance(model, KNNLM):
        stores = as_stores(model)
        model = KNNLM(stores[0].load_model(), stores, weights=Weights.fixed)
    for retriever in model.retrievers:
        if len(retriever.store) == 0:
            raise InvalidArgumentError(
                f"{retriever.store.path} must have entries to tune on, got none"
            )
    k = MAX_K if max_k is None else check_k(max_k, "max_k")
    check_seed(seed)
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens, most=LARGEST)
    if documents is None:
        if stored is False or windowing is not None:
            raise InvalidArgumentError(
                "documents must be given where stored is False or windowing is given, got none"
            )
        stored = True
    parts: list[HeldOutText] = []
    sample = None
    if stored:
        own, sample = read_stored(
            model, k, max_tokens=max_tokens or DEFAULT_TOKENS, seed=seed, progress=progress
        )
        parts.append(own)
    if documents is not None:
        windowing = windowing or model.windowing
        held_out = read_held_out(
            model, documents, k, windowing, max_tokens=max_tokens, progress=progress
        )
        if held_out is None:
            raise InvalidArgumentError("the text to tune on must have a token, got none")
        parts.append(held_out)
    return _fit(HeldOutText.join(parts), parts[-1].overlap, sample, progress)


def _fit(
    text: HeldOutText, overlap: Overlap | None, sample: StoredSample | None, progress: Progress
) -> Tuning:
    neighbors = [text.for_targets(voters) for voters in text.voters]
    sweeps = tuple(sweep(own, progress) for own in neighbors)
    parameters, knn_perplexity = tuple(s.parameters for s in sweeps), sweeps[0].knn_perplexity
    if len(sweeps) > 1:
        parameters, knn_perplexity = fit_lmbdas(neighbors, parameters)
    mixture, fits = fit_mixture(text, parameters, progress)
    return Tuning(
        parameters,
        len(text),
        sweeps[0].lm_perplexity,
        knn_perplexity,
        sweeps,
        fits,
        mixture,
        overlap,
        sample,
    )
