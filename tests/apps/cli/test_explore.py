"""`knnlm explore`: from the command line to the page, and its end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from serving import fresh_lm, tiny_store
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.apps.server.service import listen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fresh_lm().save(tmp_path / "model")
    return tiny_store(tmp_path / "docs.store")


def test_it_opens_the_page_and_ends(path: Path, tmp_path: Path) -> None:
    options = ["--port", "0", "--model", str(tmp_path / "model"), "--k", "9"]
    explorer = subprocess.Popen(
        [sys.executable, "-m", "knnlm", "explore", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert explorer.stdout is not None
    found = re.match(r"(http://127\.0\.0\.1:\d+/explorer) explores ", explorer.stdout.readline())
    assert found
    with httpx2.Client(timeout=60.0) as client:
        assert "knnlm explorer" in client.get(found[1]).text
        answer = client.post(f"{found[1]}/analysis", json={"text": "The nearest"}).json()
    assert answer["datastores"][0]["parameters"]["k"] == 9
    explorer.send_signal(signal.SIGINT)
    out, err = explorer.communicate(timeout=60)
    assert (explorer.returncode, out, err) == (0, "", "")


def test_a_port_that_is_taken(path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["explore", str(path), "--port", port])
    assert result.exit_code == 1
    assert f"port {port}: Address already in use" in result.stderr


def test_without_the_packages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["explore", str(path)])
    assert result.exit_code == 1
    assert "pip install 'knnlm[server]'" in result.stderr
