"""transformers' `generate` with drafts: passes that read several tokens, and no other words.

Given to `generate` as `custom_generate`, it takes the place of the loop for greedy decoding and
sampling. transformers' own assisted decoding would not do: it takes one sequence only, draws random
numbers for the tokens that it rejects too, so that a seed gives another text, and has no say in how
long a draft pays.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING

from knnlm.model.decoding import Decoder
from knnlm.retrieval.draft_lengths import DraftedText, PassCosts, choose_lengths
from knnlm.retrieval.mixer import Mixer, Retrieved

# what treats each row of a batch by itself
_BY_ROW = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    MaxLengthCriteria,
    EosTokenCriteria,
)
_COSTS: WeakKeyDictionary[PreTrainedModel, PassCosts] = WeakKeyDictionary()
_KNOWN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


@dataclass(slots=True)
class _Row:
    """One text of a batch; tokens: with the padding before it."""

    tokens: Int[Tensor, "1 time"]
    text: DraftedText


@runtime_checkable
class Attached(Protocol):
    """What is attached: its mixer, and what it found for the positions that the last pass kept."""

    model: PreTrainedModel
    mixer: Mixer
    retrieved: Retrieved

    def reading_draft(self) -> AbstractContextManager[None]:
        """Tell that this thread's passes, meanwhile, keep every position that they read."""
        ...

    @property
    def saves_searches(self) -> bool:
        """Whether some searches are saved: what stands in for these follows passes of one token."""
        ...


class DraftedDecoding:
    """Decodes with an attached mixture, in `generate(…, custom_generate=…)`.

    Whatever else `generate` is asked for (beams, a cache of its own, scores), and where the model
    must read otherwise, the loop is transformers' own, without drafts.
    """

    def __init__(self, attachment: Attached, decoder: Decoder) -> None:
        self._attachment = attachment
        self._decoder = decoder
        self._costs = _COSTS.setdefault(attachment.model, PassCosts())

    def __call__(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch time"], **given: Any
    ) -> Any:
        """Return the texts with their continuations, as `generate`'s own loops do."""
        config: GenerationConfig = given["generation_config"]
        if not self._may_draft(input_ids, **given):
            loop = getattr(type(model), GENERATION_MODES_MAPPING[config.get_generation_mode()])
            return loop(model, input_ids, **given)
        mask = given.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        rows = [
            _Row(own[None], DraftedText(own[seen.bool()].tolist()))
            for own, seen in zip(input_ids, mask.to(input_ids.device), strict=True)
        ]
        self._decode(
            rows, mask.cpu(), given["logits_processor"], given["stopping_criteria"], config
        )
        longest = max(row.tokens.shape[1] for row in rows)
        padding = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        return torch.cat(
            [
                torch.nn.functional.pad(
                    row.tokens, (0, longest - row.tokens.shape[1]), value=padding
                )
                for row in rows
            ]
        )

    def _may_draft(
        self,
        input_ids: Int[Tensor, "batch time"],
        *,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        **given: Any,
    ) -> bool:
        mode = generation_config.get_generation_mode()
        cache = given.get("past_key_values")
        mask = given.get("attention_mask")
        mixer = self._attachment.mixer
        is_plain = (
            mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and not generation_config.return_dict_in_generate
            and set(given) <= _KNOWN_ARGUMENTS
            and given.get("use_cache", True)
            and (cache is None or (isinstance(cache, DynamicCache) and not cache.get_seq_length()))
            and (mask is None or mask.dim() == 2)
            and _counts_from_0(given.get("position_ids"), mask)
        )
        if (
            not is_plain
            or not mixer.counts
            or self._attachment.saves_searches
            or not self._decoder.takes_back(int(generation_config.max_length))
        ):
            return False
        if len(input_ids) == 1:
            return True
        # rows of a batch draw from one stream of random numbers, and are in step for a cache
        by_row = [*logits_processor, *stopping_criteria]
        return (
            mode == GenerationMode.GREEDY_SEARCH
            and not mixer.uses_cache
            and all(isinstance(one, _BY_ROW) for one in by_row)
        )

    def _decode(
        self,
        rows: list[_Row],
        mask: Int[Tensor, "batch time"],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        """Let the rows grow to their ends."""
        prompts = torch.cat([row.tokens for row in rows]).cpu()
        _, logits, cached = self._decoder.forward(prompts, mask, None, 1)
        while True:
            width = logits.shape[1]
            chosen = [
                self._choose(row, own, processors, criteria, config)
                for row, own in zip(rows, logits, strict=True)
            ]
            self._guess(rows, [count - 1 for count, _ in chosen], width, config)
            cached = self._decoder.take_back(cached, [width - count for count, _ in chosen])
            left = [place for place, (_, is_done) in enumerate(chosen) if not is_done]
            if not left:
                return
            if len(left) < len(rows):
                cached = self._decoder.select(cached, left)
                rows = [rows[place] for place in left]
            choose_lengths([row.text for row in rows], self._costs)
            pieces = [[int(row.tokens[0, -1]), *row.text.reading] for row in rows]
            started = time.perf_counter()
            with self._attachment.reading_draft():
                _, logits, cached = self._decoder.read_on(pieces, cached)
            self._costs.note(len(rows), logits.shape[1], time.perf_counter() - started)

    def _choose(
        self,
        row: _Row,
        logits: Float[Tensor, "width vocab"],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> tuple[int, bool]:
        """Choose tokens as transformers' own loop does, as far as the draft has said the same.

        Returns how many, and whether the last of them is the end.
        """
        chosen: list[int] = []
        is_done = False
        for guess, own in zip([*row.text.reading, None], logits, strict=False):
            scores = processors(row.tokens, own[None].to(row.tokens.device, copy=True))
            if config.do_sample:
                token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            row.tokens = torch.cat([row.tokens, token], dim=1)
            chosen.append(int(token))
            is_done = bool(criteria(row.tokens, None).all())
            if is_done or chosen[-1] != guess:
                break
        row.text.push(chosen)
        return len(chosen), is_done

    def _guess(
        self, rows: list[_Row], columns: list[int], width: int, config: GenerationConfig
    ) -> None:
        """Guess what follows each row, from the neighbors of the position before its last token."""
        retrieved = self._attachment.retrieved
        searched = list(zip(self._attachment.mixer.searched, retrieved.neighbors, strict=True))
        for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
            room = int(config.max_length) - row.tokens.shape[1] - 1
            row.text.guess(searched, number * width + column, max(room, 0))


def _counts_from_0(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions are those that `generate` gives to tokens after padding."""
    if positions is None:
        return True
    real = torch.ones_like(positions) if mask is None else mask
    if real.shape != positions.shape:
        return False
    counted = real.cumsum(dim=-1) - 1
    return torch.equal(positions[real.bool()], counted[real.bool()])
