"""/v1/explain: which passages spoke for each token of a text."""

import json
from collections.abc import Sequence
from functools import partial

from fastapi import FastAPI, Request, Response

from knnlm.apps.engine.turns import Turns
from knnlm.apps.server.http_errors import CLIENT_LEFT, ERROR_RESPONSES
from knnlm.apps.server.inbox import call_model, unless_left
from knnlm.apps.server.responses import token_explanation
from knnlm.apps.server.schema import ExplainRequest, ExplainResponse
from knnlm.apps.server.served_model import ServedModel
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import explain_tokens
from knnlm.knn_lm import KNNLM

_TOKENS_AT_ONCE = 256  # read and searched for in one turn, or one window


def add_to(app: FastAPI, model: ServedModel) -> None:
    """Add the route to an app."""

    @app.post(
        "/v1/explain",
        response_model=None,
        responses={200: {"model": ExplainResponse}, **ERROR_RESPONSES},
    )
    async def explain(body: ExplainRequest, request: Request) -> Response:
        model.check_name(body.model)
        overrides = model.reader.overrides(body)
        tokens = await unless_left(request, model.reader.text_to_explain(body))
        if tokens is None:
            return Response(status_code=CLIENT_LEFT)
        work = partial(_explain, body, tokens, model.reader.limits.max_answer_bytes)
        returned = await call_model(model.engine, request, work, overrides)
        if returned is None:
            return Response(status_code=CLIENT_LEFT)
        content = f'{{"model":{json.dumps(model.name)},"tokens":[{",".join(returned.value)}]}}'
        return Response(content, media_type="application/json")


def _explain(
    body: ExplainRequest, tokens: Sequence[int], most_bytes: int, model: KNNLM
) -> Turns[list[str]]:
    """Explain the request's text, a token in each turn; returns a `TokenExplanation` of each."""
    explanations = explain_tokens(
        model,
        tokens,
        sources=body.sources,
        before=body.before,
        after=body.after,
        tokens_at_once=_TOKENS_AT_ONCE,
        with_credits=False,
    )
    parts: list[str] = []
    size = 0
    for explanation in explanations:
        parts.append(token_explanation(explanation).model_dump_json())
        size += len(parts[-1].encode())
        if size > most_bytes:
            raise InvalidArgumentError(
                f"the answer must have at most {most_bytes} bytes on this server, and has more "
                f"after {len(parts)} of {len(tokens)} tokens: ask for a shorter text or fewer "
                "sources"
            )
        yield
    return parts
