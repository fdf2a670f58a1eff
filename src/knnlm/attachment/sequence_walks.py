"""Saved searches in an attached model: they follow the sequences that the model reads.

A sequence is identified by the model's own cache (`past_key_values`), as for the continuous cache:
a beam search that reorders it reorders the pointers too.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knnlm.errors import UnsupportedModelError
from knnlm.index.protocol import Neighbors
from knnlm.mixture.lm_summary import summarize_lm
from knnlm.retrieval.mixer import Mixer
from knnlm.retrieval.saved_searches import SavingRule, Walks, search_some


class _Read(NamedTuple):
    """What was read of some sequences: `positions` of each, and what was found for the last."""

    positions: int
    walks: Walks


class SequenceWalks:
    """The neighbors of the positions that a model reads, with few searches.

    made: how many searches were made, of `positions` that could have had one.
    """

    def __init__(self, mixer: Mixer, rule: SavingRule, name: str) -> None:
        self._mixer = mixer
        self._rule = rule
        self._name = name
        self._read: WeakKeyDictionary[Any, _Read] = WeakKeyDictionary()
        self.made = self.positions = 0

    @property
    def saved(self) -> float:
        """The share of the searches so far that were saved."""
        return 1 - self.made / max(self.positions, 1)

    def find(
        self,
        given: dict[str, Any],
        output: Any,
        keys: Float[Tensor, "batch kept dim"],
        lm_log_probs: Float[Tensor, "batch kept vocab"],
    ) -> list[Neighbors]:
        """Return the neighbors of the positions that a forward pass keeps, row by row.

        given: the pass's arguments. Pointers lead from the last position of one pass to the only
        one of the next; other positions are searched for. Raises UnsupportedModelError where the
        pass does not tell which sequence it goes on with.
        """
        batch, kept, _ = keys.shape
        if batch * kept == 0:
            return []
        lm = None
        if self._rule.gate is not None:
            lm = summarize_lm(lm_log_probs.detach().flatten(0, 1))
        matters = self._rule.matters(lm, keys.flatten(0, 1)).reshape(batch, kept)
        walks, tokens = self._go_on(given, output, batch)
        made, last = walks.made, keys[:, -1]
        ends = walks.step(tokens, last, matters[:, -1], lambda some: self._mixer.find(last[some]))
        self.made += walks.made - made
        self.positions += batch * kept
        if kept == 1:
            return ends
        return self._with_earlier(keys[:, :-1], matters[:, :-1], ends)

    def _with_earlier(
        self,
        keys: Float[Tensor, "batch earlier dim"],
        matters: Bool[Tensor, "batch earlier"],
        ends: list[Neighbors],
    ) -> list[Neighbors]:
        """Search for the positions before the last ones, and put the last ones' neighbors after."""
        queries = keys.flatten(0, 1)
        found = search_some(
            lambda some: self._mixer.find(queries[some]),
            self._mixer.searched,
            queries,
            matters.flatten(),
        )
        self.made += int(matters.sum())
        joined = []
        for earlier, end in zip(found, ends, strict=True):
            distances, rows = (
                torch.cat([one.reshape(*keys.shape[:2], -1), other[:, None]], dim=1).flatten(0, 1)
                for one, other in (
                    (earlier.squared_distances, end.squared_distances),
                    (earlier.rows, end.rows),
                )
            )
            joined.append(Neighbors(distances, rows, min(earlier.coverage, end.coverage)))
        return joined

    def _go_on(
        self, given: dict[str, Any], output: Any, batch: int
    ) -> tuple[Walks, list[int] | None]:
        """Return the walks of a pass's sequences, and what each read since its last position."""
        if self._rule.pointers is None:
            return Walks(self._mixer, self._rule, batch), None
        inputs = given.get("input_ids")
        past = getattr(output, "past_key_values", given.get("past_key_values"))
        if inputs is None or past is None:
            lacking = "token ids" if inputs is None else "the cache of its model"
            raise UnsupportedModelError(
                f"pointers must follow a sequence from pass to pass, but {self._name} was read "
                f"without {lacking}: search always"
            )
        positions = int(past.get_seq_length())
        read = self._read.get(past)
        if read is None:
            self._follow(past)
        tokens = None
        goes_on = read is not None and read.positions == positions - 1 and inputs.shape[1] == 1
        if goes_on and read is not None and read.walks.sequences == batch:
            walks, tokens = read.walks, inputs[:, 0].tolist()
        else:
            walks = Walks(self._mixer, self._rule, batch)
        self._read[past] = _Read(positions, walks)
        return walks, tokens

    def _follow(self, past: Any) -> None:
        """Reorder the pointers whenever a beam search reorders the model's cache."""
        reorder_model, known = past.reorder_cache, self._read

        def reorder(beam_idx: Tensor) -> None:
            reorder_model(beam_idx)
            known[past].walks.reorder(beam_idx.tolist())

        past.reorder_cache = reorder
