"""/v1/models: the one model that is served."""

from fastapi import FastAPI

from knnlm.apps.server.http_errors import ERROR_RESPONSES
from knnlm.apps.server.schema import ModelInfo, ModelList
from knnlm.apps.server.served_model import ServedModel


def add_to(app: FastAPI, served: ServedModel) -> None:
    """Add the routes to an app."""

    @app.get("/v1/models", responses=ERROR_RESPONSES)
    async def models() -> ModelList:
        return ModelList(data=[ModelInfo(id=served.name, created=served.created)])

    @app.get("/v1/models/{model}", responses=ERROR_RESPONSES)
    async def one_model(model: str) -> ModelInfo:
        served.check_name(model)
        return ModelInfo(id=served.name, created=served.created)
