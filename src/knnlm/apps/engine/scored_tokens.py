"""What is reported of a token: log-probabilities and, once it is certain, its text.

Knows jobs and texts; knows no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from knnlm.apps.engine.jobs import LikelyToken, ScoredToken
from knnlm.apps.engine.text_stream import TextStream
from knnlm.model.token_text import TokenTexts


def score_token(
    texts: TokenTexts,
    token: int,
    before: Sequence[int],
    log_probs: Float[Tensor, " vocab"],
    likeliest: int | None,
) -> ScoredToken:
    """Return a token that follows others, without its text.

    likeliest: how many of the likeliest tokens to name; None for none, not even this one.
    """
    log_prob = float(log_probs[token])
    if likeliest is None:
        return ScoredToken(token, log_prob=log_prob)
    best = log_probs.topk(likeliest)
    values = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    values.setdefault(token, log_prob)
    top = tuple(
        LikelyToken(other, name, texts.bytes_of(other), values[other])
        for other, name in zip(values, texts.names(values, before), strict=True)
    )
    return ScoredToken(token, log_prob=log_prob, top=top)


def with_texts(
    tokens: Sequence[ScoredToken], texts: TokenTexts, stream: TextStream, first: int = 0
) -> Iterator[ScoredToken]:
    """Yield those tokens whose text is certain, with it.

    tokens: of the stream, from its token number `first` on.
    """
    pieces, offsets = stream.pieces[first:], stream.offsets[first:]
    for scored, piece, offset in zip(tokens, pieces, offsets, strict=False):
        text = piece[: max(len(stream.text) - offset, 0)] if stream.stopped else piece
        explanation = scored.explanation
        if explanation is not None:
            explanation = replace(explanation, text=text, name=texts.name(scored.token, piece))
        data = texts.bytes_of(scored.token, text)
        yield replace(scored, text=text, data=data, offset=offset, explanation=explanation)
