"""How sure the language model is of the next token: its whole distribution in three numbers."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.mixture.rows import join

_ROWS = 16  # distributions summarized at once, so that they stay in the processor's cache


class LMSummary(NamedTuple):
    """How sure the language model is, and which token it favors.

    entropy: of p_LM, in nats. token, log_prob: its most probable token, and log p_LM of that.
    """

    entropy: Float[Tensor, " query"]
    log_prob: Float[Tensor, " query"]
    token: Int[Tensor, " query"]


def summarize_lm(log_probs: Float[Tensor, "query vocab"]) -> LMSummary:
    """Summarize log p_LM of the whole vocabulary."""
    space = torch.empty_like(log_probs[:_ROWS])  # used again: new memory costs more than the sums
    parts = [_summarize(rows, space[: len(rows)]) for rows in log_probs.split(_ROWS)]  # type: ignore[no-untyped-call]
    return parts[0] if len(parts) == 1 else join(parts)


def _summarize(log_probs: Float[Tensor, "query vocab"], space: Tensor) -> LMSummary:
    probs = torch.exp(log_probs, out=space)
    entropy = -torch.linalg.vecdot(probs, log_probs)
    if bool(entropy.isnan().any()):  # a token of probability 0 adds nothing
        entropy = -(probs * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(dim=1)
    if log_probs.is_cpu:  # where torch's argmax takes as long as the softmax
        token = torch.from_numpy(log_probs.numpy().argmax(axis=1))
    else:
        token = log_probs.argmax(dim=1)
    return LMSummary(entropy, log_probs.gather(1, token[:, None])[:, 0], token)
