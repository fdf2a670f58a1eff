"""The model thread: the one owner of model, indexes and datastores, fed through a queue.

Knows threads and jobs; knows no protocol, and not what the worker does with a job.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from knnlm.apps.engine.admission import admit
from knnlm.apps.engine.jobs import Failed, Job, Lane
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.worker import Worker
from knnlm.knn_lm import KNNLM
from knnlm.mixture.parameters import Parameters
from knnlm.model.encoding import Encoder

_LOG = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """The queue has no place left."""


class UnavailableError(RuntimeError):
    """No jobs are accepted: the server is stopping, or its model thread has died."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What other threads may know about the model, which they may not use.

    encoder: the model's own; other threads use a copy of it. control_tokens: see `Windowing`, for
    all texts. max_window: the most positions for
    a prompt and its completion together; None for no limit. entries, parameters: of each datastore,
    in the state that the next request sees. weights: see `Mixer.weights`.
    """

    encoder: Encoder
    control_tokens: bool
    vocab_size: int
    start_token: int
    max_window: int | None
    entries: tuple[int, ...]
    parameters: tuple[Parameters, ...]
    weights: str


class Engine:
    """A thread that opens a kNN-LM and runs jobs on it.

    open_model: called in the thread, which alone uses the model that it returns. drafts: see
    `Worker`.
    """

    def __init__(
        self,
        open_model: Callable[[], KNNLM],
        limits: Limits,
        metrics: Metrics,
        *,
        drafts: bool = True,
    ) -> None:
        self._open_model = open_model
        self._limits = limits
        self._metrics = metrics
        self._drafts = drafts
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._is_draining = self._is_closing = False
        self._lookers: list[Callable[[], None]] = []
        self._problem: str | None = None
        self._failure: Exception | None = None
        self._facts: ModelFacts | None = None
        self._published: KNNLM | None = None  # the model of the facts
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="knnlm-model", daemon=True)

    def start(self) -> ModelFacts:
        """Start the thread and wait for the model; raises the error of `open_model`."""
        self._thread.start()
        self._opened.wait()
        if self._facts is None:
            assert self._failure is not None
            raise self._failure
        return self._facts

    @property
    def status(self) -> Literal["ok", "degraded", "stopping", "dead"]:
        """Return ok, stopping, or dead if the thread has failed.

        Degraded: a datastore has changed and cannot be opened; its last state goes on serving.
        """
        if self._failure is not None:
            return "dead"
        if self._is_draining:
            return "stopping"
        return "ok" if self._problem is None else "degraded"

    @property
    def is_running(self) -> bool:
        """Whether the thread has been started and has not ended."""
        return self._thread.is_alive()

    @property
    def facts(self) -> ModelFacts:
        """What was true when the thread last looked for changes of the datastores."""
        assert self._facts is not None
        return self._facts

    def look(self, done: Callable[[], None]) -> None:
        """Have the thread look for changes of the datastores, as it does for every request.

        done: called when `facts` and `status` are what the next request will see, or at the end.
        """
        with self._changed:
            is_over = self._is_closing or self._failure is not None
            if not is_over:
                self._lookers.append(done)
                self._changed.notify()
        if is_over:
            done()

    @property
    def is_idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none; of several, none counts as short.

        Raises QueueFullError and UnavailableError.
        """
        for job in jobs if len(jobs) > 1 else ():
            job.lane = Lane.long
        with self._changed:
            if self._failure is not None:
                raise UnavailableError("the server's model thread has died; restart the server")
            if self._is_draining:
                raise UnavailableError("the server is stopping")
            waiting = sum(job.places for job in self._waiting if not job.cancelled)
            asked = sum(job.places for job in jobs)
            if waiting + asked > self._limits.max_queue:
                raise QueueFullError(
                    f"{waiting} completions are waiting, of at most {self._limits.max_queue}: "
                    "try again in a moment"
                )
            self._waiting.extend(jobs)
            self._metrics.waiting.set(waiting + asked)
            self._changed.notify()

    def wake(self) -> None:
        """Let the thread notice that jobs were cancelled."""
        with self._changed:
            self._changed.notify()

    def drain(self) -> None:
        """Accept no more jobs; those that wait or run go on."""
        self._is_draining = True  # no lock: may be called from a signal handler

    def close(self, timeout: float = 30.0) -> None:
        """Fail the jobs that are left, and end the thread."""
        self.drain()
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            model = self._open_model()
            worker = Worker(model, self._metrics, self._drafts)
            del model  # of older states of its datastores nothing is to be kept
            self._follow(worker)
        except Exception as error:
            self._failure = error
            return
        finally:
            self._opened.set()
        try:
            while self._take(worker):
                self._follow(worker)
                worker.turn()
                with self._changed:
                    self._running = worker.jobs
                self._metrics.running.set(worker.places)
        except Exception as error:
            _LOG.critical("the model thread died: %r", error, exc_info=error)
            self._failure = error
        finally:
            worker.close()
            self._abandon(worker)

    def _take(self, worker: Worker) -> bool:
        """Wait for jobs and begin those that have a place; return False at the end."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if self._is_closing:
                    return False
                if self._waiting or worker.jobs or self._lookers:
                    break
                self._metrics.waiting.set(0)
                self._changed.wait()
            begun = admit(self._waiting, worker.load, self._limits)
            self._running = worker.jobs.union(begun)
            self._metrics.waiting.set(sum(job.places for job in self._waiting))
        for job in begun:
            worker.begin(job)
        return True

    def _follow(self, worker: Worker) -> None:
        """Publish what the next request will see; looks for changes if someone asks."""
        with self._changed:
            lookers, self._lookers = self._lookers, []
        if lookers:
            worker.followed.follow()
        self._problem = worker.followed.problem
        if worker.followed.newest is not self._published:
            self._published = worker.followed.newest
            self._facts = _facts(self._published)
        for done in lookers:
            done()

    def _abandon(self, worker: Worker) -> None:
        """Fail every job that waits or runs."""
        message = "the server is stopping" if self._failure is None else "the server failed"
        with self._changed:
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running = set()
            lookers, self._lookers = self._lookers, []
        for done in lookers:
            done()
        for job in left:
            if not job.cancelled:
                job.cancel()
                job.post(Failed(message, unavailable=self._failure is None))
        self._metrics.waiting.set(0)
        self._metrics.running.set(0)


def _facts(model: KNNLM) -> ModelFacts:
    return ModelFacts(
        encoder=model.lm.encoder,
        control_tokens=model.windowing.control_tokens,
        vocab_size=model.lm.vocab_size,
        start_token=model.lm.start_token,
        max_window=model.lm.max_window,
        entries=tuple(len(retriever.store) for retriever in model.retrievers),
        parameters=tuple(retriever.parameters for retriever in model.retrievers),
        weights=model.mixer.weights,
    )
