"""Workers that are processes of this machine: each on a GPU, or with its share of the cores."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch

from knnlm.model.language_model import LanguageModel
from knnlm.workers.jobs import Died, Job, Message, ModelSource, Post

_COMMAND = (sys.executable, "-m", "knnlm.workers.process")
_FAREWELL_S = 5.0  # between the end of a process's pipe and its own
_PACKAGES = Path(__file__).parents[2]  # the folder that this package is imported from


@runtime_checkable
class Process(Protocol):
    """A process that was started, such as a `subprocess.Popen`."""

    def kill(self) -> None:
        """Send SIGKILL."""

    def wait(self, timeout: float | None = None) -> Any:
        """Wait until it has ended; return its exit status, or −N if signal N ended it.

        Raises subprocess.TimeoutExpired after `timeout` seconds.
        """


@dataclass(slots=True, eq=False)
class _Worker:
    process: Process
    pipe: Connection
    device: str
    errors: IO[str]  # its standard error


def launch(pipe: Connection, threads: int, errors: IO[str]) -> Process:
    """Start a process that serves a pipe, with its standard error in a file.

    It gets no signals of the terminal: the build ends it.
    """
    path = os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [*_COMMAND, str(pipe.fileno())],
        pass_fds=[pipe.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,
    )


class LocalCrew:
    """Processes that load the model from where a build has it; see `Crew`.

    On GPUs, the workers are spread over all of them; on a CPU, they share the threads that torch
    may use here.
    """

    def __init__(self, lm: LanguageModel, size: int) -> None:
        self.size = size
        self._source = ModelSource.of(lm)
        self._devices: Sequence[str] = [str(lm.device)]
        if lm.device.type == "cuda":
            self._devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        self._threads = max(1, torch.get_num_threads() // size)
        self._workers: dict[int, _Worker] = {}

    def start(self, worker: int) -> None:
        """Start a process on the device that has the fewest; see `Crew`."""
        used = [each.device for each in self._workers.values()]
        device = min(self._devices, key=used.count)
        here, there = Pipe()
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `end`)
        with there:
            process = launch(there, self._threads, errors)
        self._workers[worker] = _Worker(process, here, device, errors)
        self._send(worker, Post(self._source, device, self._threads))

    def give(self, worker: int, job: Job) -> None:
        """Give work to a worker that has none."""
        self._send(worker, job)

    def _send(self, worker: int, message: Post | Job) -> None:
        # if it has died, `messages` will say so
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._workers[worker].pipe.send(message)

    def messages(self, seconds: float) -> list[tuple[int, Message]]:
        """Wait at most so long for messages; see `Crew`."""
        numbers = {worker.pipe: number for number, worker in self._workers.items()}
        found: list[tuple[int, Message]] = []
        for pipe in wait(list(numbers), seconds):
            assert isinstance(pipe, Connection)
            number = numbers[pipe]
            try:
                while pipe.poll():
                    found.append((number, pipe.recv()))
            except (EOFError, OSError):
                found.append((number, Died(self._last_words(number))))
        return found

    def _last_words(self, number: int) -> str:
        """Say how a process ended, and the last line that it wrote."""
        worker = self._workers[number]
        try:
            status = worker.process.wait(timeout=_FAREWELL_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        worker.errors.seek(0)
        lines = worker.errors.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{how} ({last[:200]})" if last else how

    def end(self, worker: int) -> None:
        """End a process at once; see `Crew`."""
        ended = self._workers.pop(worker)
        ended.process.kill()
        ended.process.wait()
        ended.pipe.close()
        ended.errors.close()
