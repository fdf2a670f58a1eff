"""Workers that are Ray actors, on any machines of a cluster; needs the package ray.

Ray only starts and ends actors and carries messages: it restarts and repeats nothing by itself.
"""

import socket
from collections.abc import Iterator
from typing import Any

import torch

from knnlm.errors import InvalidArgumentError, WorkerError, import_optional
from knnlm.model.language_model import LanguageModel
from knnlm.workers.jobs import Died, Failed, Job, Made, Message, ModelSource, Post, Ready
from knnlm.workers.worker import work

_ANSWER_S = 10.0  # within which a cluster's head answers


class Actor:
    """A worker, in a process that Ray started."""

    def load(self, post: Post) -> Iterator[Message]:
        """Load the model."""
        try:
            self._lm = post.load()
            yield Ready()
        except Exception as error:
            yield Failed.because(error)

    def work(self, job: Job) -> Iterator[Message]:
        """Do a job."""
        yield from work(self._lm, job)


class RayCrew:
    """Actors that load the model from where a build has it, each with its own GPU or share of CPUs.

    address: HOST:PORT of a cluster that this machine belongs to, auto for the one it runs, local
    for a cluster of this machine alone that ends with the build. size: by default one for each GPU
    of the cluster, whatever the build itself computes on; without GPUs one for each machine.
    Raises MissingDependencyError, InvalidArgumentError and WorkerError. See `Crew`.
    """

    def __init__(self, lm: LanguageModel, address: str, size: int | None = None) -> None:
        self._ray = import_optional("ray", "building on a Ray cluster", "ray")
        self._connect(address)
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        machines = [each for each in machines if each.get("CPU")]
        gpus = int(sum(each.get("GPU", 0) for each in machines))
        if gpus:
            self.size = size or gpus
            self._needs: dict[str, int] = {"num_gpus": 1, "num_cpus": 1}
            device, threads = "cuda", torch.get_num_threads()
        else:
            self.size = size or max(1, len(machines))
            cpus = [int(each["CPU"]) for each in machines]
            device = "cpu"
            threads = max(1, min(max(cpus, default=1), sum(cpus) // self.size))
            self._needs = {"num_cpus": threads}
        self._post = Post(ModelSource.of(lm), device, threads)
        self._actors: dict[int, Any] = {}
        self._talks: dict[int, Any] = {}  # what each busy actor is saying

    def _connect(self, address: str) -> None:
        self._owns = not self._ray.is_initialized()
        if not self._owns:
            return
        _check_address(address)
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unreachable(address, error) from error

    def close(self) -> None:
        """Leave the cluster, if it was entered here."""
        if self._owns:
            self._ray.shutdown()

    def start(self, worker: int) -> None:
        """Start an actor where the cluster has room, now or later; see `Crew`."""
        kind = self._ray.remote(Actor)
        actor = kind.options(max_restarts=0, max_task_retries=0, **self._needs).remote()
        self._actors[worker] = actor
        self._talks[worker] = _streaming(actor.load).remote(self._post)

    def give(self, worker: int, job: Job) -> None:
        """Give work to an actor that has none."""
        self._talks[worker] = _streaming(self._actors[worker].work).remote(job)

    def messages(self, seconds: float) -> list[tuple[int, Message]]:
        """Wait at most so long for messages; see `Crew`."""
        numbers = {talk: number for number, talk in self._talks.items()}
        if not numbers:
            return []
        ready, _ = self._ray.wait(list(numbers), timeout=seconds, fetch_local=False)
        return [(numbers[talk], self._next(numbers[talk], talk)) for talk in ready]

    def _next(self, number: int, talk: Any) -> Message:
        try:
            message: Message = self._ray.get(next(talk))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            message = Died(f"was lost ({type(error).__name__}: {reason})")
        if isinstance(message, Ready | Made | Failed | Died):
            del self._talks[number]
        return message

    def end(self, worker: int) -> None:
        """End an actor at once; see `Crew`."""
        self._talks.pop(worker, None)
        self._ray.kill(self._actors.pop(worker))


def _streaming(method: Any) -> Any:
    return method.options(num_returns="streaming")


def _check_address(address: str) -> None:
    """Refuse what is no address, and one where nothing answers: Ray would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not host or "/" in host:
        raise InvalidArgumentError(
            f"ray={address!r} must be HOST:PORT of a cluster that this machine belongs to, auto or "
            "local: run ray start on this machine, and build here"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> WorkerError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return WorkerError(
        f"the Ray cluster {address!r} cannot be reached: {reason}; start one with: ray start --head"
    )
