"""Events of the model thread → OpenAI's responses, whole or piece by piece."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import BaseModel

from knnlm.apps.engine.jobs import Event, Failed, Grown, PromptRead, ScoredToken
from knnlm.apps.server.http_errors import job_error
from knnlm.apps.server.requests import EncodedPrompt, count_prompt_tokens
from knnlm.apps.server.schema import (
    LEAST_LOG_PROB,
    Choice,
    CompletionResponse,
    GenerationRequest,
    LogProbs,
    TokenExplanation,
    Usage,
)
from knnlm.evaluation.explanation import Explanation


@dataclass
class ResponseBuilder(ABC):
    """Builds the response to one request as the events of its jobs arrive.

    next_event: waits for an event, and for the number of the prompt that it belongs to.
    """

    model: str
    request: GenerationRequest
    prompts: Sequence[EncodedPrompt]
    next_event: Callable[[], Awaitable[tuple[int, Event]]]
    prefix: ClassVar[str]  # of the response's id

    def __post_init__(self) -> None:
        self._samples = self.request.samples
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._generated = 0

    @abstractmethod
    def response(self, pieces: Sequence[Grown]) -> BaseModel:
        """Return whole choices as a response."""

    @abstractmethod
    def chunks(self, piece: Grown) -> Iterable[BaseModel]:
        """Return a piece of a choice as chunks of a stream."""

    @abstractmethod
    def usage_chunk(self) -> BaseModel:
        """Return the last chunk of a stream, which counts the tokens."""

    async def pieces(self) -> AsyncIterator[Grown]:
        """Yield new text until every choice is finished, `sample` being the choice's number.

        Raises HTTPError.
        """
        unfinished = len(self.prompts) * self._samples
        while unfinished:
            number, event = await self.next_event()
            if isinstance(event, Failed):
                raise job_error(event)
            echoed = self.prompts[number].text if self.request.echoes else ""
            first = number * self._samples
            if isinstance(event, PromptRead) and self.request.echoes:
                for sample in range(self._samples):
                    yield Grown(first + sample, echoed, event.tokens, None)
            elif isinstance(event, Grown):
                self._generated += len(event.tokens)
                unfinished -= event.finish_reason is not None
                tokens = tuple(
                    replace(scored, offset=scored.offset + len(echoed)) for scored in event.tokens
                )
                yield replace(event, sample=first + event.sample, tokens=tokens)

    async def whole(self) -> BaseModel:
        """Return the response when it is complete."""
        parts: list[list[Grown]] = [[] for _ in range(len(self.prompts) * self._samples)]
        async for piece in self.pieces():
            parts[piece.sample].append(piece)
        joined = [
            Grown(
                index,
                "".join(piece.text for piece in pieces),
                tuple(scored for piece in pieces for scored in piece.tokens),
                pieces[-1].finish_reason,
                min(piece.coverage for piece in pieces),
            )
            for index, pieces in enumerate(parts)
        ]
        return self.response(joined)

    def usage(self) -> Usage:
        """Count the tokens so far."""
        sent = count_prompt_tokens(self.prompts)
        return Usage(
            prompt_tokens=sent,
            completion_tokens=self._generated,
            total_tokens=sent + self._generated,
        )

    def sources(self, piece: Grown) -> list[TokenExplanation] | None:
        """Return the explanations of a piece's tokens, if they were asked for."""
        if not self.request.sources:
            return None
        explanations = [scored.explanation for scored in piece.tokens if scored.explanation]
        return [token_explanation(explanation) for explanation in explanations]


class CompletionBuilder(ResponseBuilder):
    """Builds the response to a completion request."""

    prefix = "cmpl"

    def response(self, pieces: Sequence[Grown]) -> CompletionResponse:
        """Return whole choices as a response."""
        return self._response(pieces, self.usage())

    def chunks(self, piece: Grown) -> Iterable[CompletionResponse]:
        """Return a piece of a choice as a chunk of a stream."""
        yield self._response([piece], None)

    def usage_chunk(self) -> CompletionResponse:
        """Return the last chunk of a stream, which counts the tokens."""
        return self._response([], self.usage())

    def _response(self, pieces: Sequence[Grown], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            created=self._created,
            model=self.model,
            choices=[self._choice(piece) for piece in pieces],
            usage=usage,
        )

    def _choice(self, piece: Grown) -> Choice:
        return Choice.model_validate(
            {
                "index": piece.sample,
                "text": piece.text,
                "finish_reason": piece.finish_reason,
                "coverage": piece.coverage,
                "logprobs": None if self.request.likeliest is None else _log_probs(piece.tokens),
                "sources": self.sources(piece),
            }
        )


def _log_probs(tokens: Sequence[ScoredToken]) -> LogProbs:
    return LogProbs(
        tokens=[scored.text for scored in tokens],
        bytes=[list(scored.data) for scored in tokens],
        token_logprobs=[scored.log_prob for scored in tokens],
        top_logprobs=[_by_name(scored) for scored in tokens],
        text_offset=[scored.offset for scored in tokens],
    )


def _by_name(scored: ScoredToken) -> dict[str, float] | None:
    """Return the likeliest tokens by their names, `token_id:7` where a likelier one has it too."""
    if scored.top is None:
        return None
    named: dict[str, float] = {}
    for likely in scored.top:
        name = f"token_id:{likely.token}" if likely.name in named else likely.name
        named[name] = likely.log_prob
    return named


def token_explanation(explanation: Explanation) -> TokenExplanation:
    """Return an explanation as clients see it."""
    lm_log_prob = max(explanation.lm_log_prob, LEAST_LOG_PROB)
    log_prob = max(explanation.log_prob, LEAST_LOG_PROB)
    return TokenExplanation(
        token=explanation.token,
        text=explanation.text,
        lm_log_prob=lm_log_prob,
        knn_prob=explanation.knn_prob,
        log_prob=log_prob,
        gain=log_prob - lm_log_prob,
        sources=list(explanation.sources),
    )
