"""How sure the language model is of the next token, and which tokens it favors."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.mixture.rows import join

LIKELIEST = 32
"""How many of the most probable tokens are named, if the vocabulary has so many."""

_ROWS = 16  # distributions summarized at once, so that they stay in the processor's cache
_BLOCKS = 64  # of a vocabulary, whose greatest values tell where the likeliest tokens are


class LMSummary(NamedTuple):
    """How sure the language model is, and which tokens it favors.

    entropy: of p_LM, in nats. tokens, log_probs: its most probable tokens, the likeliest first, and
    log p_LM of each.
    """

    entropy: Float[Tensor, " query"]
    tokens: Int[Tensor, "query likeliest"]
    log_probs: Float[Tensor, "query likeliest"]

    @property
    def token(self) -> Int[Tensor, " query"]:
        """The most probable token."""
        return self.tokens[:, 0]

    @property
    def log_prob(self) -> Float[Tensor, " query"]:
        """Log p_LM of the most probable token."""
        return self.log_probs[:, 0]

    def ranks_of(
        self, queries: Int[Tensor, "*#some"], tokens: Int[Tensor, "*#some"]
    ) -> Int[Tensor, "*#some"]:
        """Return the places of tokens among a query's likeliest, from 0; −1 for others.

        queries: the number of the query of each token, broadcast to their shape.
        """
        numbers = torch.arange(len(self.tokens), device=self.tokens.device)[:, None]
        # both numbers in one, so that a single sorted list is searched
        ordered, order = (self.tokens + (numbers << 32)).flatten().sort()
        wanted = tokens + (queries << 32)
        places = torch.searchsorted(ordered, wanted).clamp_max(len(ordered) - 1)
        ranks = order[places] % self.tokens.shape[1]
        return ranks.masked_fill(ordered[places] != wanted, -1)

    def log_probs_at(
        self, queries: Int[Tensor, "*#some"], ranks: Int[Tensor, "*#some"]
    ) -> Float[Tensor, "*#some"]:
        """Return log p_LM of tokens that `ranks_of` has found, −∞ for others."""
        return self.log_probs[queries, ranks.clamp_min(0)].masked_fill(ranks < 0, -torch.inf)


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
    tokens = _find_likeliest(log_probs)
    return LMSummary(entropy, tokens, log_probs.gather(1, tokens))


def _find_likeliest(log_probs: Float[Tensor, "query vocab"]) -> Int[Tensor, "query likeliest"]:
    """Return the most probable tokens; `topk` of a whole vocabulary takes several times as long."""
    queries, vocab = log_probs.shape
    count = min(LIKELIEST, vocab)
    width = -(-vocab // _BLOCKS)
    if width <= count or not log_probs.is_cpu:
        return log_probs.topk(count, dim=1).indices
    # block b has the tokens b, b + width, b + 2 width …; the last row may be shorter
    whole = vocab // width * width
    best = log_probs[:, :whole].reshape(queries, -1, width).amax(dim=1)
    rest = log_probs[:, whole:]
    best[:, : vocab - whole] = torch.maximum(best[:, : vocab - whole], rest)
    blocks = best.topk(count, dim=1).indices  # each of the likeliest is in one of these
    tokens = (blocks[:, :, None] + torch.arange(0, vocab, width)).flatten(1)
    beyond = tokens >= vocab
    found = log_probs.gather(1, tokens.masked_fill(beyond, 0)).masked_fill(beyond, -torch.inf)
    return tokens.gather(1, found.topk(count, dim=1).indices)
