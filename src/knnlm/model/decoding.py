"""The model's forward passes for many sequences: prompts one by one, then all of them together.

Knows the model, its cache and token ids. Knows no datastore, no job and no text; whatever is
attached to the model changes the logits that it returns.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.model.few_rows import FewRows
from knnlm.model.key_places import KeyCapture
from knnlm.model.keyed_model import KeyedModel
from knnlm.model.roomy_cache import RoomyCache

_MOST_PADDING = 16  # columns that are padding in all sequences; dropping them copies the cache


class Step(NamedTuple):
    """Some positions that the model has read: their keys, and log p_LM of each next token."""

    keys: Float[Tensor, "position dim"]
    log_probs: Float[Tensor, "position vocab"]


@dataclass(slots=True)
class CachedSequences:
    """Sequences that the model has read, as its cache holds them: padded on the left.

    mask: 1 where there is a token. cache: the model's own; None if there is none.
    tokens: what was read, where it may have to be read again; else None.
    """

    mask: Int[Tensor, "sequence time"]
    cache: Any
    tokens: Int[Tensor, "sequence time"] | None


class Decoder:
    """Runs one model, whose keys `captured` records, for one thread.

    `CacheRules` tell how. Sequences of any lengths share one batch where the model's cache can be
    padded. Else (Mamba and its hybrids) they are read one by one, and where nothing can be handed
    from pass to pass (GPT-1), each pass reads all of a sequence. LongRoPE's sequences that may grow
    beyond its first frequencies are read one by one too, and again when they do.
    """

    def __init__(self, lm: KeyedModel, captured: KeyCapture) -> None:
        self._lm = lm
        self._captured = captured
        self._rules = lm.cache_rules
        self._few_rows = FewRows(lm.model)
        accepted = inspect.signature(lm.model.forward).parameters
        self._takes_use_cache = "use_cache" in accepted
        self._can_skip_logits = "logits_to_keep" in accepted
        self._keeps_tokens = self._rules.cache is None or lm.batch_rules.frequency_limit is not None

    def shares_batches(self, positions: int) -> bool:
        """Whether `join` may batch sequences that grow to this many positions."""
        return self._rules.shared and not self._lm.batch_rules.is_long(positions)

    def may_read_pieces(self, positions: int) -> bool:
        """Whether `read` may read a prompt of this many positions piece by piece."""
        return self._rules.pieces and not self._lm.batch_rules.is_long(positions)

    def takes_back(self, positions: int) -> bool:
        """Whether `take_back` can undo reading, in sequences that grow to this many positions.

        It needs the cache that sequences share: one of full layers, with nothing beside it.
        """
        return self.shares_batches(positions)

    def read(
        self, tokens: Int[Tensor, " time"], before: CachedSequences | None, keep: int
    ) -> tuple[Step, CachedSequences]:
        """Read the next tokens of one prompt; return the last `keep` positions."""
        read = 0 if before is None else before.mask.shape[1]
        mask = torch.ones(1, read + len(tokens), dtype=torch.int64)
        keys, logits, after = self.forward(tokens[None], mask, before, keep)
        return Step(keys[0, -keep:], torch.log_softmax(logits[0], dim=-1)), after

    def advance(
        self, pieces: Sequence[Sequence[int]], batch: CachedSequences
    ) -> tuple[Step, CachedSequences]:
        """Read one or more tokens of every sequence, several only where `takes_back`.

        Shorter pieces are padded on the right, in the step as in the batch, until `take_back`
        removes the padding. The step's positions are those of the first sequence, then those of the
        second, and so on.
        """
        keys, logits, after = self.read_on(pieces, batch)
        log_probs = torch.log_softmax(logits, dim=-1)
        return Step(keys.flatten(0, 1), log_probs.flatten(0, 1)), after

    def read_on(
        self, pieces: Sequence[Sequence[int]], batch: CachedSequences
    ) -> tuple[
        Float[Tensor, "sequence new dim"], Float[Tensor, "sequence new vocab"], CachedSequences
    ]:
        """Do what `advance` does; return the model's logits as they are."""
        new = max(map(len, pieces))
        tokens = torch.tensor([[*piece, *[0] * (new - len(piece))] for piece in pieces])
        lengths = torch.tensor([len(piece) for piece in pieces])
        real = (torch.arange(new) < lengths[:, None]).long()
        return self.forward(tokens, torch.cat([batch.mask, real], dim=1), batch, new)

    def forward(
        self,
        tokens: Int[Tensor, "sequence new"],
        mask: Int[Tensor, "sequence time"],
        before: CachedSequences | None,
        keep: int,
    ) -> tuple[
        Float[Tensor, "sequence new dim"], Float[Tensor, "sequence kept vocab"], CachedSequences
    ]:
        """Read new tokens after those before; return their keys, and the logits of the last `keep`.

        mask: of all tokens, those before too.
        """
        device, new = self._lm.device, tokens.shape[1]
        cache = None if before is None else before.cache
        known = tokens if before is None and self._keeps_tokens else None
        if before is not None and before.tokens is not None:
            known = torch.cat([before.tokens, tokens], dim=1)
            read_again = self._rules.cache is None or self._lm.batch_rules.changes_between(
                mask.shape[1] - new, mask.shape[1]
            )
            if read_again:
                tokens, cache = known, None
        if cache is None and self._rules.shared:
            # full layers even if the model's attention slides: they can be padded and joined
            cache = RoomyCache()
        options: dict[str, Any] = {}
        if self._rules.cache is not None:
            options[self._rules.cache] = cache
        if self._takes_use_cache:
            options["use_cache"] = self._rules.cache is not None
        if self._rules.shared:  # else there is no padding
            options["attention_mask"] = mask.to(device)
        if self._rules.positions:
            positions = mask.cumsum(dim=1)[:, -tokens.shape[1] :] - 1
            options["position_ids"] = positions.clamp_min(0).to(device)
        if self._can_skip_logits:
            options["logits_to_keep"] = keep
        with torch.inference_mode(), self._few_rows.reading(tokens.numel()):
            output = self._lm.model(input_ids=tokens.to(device), **options)
        keys = self._captured.keys.to(device).float()[:, -new:]
        cache = None if self._rules.cache is None else getattr(output, self._rules.cache)
        return keys, output.logits[:, -keep:].float(), CachedSequences(mask, cache, known)

    def take_back(self, batch: CachedSequences, counts: Sequence[int]) -> CachedSequences:
        """Undo the reading of each sequence's last columns, `counts` of them, padding included.

        Changes the batch. Where sequences differ, the rows that lose more move to the right, so
        that each stays without gaps: attention that slides, or counts columns, sees no difference.
        """
        common = min(counts)
        mask = batch.mask[:, : batch.mask.shape[1] - common].clone()
        extra = {row: count - common for row, count in enumerate(counts) if count > common}
        with torch.inference_mode():
            batch.cache.crop(-common)
            for layer in batch.cache.layers if extra else ():
                for states in (layer.keys, layer.values):
                    for row, columns in extra.items():
                        states[row, :, columns:] = states[row, :, :-columns].clone()
        for row, columns in extra.items():
            mask[row] = torch.nn.functional.pad(mask[row, :-columns], (columns, 0))
        first = int(mask.argmax(dim=1).min())
        if first >= _MOST_PADDING:
            for layer in batch.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
            mask = mask[:, first:]
        return CachedSequences(mask, batch.cache, None)

    def join(self, parts: Sequence[CachedSequences]) -> CachedSequences:
        """Join several batches into one; all must grow within `shares_batches`."""
        longest = max(part.mask.shape[1] for part in parts)
        joined = RoomyCache()
        for number in range(len(parts[0].cache.layers)):
            layers = [part.cache.layers[number] for part in parts]
            joined.update(
                torch.cat([_padded(layer.keys, longest) for layer in layers]),
                torch.cat([_padded(layer.values, longest) for layer in layers]),
                number,
            )
        masks = [
            torch.nn.functional.pad(part.mask, (longest - part.mask.shape[1], 0)) for part in parts
        ]
        return CachedSequences(torch.cat(masks), joined, None)

    def select(self, batch: CachedSequences, sequences: Sequence[int]) -> CachedSequences:
        """Select some sequences (or one several times); drop columns that are padding in all.

        Only where `shares_batches`. (`Cache.batch_select_indices` works in place and keeps every
        column: then a batch never gets shorter than the longest sequence it ever had.)
        """
        chosen = list(sequences)
        mask = batch.mask[chosen]
        first = int(mask.argmax(dim=1).min())
        selected = RoomyCache()
        for number, layer in enumerate(batch.cache.layers):
            keys, values = layer.keys[chosen], layer.values[chosen]
            selected.update(keys[..., first:, :], values[..., first:, :], number)
        return CachedSequences(mask[:, first:], selected, None)


def _padded(states: Float[Tensor, "sequence head time dim"], time: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, time - states.shape[-2], 0))
