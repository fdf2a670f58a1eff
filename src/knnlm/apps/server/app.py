"""The ASGI app: every route, the error handlers, and the request guard in front of them."""

import time
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from knnlm.apps.engine.engine import Engine, ModelFacts
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.server import http_errors
from knnlm.apps.server.middleware import RequestGuard
from knnlm.apps.server.requests import RequestReader
from knnlm.apps.server.routes import completions, explain, explorer, models, monitoring
from knnlm.apps.server.served_model import ServedModel


def create_app(
    engine: Engine,
    facts: ModelFacts,
    *,
    name: str,
    limits: Limits,
    metrics: Metrics,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
) -> ASGIApp:
    """Return the ASGI app in front of a started engine; `name` is the model's for clients.

    cors_origins: of the web pages from elsewhere that may use it; "*" for all.
    """
    app = FastAPI(title="knnlm", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    http_errors.add_to(app)
    model = ServedModel(
        name=name,
        created=int(time.time()),
        engine=engine,
        reader=RequestReader(facts, limits),
        metrics=metrics,
    )
    for added in (completions, models, explain, monitoring, explorer):
        added.add_to(app, model)
    routes = [route for route in app.routes if isinstance(route, Route)]
    guard = RequestGuard(
        app=app,
        limits=limits,
        metrics=metrics,
        api_key=api_key,
        paths=frozenset(route.path for route in routes),
        json_paths=frozenset(route.path for route in routes if "POST" in (route.methods or ())),
        is_stopping=lambda: engine.status == "stopping",
    )
    if not cors_origins:
        return guard
    # in front of the guard: a browser asks without a key, and shows refusals to those it trusts
    return CORSMiddleware(
        guard, cors_origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",)
    )
