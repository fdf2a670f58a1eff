"""How much memory this process may use: the machine's, or less where a control group says so."""

import os
from pathlib import Path

_CONTROL_GROUPS = Path("/proc/self/cgroup")
_MOUNTS = {"": ("", "unified"), "memory": ("memory",)}  # by controller: below /sys/fs/cgroup
_FILES = {"": "memory.max", "memory": "memory.limit_in_bytes"}


def memory_bytes(proc: Path = _CONTROL_GROUPS, mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the machine's memory or the smallest limit of this process's control groups.

    proc: lists the groups, one a line, as "number:controllers:path". mounted: where they are.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = proc.read_text(encoding="ascii").splitlines() if proc.is_file() else []
    for group in groups:
        _, controller, path = group.split(":", 2)
        for mount in _MOUNTS.get(controller, ()):
            top = mounted / mount
            inner = top / path.lstrip("/")
            # in a container the path may be the host's: then only the top is there
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(top):
                    limits += _limit(folder / _FILES[controller])
    return min(limits)


def default_memory() -> int:
    """Return how much of the memory building an index uses unless told: half of it."""
    return memory_bytes() // 2


def _limit(file: Path) -> list[int]:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # "max" is none


def own_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the memory that is this process's alone, without the files that it has mapped.

    0 where the system does not say.
    """
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
