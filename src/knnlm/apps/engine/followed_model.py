"""The kNN-LM that the next request sees: the newest state of its datastores that could be opened.

Knows no job and no thread.
"""

import logging

from knnlm.apps.engine.metrics import Metrics
from knnlm.knn_lm import KNNLM

_LOG = logging.getLogger(__name__)


class FollowedModel:
    """Follows what others commit to a kNN-LM's datastores.

    A state is followed when all of it could be opened, else the last one goes on serving; nothing
    that holds an older model is changed.
    """

    def __init__(self, model: KNNLM, metrics: Metrics) -> None:
        self.newest = model
        self._metrics = metrics
        self.problem: str | None = None
        """Why there is a newer state that could not be opened, at the last attempt."""

    def follow(self) -> KNNLM:
        """Return the newest model; costs two short queries where nothing was committed."""
        try:
            self.newest = self.newest.reopened()
        except Exception as error:
            self._metrics.reopening_failures.inc()
            if str(error) != self.problem:  # it is tried again at every request, and said once
                _LOG.error(
                    "a datastore has changed and cannot be opened; requests still get its last "
                    "state: %r",
                    error,
                    exc_info=error,
                )
            self.problem = str(error)
        else:
            if self.problem is not None:
                _LOG.warning("the datastores can be opened again")
            self.problem = None
        return self.newest
