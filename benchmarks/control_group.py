"""Limiting the memory of a process with a Linux control group, version 2 or 1."""

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MOUNTED = Path("/sys/fs/cgroup")


class ControlGroup:
    """A new group for processes that `join` it; all memory they use counts.

    That includes the files they read, while these stay cached. Needs root. peak_bytes: the maximum
    used so far.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        controllers = MOUNTED / "cgroup.controllers"
        if controllers.is_file() and "memory" in controllers.read_text(encoding="ascii").split():
            self._folder = MOUNTED / name
            self._limit, self._peak = "memory.max", "memory.peak"
        else:
            self._folder = MOUNTED / "memory" / name
            self._limit, self._peak = "memory.limit_in_bytes", "memory.max_usage_in_bytes"
        self._limit_bytes = limit_bytes

    def __enter__(self) -> "ControlGroup":
        self._folder.mkdir()
        (self._folder / self._limit).write_text(str(self._limit_bytes), encoding="ascii")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for _ in range(50):  # a process that has just ended may still be counted
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.1)
        self._folder.rmdir()

    def join(self) -> None:
        """Move the calling process into the group."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    @property
    def peak_bytes(self) -> int:
        """The maximum memory that the group has used."""
        return int((self._folder / self._peak).read_text(encoding="ascii"))
