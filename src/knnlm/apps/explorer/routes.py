"""The explorer's routes, in the server's app: the page, and what it asks for."""

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from knnlm.apps.engine.engine import Engine
from knnlm.apps.engine.inbox import Inbox, ask_once
from knnlm.apps.engine.jobs import Answered, Query
from knnlm.apps.engine.steps import Overrides
from knnlm.apps.explorer import page
from knnlm.apps.explorer.analysis import analyze, describe_stores, read_passages
from knnlm.apps.server.http_errors import CLIENT_LEFT
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM

MOST_TOKENS = 8192
"""Of a text to analyze: the model thread does nothing else meanwhile."""
_MOST_ROWS = 4096
_KINDS = {"css": "text/css", "js": "text/javascript"}
_Row = Annotated[int, Field(ge=0, lt=1 << 63)]


class AnalysisRequest(BaseModel):
    """A text, and the tokens that the model wrote after it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[str, Field(max_length=1 << 18)]
    generated: Annotated[list[_Row], Field(max_length=MOST_TOKENS, fail_fast=True)] = []


class PassagesRequest(BaseModel):
    """Rows whose passages are wanted, of each datastore; numbering: see `Datastore`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    numbering: list[int]
    rows: list[Annotated[list[_Row], Field(max_length=_MOST_ROWS, fail_fast=True)]]


def install(app: FastAPI, engine: Engine, name: str) -> None:
    """Add the explorer of the model that clients call `name`."""

    async def ask(request: Request, question: Callable[[KNNLM], Any]) -> Response:
        inbox = Inbox(engine)
        event = await ask_once(request, inbox, Query(partial(inbox.post, 0), Overrides(), question))
        if event is None:
            return Response(status_code=CLIENT_LEFT)
        assert isinstance(event, Answered)
        content = await run_in_threadpool(json.dumps, event.value, allow_nan=False)
        return Response(content, media_type="application/json")

    @app.get(page.PAGE, include_in_schema=False)
    async def whole_page() -> Response:
        headers = {"Content-Security-Policy": page.POLICY, "Referrer-Policy": "no-referrer"}
        return Response(page.served_page(), headers=headers, media_type="text/html")

    for asset in (*page.STYLES, *page.SCRIPTS):

        async def part(asset: str = asset) -> Response:
            kind = _KINDS[asset.rpartition(".")[2]]
            headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
            return Response(page.read_asset(asset), headers=headers, media_type=kind)

        app.add_api_route(f"{page.PAGE}/{asset}", part, include_in_schema=False)

    @app.post(page.ANALYSIS, include_in_schema=False)
    async def analysis(body: AnalysisRequest, request: Request) -> Response:
        return await ask(request, partial(_analyze, body))

    @app.post(page.PASSAGES, include_in_schema=False)
    async def passages(body: PassagesRequest, request: Request) -> Response:
        return await ask(request, partial(_read_passages, body))

    @app.get(page.DATASTORES, include_in_schema=False)
    async def datastores(request: Request) -> Response:
        return await ask(
            request, lambda model: {"name": name, "datastores": describe_stores(model.retrievers)}
        )


def _analyze(body: AnalysisRequest, model: KNNLM) -> dict[str, Any]:
    largest = max(body.generated, default=0)
    if largest >= model.lm.vocab_size:
        raise InvalidArgumentError(
            f"generated must be token ids below {model.lm.vocab_size}, got {largest}"
        )
    return analyze(model, body.text, body.generated, MOST_TOKENS).to_dict()


def _read_passages(body: PassagesRequest, model: KNNLM) -> list[dict[str, dict[str, str]]]:
    numbering = [retriever.store.numbering for retriever in model.retrievers]
    if body.numbering != numbering:
        raise InvalidArgumentError(
            "a datastore was compacted since the text was explained, which renumbers its entries: "
            "explain it again"
        )
    if len(body.rows) != len(model.retrievers):
        raise InvalidArgumentError(
            f"rows must be of each of the {len(model.retrievers)} datastores, got {len(body.rows)}"
        )
    return read_passages(model.lm, model.retrievers, body.rows)
