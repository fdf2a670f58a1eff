"""The workers of a build as whoever gives them work sees them: processes, or actors elsewhere."""

from typing import Protocol, runtime_checkable

from knnlm.workers.jobs import Job, Message


@runtime_checkable
class Crew(Protocol):
    """Starts and ends workers, and carries messages. A worker is known by a number.

    size: how many workers there are at most.
    """

    size: int

    def start(self, worker: int) -> None:
        """Begin to start a worker with a number of its own; it will be `Ready`."""
        ...

    def give(self, worker: int, job: Job) -> None:
        """Give work to a worker that has none."""
        ...

    def messages(self, seconds: float) -> list[tuple[int, Message]]:
        """Wait at most so long for messages; return each with its worker.

        `Died` comes once from a worker that ended by itself, and nothing after it.
        """
        ...

    def end(self, worker: int) -> None:
        """End a worker at once; one that has ended already, too."""
        ...
