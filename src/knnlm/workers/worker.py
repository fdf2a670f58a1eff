"""What a worker does with a job, wherever it runs: it says what it reads, and writes a shard."""

from collections.abc import Iterator

from knnlm.datastore.shard_making import ShardReading
from knnlm.errors import WorkerError
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import read_batch
from knnlm.workers.jobs import Failed, Job, Made, Message, Reading, load_windows


def work(lm: LanguageModel, job: Job) -> Iterator[Message]:
    """Do a job and tell how far it is: `Reading`, …, and at the end `Made` or `Failed`."""
    try:
        yield from _work(lm, job)
    except Exception as error:
        yield Failed.because(error)


def _work(lm: LanguageModel, job: Job) -> Iterator[Message]:
    if not job.windows.exists():
        raise WorkerError(
            f"a worker must find the datastore's folder under its path, but has no {job.windows}: "
            "build in a folder that all machines share"
        )
    windows, names = load_windows(job.windows)
    reading = ShardReading(lm, windows, names, job.key_dtype)
    for number in job.alone:
        yield Reading((number,), alone=True)
        list(read_batch(lm, windows, [number]))
    for batch in reading.batches():
        yield Reading(tuple(batch))
        reading.read(batch)
    yield Reading(())
    yield Made(reading.save(job.shard))
