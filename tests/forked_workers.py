"""Workers that are forks of the test process, which has the model, and what befalls them."""

import contextlib
import os
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from kills import die, in_child

from knnlm.model import reading
from knnlm.model.language_model import LanguageModel
from knnlm.workers import local
from knnlm.workers.jobs import Post
from knnlm.workers.process import serve

POISON = "\x07"  # in no other document
Load = Callable[[Post], LanguageModel]


class Fork:
    """A process as `local.launch` returns it."""

    def __init__(self, pipe: Connection, load: Load) -> None:
        def work() -> None:
            for number in range(3, 200):  # above all the build's ends of pipes
                if number != pipe.fileno():
                    with contextlib.suppress(OSError):
                        os.close(number)
            serve(pipe, load)

        self.process = in_child(work)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout or 0)
        return self.process.exitcode


def fork_workers(monkeypatch: pytest.MonkeyPatch, load: Load) -> list[Fork]:
    """Make forks instead of new processes; return those that are started."""
    forks: list[Fork] = []

    def launch(pipe: Connection, threads: int, errors: object) -> Fork:
        forks.append(Fork(pipe, load))
        return forks[-1]

    monkeypatch.setattr(local, "launch", launch)
    return forks


class Trouble:
    """What happens in a worker instead of its reading; the forks have all of it.

    before: called before each pass of the model, with its tokens and the passes of this worker.
    load: called before the worker is ready.
    """

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        original, home = LanguageModel.keys, os.getpid()
        self.before: Callable[[torch.Tensor, int], None] = lambda tokens, passes: None
        self.load: Callable[[], None] = lambda: None
        self.passes = 0

        def keys(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
            if os.getpid() != home:
                self.passes += 1
                self.before(tokens, self.passes)
            return original(model, tokens)

        monkeypatch.setattr(LanguageModel, "keys", keys)
        monkeypatch.setattr(reading, "default_batch_tokens", lambda lm: 192)  # three windows

        def load(post: Post) -> LanguageModel:
            self.load()
            return lm

        self.forks = fork_workers(monkeypatch, load)

    @property
    def started(self) -> int:
        """How many workers were started before: in a worker, its own place."""
        return len(self.forks)


def poison_of(lm: LanguageModel) -> int:
    """Return the token of POISON."""
    return int(lm.encode([POISON])[0][0])


def end_at_poison(trouble: Trouble, lm: LanguageModel) -> None:
    """Have every worker killed that reads POISON."""
    token = poison_of(lm)
    trouble.before = lambda tokens, passes: die() if bool((tokens == token).any()) else None
