"""Events of the model thread → OpenAI's chat completions, whole or as chunks."""

from collections.abc import Iterator, Sequence

from knnlm.apps.engine.jobs import Grown
from knnlm.apps.server.chat_schema import (
    ChatChunk,
    ChatLogProbs,
    ChatResponse,
)
from knnlm.apps.server.responses import ResponseBuilder
from knnlm.apps.server.schema import Usage


class ChatBuilder(ResponseBuilder):
    """Builds the response to a chat request."""

    prefix = "chatcmpl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._begun: set[int] = set()  # the choices whose role was sent

    def response(self, pieces: Sequence[Grown]) -> ChatResponse:
        """Return whole answers as a response."""
        choices = [
            {
                "index": piece.sample,
                "message": {"content": piece.text},
                "logprobs": self._log_probs(piece),
                "finish_reason": piece.finish_reason,
                "sources": self.sources(piece),
            }
            for piece in pieces
        ]
        return ChatResponse.model_validate(
            self._head() | {"choices": choices, "usage": self.usage()}
        )

    def chunks(self, piece: Grown) -> Iterator[ChatChunk]:
        """Return a piece of an answer as chunks of a stream: first its role, last its end."""
        if piece.sample not in self._begun:
            self._begun.add(piece.sample)
            yield self._chunk(piece.sample, delta={"role": "assistant", "content": ""})
        if piece.text or piece.tokens:
            yield self._chunk(
                piece.sample,
                delta={"content": piece.text},
                logprobs=self._log_probs(piece),
                sources=self.sources(piece),
            )
        if piece.finish_reason is not None:
            yield self._chunk(piece.sample, delta={}, finish_reason=piece.finish_reason)

    def usage_chunk(self) -> ChatChunk:
        """Return the last chunk of a stream, which counts the tokens."""
        return self._chunk(None, usage=self.usage())

    def _chunk(
        self, sample: int | None, *, usage: Usage | None = None, **choice: object
    ) -> ChatChunk:
        choices = [] if sample is None else [{"index": sample} | choice]
        return ChatChunk.model_validate(self._head() | {"choices": choices, "usage": usage})

    def _head(self) -> dict[str, object]:
        return {"id": self._id, "created": self._created, "model": self.model}

    def _log_probs(self, piece: Grown) -> ChatLogProbs | None:
        likeliest = self.request.likeliest
        if likeliest is None:
            return None
        content = [
            {
                "token": scored.text,
                "logprob": scored.log_prob,
                "bytes": list(scored.data),
                "top_logprobs": [
                    {"token": one.name, "logprob": one.log_prob, "bytes": list(one.data)}
                    for one in (scored.top or ())[:likeliest]
                ],
            }
            for scored in piece.tokens
        ]
        return ChatLogProbs.model_validate({"content": content})
