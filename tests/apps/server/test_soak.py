"""A short run of the soak benchmark: a server beside a writer that changes all that it can."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "soak.py"


def test_no_request_fails_beside_a_writer(tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--clients", "16", "--minutes", "0.27"]
    done = subprocess.run(
        [*command, "--results", str(results)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    assert found["failures"] == []
    assert found["stale_answers"] == []
    assert found["health"]["status"] == "ok"
    assert (found["writer_status"], found["server_status"]) == (0, 0)
    assert found["server_log"] == ""
    assert found["slowest_seconds"]["probe"] < 5.0
    assert len(found["requests"]) == 12
    assert set(found["changes"]) == {"append", "forget", "compact", "index", "tune"}
    assert max(found["memory_bytes"]) < 1.5 * found["memory_bytes"][0]
