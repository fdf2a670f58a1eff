"""The routes: /v1/completions, /v1/models, /v1/explain, /health, /metrics, and the explorer's."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from knnlm.apps.engine.engine import Engine, Facts
from knnlm.apps.engine.inbox import Inbox, ask_once, unless_left
from knnlm.apps.engine.jobs import Explained
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.explorer import routes as explorer
from knnlm.apps.server import http_errors as refusals
from knnlm.apps.server.http_errors import CLIENT_LEFT, RefusalError
from knnlm.apps.server.middleware import RequestGuard
from knnlm.apps.server.requests import RequestReader
from knnlm.apps.server.responses import Answer, Piece, explanation_info
from knnlm.apps.server.schema import (
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    ExplainRequest,
    ExplainResponse,
    Health,
    ModelInfo,
    ModelList,
)

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is refused."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, or is stopping."},
}
_JSON = "application/json"


def create_app(
    engine: Engine,
    facts: Facts,
    *,
    name: str,
    limits: Limits,
    metrics: Metrics,
    api_key: str | None = None,
) -> RequestGuard:
    """Return the ASGI app in front of a started engine; `name` is the model's for clients."""
    app = FastAPI(title="knnlm", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    refusals.install(app)
    reader = RequestReader(facts, limits)
    started = int(time.time())

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise RefusalError(
                404,
                f"there is no model {asked!r} here, but {name!r}",
                param="model",
                code="model_not_found",
            )

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={
            200: {"model": CompletionResponse, "content": {"text/event-stream": {}}},
            **_ERRORS,
        },
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        inbox = Inbox(engine)
        prompts = await run_in_threadpool(reader.encode, body.prompt)
        answer = Answer(name, body, prompts, inbox.next_event)
        inbox.submit(reader.completions(body, prompts, inbox.post))
        if not body.stream:
            whole = await unless_left(request, inbox, _cancelling(inbox, answer.whole()))
            if whole is None:
                return Response(status_code=CLIENT_LEFT)
            return Response(whole.model_dump_json(exclude_none=False), media_type=_JSON)
        pieces = answer.pieces()
        # what is refused or fails before the first piece has a status of its own
        first = await unless_left(request, inbox, _cancelling(inbox, anext(pieces)))
        if first is None:
            return Response(status_code=CLIENT_LEFT)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(answer, first, pieces, inbox, with_usage), media_type="text/event-stream"
        )

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> ModelList:
        return ModelList(data=[ModelInfo(id=name, created=started)])

    @app.get("/v1/models/{model}", responses=_ERRORS)
    async def one_model(model: str) -> ModelInfo:
        check_model(model)
        return ModelInfo(id=name, created=started)

    @app.post(
        "/v1/explain", response_model=None, responses={200: {"model": ExplainResponse}, **_ERRORS}
    )
    async def explain(body: ExplainRequest, request: Request) -> Response:
        check_model(body.model)
        inbox = Inbox(engine)
        job = await run_in_threadpool(reader.explanation, body, inbox.post)
        event = await ask_once(request, inbox, job)
        if event is None:
            return Response(status_code=CLIENT_LEFT)
        assert isinstance(event, Explained)
        tokens = [explanation_info(one) for one in event.explanations]
        return Response(
            ExplainResponse(model=name, tokens=tokens).model_dump_json(), media_type=_JSON
        )

    @app.get(
        "/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}}
    )
    async def health() -> Response:
        state = Health.model_validate(
            {"status": engine.status, "model": name, "entries": list(facts.entries)}
        )
        status = 200 if engine.status == "ok" else 503
        return Response(state.model_dump_json(), status, media_type=_JSON)

    @app.get(
        "/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}, **_ERRORS}
    )
    async def metrics_page() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    explorer.install(app, engine, name)
    return RequestGuard(
        app,
        limits=limits,
        metrics=metrics,
        api_key=api_key,
        routes=frozenset(route.path for route in app.routes if hasattr(route, "path")),
        is_stopping=lambda: engine.status == "stopping",
    )


async def _cancelling(inbox: Inbox, answer: Any) -> Any:
    """Free the places of the other jobs where one has failed."""
    try:
        return await answer
    except RefusalError:
        inbox.cancel()
        raise


async def _events(
    answer: Answer,
    first: Piece,
    pieces: AsyncIterator[Piece],
    inbox: Inbox,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Yield server-sent events; when the client leaves, the generator is closed."""
    try:
        yield _event(answer.chunk(first).model_dump_json())
        async for piece in pieces:
            yield _event(answer.chunk(piece).model_dump_json())
        if with_usage:
            yield _event(answer.last_chunk().model_dump_json())
        yield _event("[DONE]")
    except RefusalError as error:
        yield _event(error.body())
    finally:
        inbox.cancel()


def _event(data: str) -> str:
    return f"data: {data}\n\n"
