"""transformers' `generate`, which takes from the model's generation config nothing but its tokens.

Knows transformers; knows no datastore: whatever changes the model's logits is attached to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from knnlm.model.language_model import LanguageModel


def generate_tokens(
    lm: LanguageModel, prompt: Sequence[int], seed: int | None, **options: Any
) -> tuple[list[int], bool]:
    """Return the tokens that follow a prompt, and whether the last of them ends the text.

    options: those of transformers' `generate`, with its defaults; but decoding is greedy, and
    `lm.end_tokens` end the text. seed: makes sampling repeatable and leaves torch's own random
    numbers alone.
    """
    options.setdefault("do_sample", False)
    tokens = torch.tensor([prompt], device=lm.device)
    devices = [lm.device] if lm.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices, enabled=seed is not None),
        _own_settings_aside(lm) as settings,
    ):
        if seed is not None:
            torch.manual_seed(seed)
        output = lm.model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), **options
        )
    new: list[int] = output[0, len(prompt) :].tolist()
    given = options.get("generation_config") or settings
    ends = options.get("eos_token_id", given.eos_token_id)
    if ends is None and "eos_token_id" not in options:
        ends = settings.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    return new, bool(new) and new[-1] in ends


@contextmanager
def _own_settings_aside(lm: LanguageModel) -> Iterator[GenerationConfig]:
    """Put plain settings in the place of the model's: penalties and bans are not its likeliest.

    The model is in evaluation mode meanwhile.
    """
    model = lm.model
    own, training = model.generation_config, model.training
    padding = lm.tokenizer.pad_token_id
    plain = GenerationConfig(
        eos_token_id=sorted(lm.end_tokens) or None,
        pad_token_id=lm.start_token if padding is None else padding,
    )
    model.eval()
    model.generation_config = plain
    try:
        yield plain
    finally:
        model.generation_config = own
        model.train(training)
