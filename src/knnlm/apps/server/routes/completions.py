"""/v1/completions and /v1/chat/completions: OpenAI's, whole or as a stream."""

from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from knnlm.apps.engine.jobs import Grown
from knnlm.apps.server.chat_responses import ChatBuilder
from knnlm.apps.server.chat_schema import ChatRequest, ChatResponse
from knnlm.apps.server.http_errors import CLIENT_LEFT, ERROR_RESPONSES, HTTPError
from knnlm.apps.server.inbox import Inbox, unless_left
from knnlm.apps.server.requests import EncodedPrompt
from knnlm.apps.server.responses import CompletionBuilder, ResponseBuilder
from knnlm.apps.server.schema import CompletionRequest, CompletionResponse, GenerationRequest
from knnlm.apps.server.served_model import ServedModel


def add_to(app: FastAPI, model: ServedModel) -> None:
    """Add the routes to an app."""

    @app.post(
        "/v1/completions",
        response_model=None,
        responses=_responses(CompletionResponse),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model.check_name(body.model)
        prompts = model.reader.prompts(body)
        return await _respond(model, body, prompts, request, CompletionBuilder)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses=_responses(ChatResponse),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model.check_name(body.model)
        prompts = model.reader.conversation(body)
        return await _respond(model, body, prompts, request, ChatBuilder)


def _responses(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route, for the API's description."""
    return {200: {"model": whole, "content": {"text/event-stream": {}}}, **ERROR_RESPONSES}


async def _respond(
    model: ServedModel,
    body: GenerationRequest,
    encoding: Coroutine[Any, Any, Sequence[EncodedPrompt]],
    request: Request,
    builder_type: type[ResponseBuilder],
) -> Response:
    """Answer a request, whose prompts are still to be encoded."""
    prompts = await unless_left(request, encoding)
    if prompts is None:
        return Response(status_code=CLIENT_LEFT)
    inbox = Inbox(model.engine)
    builder = builder_type(model.name, body, prompts, inbox.next_event)
    inbox.submit(model.reader.completions(body, prompts, inbox.post))
    if not body.stream:
        whole = await unless_left(request, builder.whole(), inbox)
        if whole is None:
            return Response(status_code=CLIENT_LEFT)
        content = whole.model_dump_json(exclude_none=False)
        return Response(content, media_type="application/json")
    pieces = builder.pieces()
    # an error before the first piece still has an HTTP status of its own
    first = await unless_left(request, anext(pieces), inbox)
    if first is None:
        return Response(status_code=CLIENT_LEFT)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamingResponse(
        _events(builder, first, pieces, inbox, with_usage), media_type="text/event-stream"
    )


async def _events(
    builder: ResponseBuilder,
    first: Grown,
    pieces: AsyncIterator[Grown],
    inbox: Inbox,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Yield server-sent events; when the client leaves, the generator is closed."""
    try:
        for chunk in builder.chunks(first):
            yield _event(chunk.model_dump_json())
        async for piece in pieces:
            for chunk in builder.chunks(piece):
                yield _event(chunk.model_dump_json())
        if with_usage:
            yield _event(builder.usage_chunk().model_dump_json())
        yield _event("[DONE]")
    except HTTPError as error:
        yield _event(error.body())
    finally:
        inbox.cancel()


def _event(data: str) -> str:
    return f"data: {data}\n\n"
