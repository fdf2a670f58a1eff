"""How a model must be read so that a position's key and logits depend on nothing but its past.

Found out by a few short passes over the model itself, without a table of architectures: which other
rows, which padding and which earlier passes may be there. What short passes cannot show, because it
begins beyond thousands of positions, is read from the configuration.
Knows one model and its keys. Knows no tokenizer, no text, no file.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_CACHE_NAMES = ("cache_params", "past_key_values", "state")
_PROBE_POSITIONS = 9
_WINDOWS = ("sliding_window", "attention_chunk_size")  # a configuration's, of the cache's layers


class Pass(NamedTuple):
    """One forward pass: the keys and logits of some of its positions, and the model's output."""

    keys: Float[Tensor, "batch time dim"]
    logits: Float[Tensor, "batch time vocab"]
    output: Any

    def part(self, start: int, stop: int | None) -> "Pass":
        """Return some of its positions."""
        return Pass(self.keys[:, start:stop], self.logits[:, start:stop], self.output)

    def row(self, number: int, stop: int) -> "Pass":
        """Return the first positions of one row."""
        rows = slice(number, number + 1)
        return Pass(self.keys[rows, :stop], self.logits[rows, :stop], self.output)


RunPass = Callable[..., Pass]  # takes the arguments of the model's `forward`


@dataclass(frozen=True, slots=True)
class BatchRules:
    """How texts may share a pass that reads them from their beginning.

    batches: whether rows of several lengths, padded on the right, leave each other's keys and
    logits alone. Where not, each text is read alone.
    frequency_limit: in a pass of more positions than this all of its positions, the first ones too,
    are encoded with other rotary frequencies (LongRoPE); None where frequencies are fixed.
    """

    batches: bool
    frequency_limit: int | None = None

    def is_long(self, positions: int) -> bool:
        """Whether a text of this length is read with the frequencies for long texts."""
        return self.frequency_limit is not None and positions > self.frequency_limit

    def changes_between(self, positions: int, later: int) -> bool:
        """Whether a text that grows this far must be read again with other frequencies."""
        return self.is_long(later) and not self.is_long(positions)


@dataclass(frozen=True, slots=True)
class CacheRules:
    """How a text may be continued from what earlier passes have read of it.

    cache: the argument that hands it over, also its name in the output; None where every pass must
    read a text from its beginning.
    is_unreliable: the model has such a cache, but with it gives other keys or logits.
    pieces: whether several tokens may be read at once after others.
    shared: whether texts of several lengths may share a cache, padded on the left.
    positions: whether the model takes `position_ids` that count from 0, as `generate` does.
    """

    cache: str | None
    positions: bool
    is_unreliable: bool = False
    pieces: bool = False
    shared: bool = False


def find_frequency_limit(config: Any) -> int | None:
    """Return the positions up to which a LongRoPE model uses its frequencies for short texts."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
    limits = [
        part.get("original_max_position_embeddings", config.max_position_embeddings)
        for part in kinds
        if part.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def probe_tokens(vocab_size: int, max_positions: int | None) -> Int[Tensor, "2 time"]:
    """Return two rows with the same first half; the second one continues with padding."""
    time = min(_PROBE_POSITIONS, max_positions or _PROBE_POSITIONS)
    tokens = (1 + (7 * torch.arange(time) + 2) % (vocab_size - 1)).repeat(2, 1)
    tokens[1, _first_piece(time) :] = 0
    return tokens


def is_future_seen(logits: Float[Tensor, "2 time vocab"]) -> bool:
    """Whether the logits of `probe_tokens` depend on later tokens, as in masked language models."""
    one, other = logits[:, : _first_piece(logits.shape[1])].float()
    tolerance = 4 * torch.finfo(logits.dtype).eps * float(one.abs().max())
    return float((one - other).abs().max()) > tolerance


def read_alone(run: RunPass, tokens: Int[Tensor, "2 time"]) -> Pass:
    """Read the part that both rows of `probe_tokens` have, without padding or other rows."""
    return run(input_ids=tokens[:1, : _first_piece(tokens.shape[1])])


def agree(one: Pass, other: Pass) -> bool:
    """Whether two ways of reading give the same keys and logits, up to rounding.

    Rounding differs between shapes, and in single positions it may choose another expert.
    """
    for a, b in ((one.keys, other.keys), (one.logits, other.logits)):
        tolerance = 1e-3 if a.dtype == torch.float32 else 0.1
        exact, error = b.float().norm(dim=-1), (a.float() - b.float()).norm(dim=-1)
        if bool((error / exact.clamp_min(1e-12)).median() > tolerance):
            return False
    return True


def find_cache_rules(
    model: PreTrainedModel, run: RunPass, tokens: Int[Tensor, "1 time"]
) -> CacheRules:
    """Read a text at once, in pieces, and beside padding on the left; compare."""
    probe = _CacheProbe(model, run, tokens)
    time, half = tokens.shape[1], _first_piece(tokens.shape[1])
    positions = probe.counts_positions
    if probe.name is None:
        return CacheRules(None, positions)
    if probe.forgets():
        return CacheRules(None, positions, is_unreliable=True)
    if probe.reads_in(*sorted({half, time - 1, time})):
        return CacheRules(
            probe.name, positions, pieces=True, shared=probe.reads_beside_padding(half)
        )
    if probe.reads_in(time - 1, time):
        return CacheRules(probe.name, positions)
    return CacheRules(None, positions, is_unreliable=True)


class _CacheProbe:
    """Reads one text in several ways, and compares them with reading it at once."""

    def __init__(self, model: PreTrainedModel, run: RunPass, tokens: Int[Tensor, "1 time"]) -> None:
        accepted = inspect.signature(model.forward).parameters
        self._config = model.config
        self._run = run
        self._tokens = tokens
        self._options = {"use_cache": True} if "use_cache" in accepted else {}
        self._whole = run(input_ids=tokens, **self._options)
        self.counts_positions = False
        """Whether the model takes `position_ids`, and counts from 0 if there are none."""
        if "position_ids" in accepted:
            counted = torch.arange(tokens.shape[1], device=tokens.device)[None]
            given = run(input_ids=tokens, position_ids=counted, **self._options)
            self.counts_positions = agree(given, self._whole)
        self.name = next((name for name in _CACHE_NAMES if name in self._whole.output), None)
        """The argument that hands over what was read, None if there is none."""

    def forgets(self) -> bool:
        """Whether the cache that the model makes drops what reading at once attends to.

        The windows of attention in a configuration are longer than the probe, but they are the
        cache's: if reading at once is the same with a window of two positions, it obeys none.
        """
        layers = DynamicCache(config=self._config).layers
        if not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
            return False
        config = self._config.get_text_config(decoder=True)
        windows = {name: getattr(config, name, None) for name in _WINDOWS}
        try:
            for name, positions in windows.items():
                if positions is not None:
                    setattr(config, name, 2)
            narrow = self._run(input_ids=self._tokens, **self._options)
        finally:
            for name, positions in windows.items():
                if positions is not None:
                    setattr(config, name, positions)
        return torch.equal(narrow.logits, self._whole.logits)

    def reads_in(self, *stops: int) -> bool:
        """Whether reading in pieces that end at `stops` agrees with reading at once."""
        return self._agrees(stops, padding=0, cache=None)

    def reads_beside_padding(self, *stops: int) -> bool:
        """Whether it also agrees after padding, with a cache that can be padded and joined."""
        assert self.name is not None
        layers = DynamicCache(config=self._config).layers
        return (
            self.name == "past_key_values"
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
            and self._agrees((*stops, self._tokens.shape[1]), padding=2, cache=DynamicCache())
        )

    def _agrees(self, stops: tuple[int, ...], padding: int, cache: Any) -> bool:
        tokens = torch.nn.functional.pad(self._tokens, (padding, 0))
        mask = torch.nn.functional.pad(torch.ones_like(self._tokens), (padding, 0))
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        start = 0
        for stop in stops:
            options: dict[str, Any] = dict(self._options)
            if cache is not None:
                options[str(self.name)] = cache
            if padding:
                options["attention_mask"] = mask[:, : padding + stop]
            first = start + padding if start else 0
            if self.counts_positions:
                options["position_ids"] = positions[:, first : padding + stop]
            read = self._run(input_ids=tokens[:, first : padding + stop], **options)
            new = stop - start
            if not agree(read.part(-new, None), self._whole.part(start, stop)):
                return False
            cache = read.output[self.name]
            start = stop
        return True


def _first_piece(time: int) -> int:
    return max(1, time // 2)
