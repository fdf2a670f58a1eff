"""/v1/completions: OpenAI's completions, whole or as a stream."""

from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from knnlm.apps.engine.jobs import Grown
from knnlm.apps.server.http_errors import CLIENT_LEFT, ERROR_RESPONSES, HTTPError
from knnlm.apps.server.inbox import Inbox, unless_left
from knnlm.apps.server.responses import ResponseBuilder
from knnlm.apps.server.schema import CompletionRequest, CompletionResponse
from knnlm.apps.server.served_model import ServedModel


def add_to(app: FastAPI, model: ServedModel) -> None:
    """Add the route to an app."""

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={
            200: {"model": CompletionResponse, "content": {"text/event-stream": {}}},
            **ERROR_RESPONSES,
        },
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model.check_name(body.model)
        prompts = await unless_left(request, model.reader.prompts(body))
        if prompts is None:
            return Response(status_code=CLIENT_LEFT)
        inbox = Inbox(model.engine)
        builder = ResponseBuilder(model.name, body, prompts, inbox.next_event)
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
        yield _event(builder.response([first]).model_dump_json())
        async for piece in pieces:
            yield _event(builder.response([piece]).model_dump_json())
        if with_usage:
            yield _event(builder.response([], builder.usage()).model_dump_json())
        yield _event("[DONE]")
    except HTTPError as error:
        yield _event(error.body())
    finally:
        inbox.cancel()


def _event(data: str) -> str:
    return f"data: {data}\n\n"
