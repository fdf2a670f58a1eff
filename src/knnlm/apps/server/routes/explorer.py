"""/explorer: the page that shows why, and the data that it asks for."""

import json
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from knnlm.apps.engine.turns import Turns
from knnlm.apps.explorer import page
from knnlm.apps.explorer.analysis import (
    analyze_in_turns,
    answer_bytes,
    read_passages_in_turns,
    stores_to_dicts,
)
from knnlm.apps.server.http_errors import CLIENT_LEFT, HTTPError
from knnlm.apps.server.inbox import call_model, unless_left
from knnlm.apps.server.served_model import ServedModel
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM

_MAX_TOKENS = 8192  # in a text to analyze
_MAX_BYTES = 1 << 26  # of its analysis
_MAX_ROWS = 4096
_TOKENS_AT_ONCE = 256  # read and searched for in one turn, or one window
_MEDIA_TYPES = {"css": "text/css", "js": "text/javascript"}
_Natural = Annotated[int, Field(ge=0, lt=1 << 63)]


class AnalysisRequest(BaseModel):
    """A text, and the tokens that the model generated after it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[str, Field(max_length=1 << 18)]
    generated: Annotated[list[_Natural], Field(max_length=_MAX_TOKENS, fail_fast=True)] = []


class PassagesRequest(BaseModel):
    """The rows, in each datastore, whose passages are wanted; numbering: see `Datastore`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    numbering: list[int]
    rows: list[Annotated[list[_Natural], Field(max_length=_MAX_ROWS, fail_fast=True)]]


def add_to(app: FastAPI, model: ServedModel) -> None:
    """Add the routes to an app."""
    _add_page(app)

    async def respond(request: Request, function: Callable[[KNNLM], Turns[Any]]) -> Response:
        returned = await call_model(model.engine, request, function)
        if returned is None:
            return Response(status_code=CLIENT_LEFT)
        content = await run_in_threadpool(json.dumps, returned.value, allow_nan=False)
        return Response(content, media_type="application/json")

    @app.post(page.ANALYSIS, include_in_schema=False)
    async def analysis(body: AnalysisRequest, request: Request) -> Response:
        encoded = model.reader.encode(body.text, _MAX_TOKENS)
        tokens = await unless_left(request, _checked(encoded, body.generated))
        if tokens is None:
            return Response(status_code=CLIENT_LEFT)
        return await respond(request, partial(_analyze, tokens, body.generated))

    @app.post(page.PASSAGES, include_in_schema=False)
    async def passages(body: PassagesRequest, request: Request) -> Response:
        return await respond(request, partial(_read_passages, body))

    @app.get(page.DATASTORES, include_in_schema=False)
    async def datastores(request: Request) -> Response:
        return await respond(request, partial(_describe, model.name))


def _add_page(app: FastAPI) -> None:
    @app.get(page.PAGE, include_in_schema=False)
    async def whole_page() -> Response:
        headers = {"Content-Security-Policy": page.POLICY, "Referrer-Policy": "no-referrer"}
        return Response(page.served_page(), headers=headers, media_type="text/html")

    for name in (*page.STYLES, *page.SCRIPTS):

        async def asset(name: str = name) -> Response:
            media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
            headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
            return Response(page.read_asset(name), headers=headers, media_type=media_type)

        app.add_api_route(f"{page.PAGE}/{name}", asset, include_in_schema=False)


async def _checked(
    encoded: Coroutine[Any, Any, list[int] | None], generated: Sequence[int]
) -> list[int]:
    """Return the tokens of a text to analyze; raises HTTPError if there are too many."""
    tokens = await encoded
    if tokens is None or len(tokens) + len(generated) > _MAX_TOKENS:
        got = "more" if tokens is None else len(tokens) + len(generated)
        raise HTTPError(
            400, f"text must have at most {_MAX_TOKENS} tokens here, got {got}: take a part"
        )
    return tokens


def _analyze(
    tokens: Sequence[int], generated: Sequence[int], model: KNNLM
) -> Turns[dict[str, Any]]:
    largest = max(generated, default=0)
    if largest >= model.lm.vocab_size:
        raise InvalidArgumentError(
            f"generated must be token ids below {model.lm.vocab_size}, got {largest}"
        )
    size = answer_bytes(model, len(tokens) + len(generated))
    if size > _MAX_BYTES:
        raise InvalidArgumentError(
            f"the analysis must have at most {_MAX_BYTES} bytes, and would have about {size}: "
            "take a part of the text"
        )
    analysis = yield from analyze_in_turns(model, tokens, generated, _TOKENS_AT_ONCE)
    return (yield from analysis.to_dict_in_turns())


def _describe(name: str, model: KNNLM) -> Turns[dict[str, Any]]:
    yield
    return {"name": name, "datastores": stores_to_dicts(model.retrievers)}


def _read_passages(body: PassagesRequest, model: KNNLM) -> Turns[list[dict[str, dict[str, str]]]]:
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
    return (yield from read_passages_in_turns(model.lm, model.retrievers, body.rows))
