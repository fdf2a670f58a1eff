"""Workers for a build: who reads which unit, for how long, and what follows when one dies.

A worker holds its unit on a lease, which everything it says renews. When it dies, or says nothing
for the length of a lease, it is ended and its unit given to another. Shards are yielded in the
order of their units, whoever made them and when. Knows no processes and no network.
"""

import logging
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from knnlm.datastore.catalog import SHARDS
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE
from knnlm.datastore.shard_making import DocumentsSetAsideError, MadeShard, Unit
from knnlm.errors import WorkerError
from knnlm.progress import Advance
from knnlm.text.windows import Window
from knnlm.workers.crew import Crew
from knnlm.workers.jobs import Died, Failed, Job, Made, Message, Reading, Ready, save_windows

LEASE_SECONDS = 600.0
_AHEAD = 2  # units for each worker that are planned before the first of them is committed
_MOST_DEATHS = 4  # at the same place of a unit, before the build ends
_MOST_STARTS = 3  # that fail in a row, for each worker of the crew
_PATIENCE_S = 1.0

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Task:
    """A unit on its way to a shard.

    windows: of the unit, to be read. files: how the names of its files begin. reading: the windows
    that its worker reads now, alone or not. tokens: that its worker has read, shown: that progress
    was told of. deaths: how many of its workers died, by what they read. alone: windows to be read
    alone first.
    """

    unit: Unit
    windows: list[Window]
    files: Path
    worker: int | None = None
    attempts: int = 0
    errors: int = 0
    deaths: Counter[frozenset[int]] = field(default_factory=Counter)
    reading: frozenset[int] = frozenset()
    is_alone: bool = False
    alone: tuple[int, ...] = ()
    tokens: int = 0
    shown: int = 0
    result: MadeShard | Exception | None = None

    @property
    def windows_file(self) -> Path:
        return self.files.with_name(f"{self.files.name}.windows")

    def job(self, key_dtype: str) -> Job:
        """Return the work for the next worker."""
        self.attempts += 1
        self.tokens, self.reading, self.is_alone = 0, frozenset(), False
        shard = self.files.with_name(f"{self.files.name}-{self.attempts}{ASIDE}")
        return Job(self.windows_file, shard, key_dtype, self.alone)

    def begin(self, windows: tuple[int, ...], alone: bool) -> None:
        """Note what the worker reads now: what it read before is done."""
        if not self.is_alone:
            self.tokens += sum(self.windows[number].new for number in self.reading)
        self.reading, self.is_alone = frozenset(windows), alone

    def names(self, windows: frozenset[int]) -> str:
        """Return the names of the documents in some windows."""
        return ", ".join(sorted({self.unit.names[number] for number in self.documents(windows)}))

    def documents(self, windows: frozenset[int]) -> set[int]:
        """Return the numbers of the documents in some windows."""
        return {span.document for number in windows for span in self.windows[number].spans}


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker that was started and not ended. task: None if the build no longer wants it."""

    deadline: float
    is_ready: bool = False
    is_busy: bool = False
    task: _Task | None = None


class WorkerPool:
    """Makes shards with workers; see `ShardMaker`. Workers start with the first unit.

    lease_seconds: how long a worker may say nothing while it loads the model or reads one batch.
    """

    def __init__(self, crew: Crew, lease_seconds: float) -> None:
        self._crew = crew
        self._lease = lease_seconds
        self._run = secrets.token_hex(4)  # names files that no other run has
        self._workers: dict[int, _Worker] = {}
        self._tasks: deque[_Task] = deque()
        self._started = self._planned = self._retries = self._failed_starts = 0
        self._next_start = 0.0
        self._note = ""

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        self._tasks.clear()
        for number in list(self._workers):
            self._end(number)

    def make(
        self, store: Datastore, units: Iterator[Unit], advance: Advance
    ) -> Generator[MadeShard, None, None]:
        """Yield the shards of the units in their order. Raises WorkerError too."""
        folder = store.path / SHARDS
        self._advance, self._key_dtype = advance, store.settings.key_dtype
        all_planned = False
        try:
            while True:
                if not all_planned and len(self._tasks) < _AHEAD * self._crew.size:
                    if (unit := next(units, None)) is None:
                        all_planned = True
                    else:
                        self._plan(unit, folder)
                        self._step(0.0)
                elif not self._tasks:
                    return
                elif (result := self._tasks[0].result) is None:
                    self._step(_PATIENCE_S)
                elif isinstance(result, Exception):
                    raise result
                else:
                    self._tasks.popleft()
                    yield result
        except DocumentsSetAsideError:
            self._tasks.clear()  # all units are planned anew; workers finish theirs in vain
            for worker in self._workers.values():
                worker.task = None
            raise
        except BaseException:
            self.close()
            raise
        finally:
            for path in folder.glob(f"{self._run}-*"):
                path.unlink(missing_ok=True)

    def _plan(self, unit: Unit, folder: Path) -> None:
        self._planned += 1
        task = _Task(unit, unit.windows, folder / f"{self._run}-{self._planned}")
        if task.windows:
            save_windows(task.windows_file, task.windows, unit.names)
        else:
            task.result = MadeShard(unit, None)
        self._tasks.append(task)

    def _step(self, seconds: float) -> None:
        """Hand out work, hear what the workers say within so many seconds, and see who is late."""
        self._hand_out()
        soonest = min((worker.deadline for worker in self._workers.values()), default=math.inf)
        wait = max(0.0, min(seconds, soonest - time.monotonic()))
        for number, message in self._crew.messages(wait):
            if (worker := self._workers.get(number)) is not None:
                self._hear(number, worker, message)
        for number, worker in list(self._workers.items()):
            if worker.deadline < time.monotonic():
                self._lose(number, f"said nothing for {self._lease:g} seconds")
        self._hand_out()
        self._tell()

    def _hand_out(self) -> None:
        """Give the first units to free workers, and start workers while there are too few."""
        waiting = [task for task in self._tasks if task.result is None and task.worker is None]
        free = [
            number
            for number, worker in self._workers.items()
            if worker.is_ready and not worker.is_busy
        ]
        for task, number in zip(waiting, free, strict=False):
            worker = self._workers[number]
            worker.task, worker.is_busy, task.worker = task, True, number
            worker.deadline = time.monotonic() + self._lease
            self._crew.give(number, task.job(self._key_dtype))
        wanted = sum(task.result is None for task in self._tasks)
        now = time.monotonic()
        while len(self._workers) < min(self._crew.size, wanted) and now >= self._next_start:
            self._started += 1
            self._workers[self._started] = _Worker(now + self._lease)
            self._crew.start(self._started)

    def _hear(self, number: int, worker: _Worker, message: Message) -> None:
        worker.deadline = time.monotonic() + self._lease
        task = worker.task
        match message:
            case Ready():
                worker.is_ready = True
                worker.deadline = math.inf
                self._failed_starts = 0
            case Reading(windows, alone):
                if task is not None:
                    task.begin(windows, alone)
                    self._show(task, task.tokens)
            case Made(file):
                if task is not None:
                    self._show(task, sum(window.new for window in task.windows))
                    task.result = MadeShard(task.unit, file)
                    task.windows_file.unlink(missing_ok=True)
                self._free(worker)
            case Failed():
                self._fail(number, worker, message)
            case Died(reason):
                self._lose(number, reason)

    def _free(self, worker: _Worker) -> None:
        worker.task, worker.is_busy, worker.deadline = None, False, math.inf

    def _show(self, task: _Task, tokens: int) -> None:
        """Tell progress of tokens that no earlier worker of the unit has read."""
        if tokens > task.shown:
            self._advance(tokens - task.shown, task.unit.expected_tokens)
            task.shown = tokens

    def _tell(self) -> None:
        """Say how many workers there are, and how often work had to be given again."""
        ready = sum(worker.is_ready for worker in self._workers.values())
        note = f"{ready} of {self._crew.size} workers"
        if self._retries:
            note += f", {self._retries} {'retry' if self._retries == 1 else 'retries'}"
        if note != self._note:
            self._note = note
            total = self._tasks[-1].unit.expected_tokens if self._tasks else None
            self._advance(0, total, note)

    def _end(self, number: int) -> _Worker:
        worker = self._workers.pop(number)
        self._crew.end(number)
        return worker

    def _fail(self, number: int, worker: _Worker, failed: Failed) -> None:
        """Note an error: one of knnlm's own ends the build when the unit's turn has come.

        Any other may be the worker's: one more worker tries. Raises what keeps the model from being
        loaded.
        """
        error, task = failed.known(), worker.task
        told = WorkerError(f"a worker failed: {failed.kind}: {' '.join(failed.text.split())}")
        if not worker.is_ready:
            raise error or told
        if error is not None:
            self._free(worker)
            if task is not None:
                task.result = error
            return
        self._retries += 1
        self._end(number)
        if task is not None:
            _LOG.warning("%s; its unit is read again", told)
            task.worker = None
            task.errors += 1
            if task.errors == 2:
                task.result = told

    def _lose(self, number: int, reason: str) -> None:
        """End a worker that is dead or late; its unit goes to another. Raises WorkerError."""
        worker = self._end(number)
        self._retries += 1
        task = worker.task
        reading = task.names(task.reading) if task is not None and task.reading else "nothing"
        _LOG.warning("worker %d %s, reading %s; another takes its place", number, reason, reading)
        if not worker.is_ready:
            self._count_failed_start(reason)
        elif task is not None:
            task.worker = None
            _blame(task)

    def _count_failed_start(self, reason: str) -> None:
        """After too many in a row, go on for a while with the workers that there are."""
        self._failed_starts += 1
        if self._failed_starts < _MOST_STARTS * self._crew.size:
            return
        if not any(worker.is_ready for worker in self._workers.values()):
            raise WorkerError(
                f"no worker could be started, {self._failed_starts} tried: the last {reason}; "
                "use fewer workers if memory is short, or a longer lease"
            )
        self._failed_starts = 0
        self._next_start = time.monotonic() + self._lease


def _blame(task: _Task) -> None:
    """Find out what in a unit ended its worker.

    Windows that were read together are read alone by the next worker, before all others. What ends
    two workers while they read it alone (or with more of the same document) is set aside.
    """
    reading = task.reading
    task.deaths[reading] += 1
    documents = task.documents(reading)
    if reading and (len(reading) == 1 or len(documents) == 1):
        if task.deaths[reading] == 2:
            task.result = DocumentsSetAsideError(sorted(documents))
    elif reading:
        task.alone = tuple(sorted(reading))
    if task.deaths[reading] == _MOST_DEATHS:
        task.result = WorkerError(
            f"{_MOST_DEATHS} workers ended while they read {task.names(reading) or 'a unit'}, but "
            "no document ends them alone: use fewer workers if memory is short"
        )
