"""A text → everything that the page needs to recompute its mixture for any λ, k and temperature.

Knows the kNN-LM; knows no page and no protocol.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.apps.engine.text_stream import TextStream
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import text_windows
from knnlm.evaluation.scoring import Scores, mixed_log_probs
from knnlm.index.policy import describe_index
from knnlm.index.protocol import Neighbors
from knnlm.knn_lm import KNNLM
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.retriever import Retriever
from knnlm.text.windows import Window

LEAST_K = 256
"""Neighbors that are searched at least, so that k can be raised too."""
_LM_TOKENS = 10  # of the LM's likeliest, shown in every place
_SOFTMAX_ROWS = 256
_MOST_DOCUMENTS = 1000  # that an overview names
_BEFORE, _AFTER = 40, 16  # tokens of a passage


class _Read(NamedTuple):
    """What is found of the new tokens of one window; see `Analysis`."""

    lm_log_probs: Float[Tensor, " new"]
    lm_top: Int[Tensor, "new top"]
    lm_top_log_probs: Float[Tensor, "new top"]
    neighbors: tuple[Neighbors, ...]
    log_probs: Float[Tensor, " new"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the LM says of each token of a text, and its neighbors: λ, k and T are still open.

    generated_from: the first token that the model wrote itself; their number where it wrote none.
    lm_top: the LM's likeliest tokens in each place. neighbors: in each retriever, of its k or more.
    weights: of the model's own mixture (see `Mixer.weights`); log_probs: of the tokens under it.
    All in nats.
    """

    lm: LanguageModel
    retrievers: tuple[Retriever, ...]
    weights: str
    tokens: Int[Tensor, " token"]
    generated_from: int
    lm_log_probs: Float[Tensor, " token"]
    lm_top: Int[Tensor, "token top"]
    lm_top_log_probs: Float[Tensor, "token top"]
    neighbors: tuple[Neighbors, ...]
    log_probs: Float[Tensor, " token"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; arrays as base64, little-endian."""
        values = [
            retriever.tokens(found)
            for retriever, found in zip(self.retrievers, self.neighbors, strict=True)
        ]
        mentioned = torch.cat([self.tokens, self.lm_top.flatten(), *(v.flatten() for v in values)])
        return {
            "model": self.lm.name,
            "pieces": _pieces(self.lm, self.tokens.tolist()),
            "tokens": _packed(self.tokens, "<i4"),
            "generated_from": self.generated_from,
            "lm_log_probs": _packed(self.lm_log_probs, "<f4"),
            "lm_top": _packed(self.lm_top, "<i4"),
            "lm_top_log_probs": _packed(self.lm_top_log_probs, "<f4"),
            "tuned_log_probs": None if self.weights == "fixed" else _packed(self.log_probs, "<f4"),
            "vocabulary": {
                str(token): self.lm.decode([token])
                for token in np.unique(mentioned.numpy()).tolist()
                if token >= 0
            },
            "datastores": [
                {
                    "path": str(retriever.store.path),
                    "entries": len(retriever.store),
                    "numbering": retriever.store.numbering,
                    "parameters": asdict(retriever.parameters),
                    "k": found.rows.shape[1],
                    "squared_distances": _packed(found.squared_distances, "<f4"),
                    "rows": _packed(found.rows, "<i4"),
                    "values": _packed(of_memory, "<i4"),
                    "documents": _documents(retriever.store, found.rows),
                }
                for retriever, found, of_memory in zip(
                    self.retrievers, self.neighbors, values, strict=True
                )
            ],
        }

    def strongest_rows(self, sources: int) -> list[list[int]]:
        """Return the rows of each memory that matter most for some token.

        Of every token the nearest `sources`, and the nearest as many that vote for it.
        """
        chosen = []
        for retriever, found in zip(self.retrievers, self.neighbors, strict=True):
            votes = retriever.votes_for_targets(found, self.tokens)
            votes &= votes.cumsum(dim=1) <= sources
            votes[:, :sources] |= found.present[:, :sources]
            chosen.append(np.unique(found.rows[votes].numpy()).tolist())
        return chosen


def analyze(
    model: KNNLM, text: str, generated: Sequence[int] = (), most_tokens: int | None = None
) -> Analysis:
    """Read a text and find its neighbors.

    generated: tokens that follow it, written by the model. Raises InvalidArgumentError for a text
    without tokens, or of more than `most_tokens`. The continuous cache is left out.
    """
    lm = model.lm
    tokens = [*lm.encode([text])[0].tolist(), *generated]
    if not tokens:
        raise InvalidArgumentError("text must have a token, got none: write something")
    if most_tokens is not None and len(tokens) > most_tokens:
        raise InvalidArgumentError(
            f"text must have at most {most_tokens} tokens here, got {len(tokens)}: take a part"
        )
    # a gate with the cache among its sources knows no mixture without it
    mixer = model.mixer
    if mixer.cache is not None:
        mixer = Mixer(mixer.retrievers)
    windows = text_windows(lm, tokens, model.windowing)
    parts = [_read(lm, mixer, window) for window in windows]
    return Analysis(
        lm=lm,
        retrievers=mixer.retrievers,
        weights=mixer.weights,
        tokens=torch.tensor(tokens),
        generated_from=len(tokens) - len(generated),
        lm_log_probs=torch.cat([part.lm_log_probs for part in parts]),
        lm_top=torch.cat([part.lm_top for part in parts]),
        lm_top_log_probs=torch.cat([part.lm_top_log_probs for part in parts]),
        neighbors=tuple(
            Neighbors(
                torch.cat([part.neighbors[which].squared_distances for part in parts]),
                torch.cat([part.neighbors[which].rows for part in parts]),
            )
            for which in range(len(mixer.retrievers))
        ),
        log_probs=torch.cat([part.log_probs for part in parts]),
    )


def _read(lm: LanguageModel, mixer: Mixer, window: Window) -> _Read:
    reading = lm.keys_and_logits(torch.from_numpy(window.inputs).long()[None])
    targets = torch.from_numpy(window.targets).long()
    log_probs, top, top_log_probs, summaries = [], [], [], []
    for logits, of_logits in zip(
        torch.split(reading.logits[0, window.context :], _SOFTMAX_ROWS),
        torch.split(targets, _SOFTMAX_ROWS),
        strict=True,
    ):
        distribution = torch.log_softmax(logits, dim=-1)
        log_probs.append(distribution.gather(1, of_logits.to(logits.device)[:, None])[:, 0].cpu())
        likeliest = distribution.topk(min(_LM_TOKENS, lm.vocab_size), dim=1)
        top.append(likeliest.indices.cpu())
        top_log_probs.append(likeliest.values.cpu())
        if mixer.gate is not None:
            summaries.append(summarize_lm(distribution).cpu())
    keys = reading.keys[0, window.context :].float()
    neighbors = []
    for retriever in mixer.retrievers:
        k = max(retriever.parameters.k, min(LEAST_K, len(retriever.store)))
        found = retriever.index.search(keys, k)
        neighbors.append(Neighbors(found.squared_distances.cpu(), found.rows.cpu()))
    lm_log_probs = torch.cat(log_probs)
    mixed = lm_log_probs
    if mixer.counts:
        own = tuple(
            Neighbors(
                found.squared_distances[:, : retriever.parameters.k],
                found.rows[:, : retriever.parameters.k],
            )
            for retriever, found in zip(mixer.retrievers, neighbors, strict=True)
            if retriever in mixer.searched
        )
        summary = LMSummary.join(summaries) if summaries else None
        mixed = mixed_log_probs(Scores([window], targets, lm_log_probs, own, lm=summary), mixer)
    return _Read(lm_log_probs, torch.cat(top), torch.cat(top_log_probs), tuple(neighbors), mixed)


def read_passages(
    lm: LanguageModel, retrievers: Sequence[Retriever], rows: Sequence[Sequence[int]]
) -> list[dict[str, dict[str, str]]]:
    """Return the text around some rows of each retriever: before and after their value, by row."""
    answers = []
    for retriever, of_memory in zip(retrievers, rows, strict=True):
        passages = {}
        for row in of_memory:
            if not 0 <= row < retriever.store.rows:
                raise InvalidArgumentError(
                    f"rows must be below {retriever.store.rows}, the entries of "
                    f"{retriever.store.path}, got {row}"
                )
            passage = retriever.store.passage(row, _BEFORE, _AFTER)
            if passage.document.forgotten:
                continue
            passages[str(row)] = {
                "before": lm.decode(passage.before),
                "value": lm.decode([passage.value]),
                "after": lm.decode(passage.after),
            }
        answers.append(passages)
    return answers


def describe_stores(retrievers: Sequence[Retriever]) -> list[dict[str, Any]]:
    """Return what each datastore holds: its index, its mixture, its largest documents."""
    described = []
    for retriever in retrievers:
        store = retriever.store
        documents = sorted(store.documents(), key=lambda one: one.start - one.stop)
        described.append(
            {
                "path": str(store.path),
                "model": store.settings.model,
                "key": store.settings.key,
                "entries": len(store),
                "forgotten_entries": store.forgotten_rows,
                "size_bytes": sum(shard.file.size_bytes for shard in store.shards),
                "index": describe_index(store),
                "parameters": asdict(retriever.parameters),
                "is_tuned": store.parameters is not None,
                "is_learned": store.is_learned,
                "documents": len(documents),
                "largest_documents": [
                    {"name": document.name, "entries": document.stop - document.start}
                    for document in documents[:_MOST_DOCUMENTS]
                ],
            }
        )
    return described


def _documents(store: Datastore, rows: Int[Tensor, "token k"]) -> list[dict[str, Any]]:
    """Return the documents that hold some of the rows, in order."""
    documents = store.documents()
    starts = np.array([document.start for document in documents])
    present = rows[rows >= 0].numpy()
    found = np.unique(np.searchsorted(starts, present, side="right") - 1).tolist()
    return [
        {"name": documents[n].name, "start": documents[n].start, "stop": documents[n].stop}
        for n in found
    ]


def _pieces(lm: LanguageModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token; a character of several tokens belongs to the first of them.

    Joined, they are the text.
    """
    stream = TextStream(lm.decode, ())
    for token in tokens:
        stream.push(token)
    stream.finish()
    stops = [*stream.offsets[1:], len(stream.text)]
    return [stream.text[start:stop] for start, stop in zip(stream.offsets, stops, strict=True)]


def _packed(values: Tensor, dtype: str) -> str:
    return base64.b64encode(values.numpy().astype(dtype).tobytes()).decode("ascii")
