"""The model behind the routes."""

from dataclasses import dataclass

from knnlm.apps.engine.engine import Engine
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.server.http_errors import HTTPError
from knnlm.apps.server.requests import RequestReader


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that an app serves, and what its routes need to use it.

    name: its name for clients. created: when it was opened, in Unix seconds.
    """

    name: str
    created: int
    engine: Engine
    reader: RequestReader
    metrics: Metrics

    def check_name(self, asked: str | None) -> None:
        """Raise HTTPError 404 for a request that names another model."""
        if asked not in (None, self.name):
            raise HTTPError(
                404,
                f"there is no model {asked!r} here, but {self.name!r}",
                param="model",
                code="model_not_found",
            )
