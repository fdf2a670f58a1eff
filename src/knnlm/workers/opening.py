"""Workers as a build asks for them: on this machine, on a Ray cluster, or none."""

from collections.abc import Iterator
from contextlib import contextmanager

from knnlm.datastore.shard_making import InThisProcess, ShardMaker
from knnlm.model.language_model import LanguageModel
from knnlm.rules import check_lease, check_whole
from knnlm.workers.local import LocalCrew
from knnlm.workers.on_ray import RayCrew
from knnlm.workers.pool import WorkerPool


@contextmanager
def open_makers(
    lm: LanguageModel, workers: int | None, ray: str | None, lease: float
) -> Iterator[ShardMaker]:
    """Yield whoever makes the shards of a build, and end all workers afterwards.

    workers: how many; None: on a cluster as many as it has room for, otherwise this process reads.
    ray: the address of a cluster, see `RayCrew`. lease: in seconds, see `WorkerPool`. Raises
    InvalidArgumentError, MissingDependencyError, WorkerError.
    """
    if workers is not None:
        workers = check_whole("workers", workers, remedy="leave workers out to use this process")
    lease = check_lease(lease)
    if ray is not None:
        crew = RayCrew(lm, ray, workers)
        try:
            with WorkerPool(crew, lease) as pool:
                yield pool
        finally:
            crew.close()
    elif workers is not None:
        with WorkerPool(LocalCrew(lm, workers), lease) as pool:
            yield pool
    else:
        yield InThisProcess(lm)
