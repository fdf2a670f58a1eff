"""Where a measured number comes from: machine, versions, commit, command."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = ("knnlm", "torch", "transformers", "numpy", "safetensors", "faiss-cpu", "numba")


def provenance() -> dict[str, Any]:
    """Return the machine, the versions, the commit and the command of this process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *(Path(sys.argv[0]).name, *sys.argv[1:])]),
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": platform.platform(),
        },
        "versions": versions,
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, with their provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = json.dumps({**results, "provenance": provenance()}, indent=2, ensure_ascii=False)
    path.write_text(contents + "\n", encoding="utf-8")


def _commit() -> str | None:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
