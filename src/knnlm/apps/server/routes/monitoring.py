"""/health and /metrics: the state of the server, for those who run it."""

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from knnlm.apps.server.http_errors import ERROR_RESPONSES
from knnlm.apps.server.inbox import newest_facts
from knnlm.apps.server.schema import Health
from knnlm.apps.server.served_model import ServedModel

_LOOK_SECONDS = 1.0  # for the newest state of the datastores


def add_to(app: FastAPI, model: ServedModel) -> None:
    """Add the routes to an app."""

    @app.get(
        "/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}}
    )
    async def health() -> Response:
        facts = await newest_facts(model.engine, _LOOK_SECONDS)
        status = model.engine.status
        state = Health(status=status, model=model.name, entries=list(facts.entries))
        code = 200 if status in ("ok", "degraded") else 503
        return Response(state.model_dump_json(), code, media_type="application/json")

    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)

    @app.get(
        "/metrics",
        response_model=None,
        responses={200: {"content": {"text/plain": {}}}, **ERROR_RESPONSES},
    )
    async def metrics_page() -> Response:
        return Response(model.metrics.render(), media_type=CONTENT_TYPE_LATEST)
