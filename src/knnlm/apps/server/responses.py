"""Events of the model thread → OpenAI's responses, whole or piece by piece."""

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from knnlm.apps.engine.jobs import Event, Failed, Grown, PromptRead, ScoredToken
from knnlm.apps.server.http_errors import job_error
from knnlm.apps.server.requests import EncodedPrompt, count_prompt_tokens
from knnlm.apps.server.schema import (
    Choice,
    CompletionRequest,
    CompletionResponse,
    LogProbs,
    TokenExplanation,
    Usage,
)
from knnlm.evaluation.explanation import Explanation

_LEAST_LOG_PROB = -9999.0  # JSON has no −inf


@dataclass(frozen=True, slots=True)
class Piece:
    """New text and tokens of one choice."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...]
    finish_reason: str | None = None


class ResponseBuilder:
    """Builds the response to one request as the events of its jobs arrive.

    next_event: waits for an event, and for the number of the prompt that it belongs to.
    """

    def __init__(
        self,
        model: str,
        request: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        next_event: Callable[[], Awaitable[tuple[int, Event]]],
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._next_event = next_event
        self._samples = request.n or 1
        self._model = model
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._generated = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield new pieces until every choice is finished; raises HTTPError."""
        unfinished = len(self._prompts) * self._samples
        while unfinished:
            number, event = await self._next_event()
            if isinstance(event, Failed):
                raise job_error(event)
            if isinstance(event, PromptRead) and self._request.echo:
                for sample in range(self._samples):
                    index = number * self._samples + sample
                    yield Piece(index, self._prompts[number].text, event.tokens)
            elif isinstance(event, Grown):
                self._generated += len(event.tokens)
                unfinished -= event.finish_reason is not None
                before = len(self._prompts[number].text) if self._request.echo else 0
                tokens = tuple(
                    replace(scored, offset=scored.offset + before) for scored in event.tokens
                )
                index = number * self._samples + event.sample
                yield Piece(index, event.text, tokens, event.finish_reason)

    async def whole(self) -> CompletionResponse:
        """Return the response when it is complete."""
        pieces: list[list[Piece]] = [[] for _ in range(len(self._prompts) * self._samples)]
        async for piece in self.pieces():
            pieces[piece.index].append(piece)
        joined = [
            Piece(
                index,
                "".join(piece.text for piece in parts),
                tuple(scored for piece in parts for scored in piece.tokens),
                parts[-1].finish_reason,
            )
            for index, parts in enumerate(pieces)
        ]
        return self._response([self._choice(piece) for piece in joined], self.usage())

    def chunk(self, piece: Piece) -> CompletionResponse:
        """Return one piece as a chunk of a stream."""
        return self._response([self._choice(piece)], None)

    def last_chunk(self) -> CompletionResponse:
        """Return the last chunk of a stream, which counts the tokens."""
        return self._response([], self.usage())

    def usage(self) -> Usage:
        """Count the tokens so far."""
        sent = count_prompt_tokens(self._prompts)
        return Usage(
            prompt_tokens=sent,
            completion_tokens=self._generated,
            total_tokens=sent + self._generated,
        )

    def _response(self, choices: list[Choice], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _choice(self, piece: Piece) -> Choice:
        request = self._request
        explanations = [scored.explanation for scored in piece.tokens if scored.explanation]
        return Choice.model_validate(
            {
                "index": piece.index,
                "text": piece.text,
                "finish_reason": piece.finish_reason,
                "logprobs": None if request.logprobs is None else _log_probs(piece.tokens),
                "sources": [token_explanation(explanation) for explanation in explanations]
                if request.sources
                else None,
            }
        )


def _log_probs(tokens: Sequence[ScoredToken]) -> LogProbs:
    return LogProbs(
        tokens=[scored.text for scored in tokens],
        token_logprobs=[
            None if scored.log_prob is None else _finite(scored.log_prob) for scored in tokens
        ],
        top_logprobs=[
            None
            if scored.top is None
            else {text: _finite(log_prob) for text, log_prob in scored.top.items()}
            for scored in tokens
        ],
        text_offset=[scored.offset for scored in tokens],
    )


def token_explanation(explanation: Explanation) -> TokenExplanation:
    """Return an explanation as clients see it."""
    lm_log_prob, log_prob = _finite(explanation.lm_log_prob), _finite(explanation.log_prob)
    return TokenExplanation(
        token=explanation.token,
        text=explanation.text,
        lm_log_prob=lm_log_prob,
        knn_prob=explanation.knn_prob,
        log_prob=log_prob,
        gain=log_prob - lm_log_prob,
        sources=list(explanation.sources),
    )


def _finite(log_prob: float) -> float:
    return max(log_prob, _LEAST_LOG_PROB)
