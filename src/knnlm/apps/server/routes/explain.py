"""/v1/explain: which passages spoke for each token of a text."""

from functools import partial

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from knnlm.apps.server.http_errors import CLIENT_LEFT, ERROR_RESPONSES
from knnlm.apps.server.inbox import call_model
from knnlm.apps.server.responses import token_explanation
from knnlm.apps.server.schema import ExplainRequest, ExplainResponse
from knnlm.apps.server.served_model import ServedModel
from knnlm.evaluation.explanation import Explanation
from knnlm.knn_lm import KNNLM


def add_to(app: FastAPI, model: ServedModel) -> None:
    """Add the route to an app."""

    @app.post(
        "/v1/explain",
        response_model=None,
        responses={200: {"model": ExplainResponse}, **ERROR_RESPONSES},
    )
    async def explain(body: ExplainRequest, request: Request) -> Response:
        model.check_name(body.model)
        await run_in_threadpool(model.reader.check_length, body.text)
        overrides = model.reader.overrides(body)
        returned = await call_model(model.engine, request, partial(_explain, body), overrides)
        if returned is None:
            return Response(status_code=CLIENT_LEFT)
        tokens = [token_explanation(explanation) for explanation in returned.value]
        content = ExplainResponse(model=model.name, tokens=tokens).model_dump_json()
        return Response(content, media_type="application/json")


def _explain(body: ExplainRequest, model: KNNLM) -> list[Explanation]:
    """Explain the request's text; called in the model thread."""
    return model.explain(body.text, sources=body.sources, before=body.before, after=body.after)
