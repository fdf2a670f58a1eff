"""A worker that is a process of its own: its messages travel through the pipe it is born with."""

import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

from knnlm.model.language_model import LanguageModel
from knnlm.workers.jobs import Failed, Job, Post, Ready
from knnlm.workers.worker import work


def serve(pipe: Connection, load: Callable[[Post], LanguageModel] = Post.load) -> None:
    """Load the model, then do one job after the other; ends with the pipe.

    The pipe ends when the build does, however that happens: then so does this process, at once.
    """
    received: SimpleQueue[Post | Job] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                received.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    try:
        _serve(pipe, received, load)
    except BrokenPipeError:
        os._exit(0)


def _serve(
    pipe: Connection,
    received: "SimpleQueue[Post | Job]",
    load: Callable[[Post], LanguageModel],
) -> None:
    post = received.get()
    assert isinstance(post, Post)
    try:
        lm = load(post)
    except Exception as error:
        pipe.send(Failed.because(error))
        return
    pipe.send(Ready())
    while True:
        job = received.get()
        assert isinstance(job, Job)
        for message in work(lm, job):
            pipe.send(message)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
