"""No request is bigger than its turn: refused, long and abandoned ones beside a probe."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE
from serving import Served, fresh_lm, opening, serving, tiny_store, wait_for

from knnlm.apps.engine.calls import Calls
from knnlm.apps.engine.jobs import Event, Job, ModelCall, Overrides, Returned
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.turns import Turns
from knnlm.apps.explorer import analysis
from knnlm.knn_lm import KNNLM

pytestmark = pytest.mark.alone
LONG_TEXT = PROSE * 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("turns") / "store")


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(lambda: opening(path)) as running:
        yield running


def send(served: Served, route: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and return the connection, on which nothing was read."""
    content = json.dumps(body).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=120)
    connection.sendall(head.encode() + content)
    return connection


HEAVY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a" * 400_000}),
    ("/v1/completions", {"prompt": "The nearest " * 30_000, "max_tokens": 1}),
    ("/v1/completions", {"prompt": ["x" * 3000] * 250}),
    ("/v1/completions", {"prompt": [1] * 200_000}),
    ("/v1/completions", {"prompt": PROSE[:100], "max_tokens": 150, "n": 16}),
    ("/v1/completions", {"prompt": [PROSE[:100]] * 40, "max_tokens": 150, "sources": 2}),
    ("/v1/completions", {"prompt": [PROSE[:200]] * 60, "max_tokens": 0, "echo": True,
                         "logprobs": 5}),
    ("/v1/explain", {"text": LONG_TEXT, "sources": 64, "before": 1024, "after": 1024}),
    ("/v1/explain", {"text": LONG_TEXT, "sources": 32}),
    ("/v1/explain", {"text": LONG_TEXT[:300], "sources": 64, "k": 200}),
    ("/v1/explain", {"text": "z" * 500_000}),
    ("/explorer/analysis", {"text": "The nearest " * 1500}),
    ("/explorer/analysis", {"text": "y" * 200_000}),
    ("/explorer/passages", {"rows": [list(range(500)) * 8], "numbering": [0]}),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_probe_beside_any_mix(served: Served, seed: int) -> None:
    chosen = random.Random(seed)
    seconds = []
    with ExitStack() as open_connections:
        staying = []
        for _ in range(24):
            connection = send(served, *chosen.choice(HEAVY))
            if chosen.random() < 0.4:
                connection.close()
            else:
                staying.append(open_connections.enter_context(connection))
            if chosen.random() < 0.3:
                started = time.monotonic()
                assert served.complete("a", max_tokens=1).choices
                seconds.append(time.monotonic() - started)
        for connection in staying:
            assert connection.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 400")
    assert max(seconds) < 3.0
    served.wait_until_idle()


@pytest.mark.parametrize(
    ("route", "body", "part"),
    [
        ("/v1/explain", HEAVY[7][1], "the answer must have at most 16777216 bytes"),
        ("/v1/explain", {"text": "z" * 500_000}, "1 to 1024 tokens on this server, got more"),
        ("/v1/completions", {"prompt": "a" * 400_000}, "prompt (more than 256 tokens"),
        ("/v1/completions", {"prompt": [1] * 200_000}, "prompt (200000 tokens"),
        (
            "/v1/completions",
            {"prompt": ["x"] * 200, "max_tokens": 200, "sources": 64},
            "the answer must have at most",
        ),
        ("/explorer/analysis", {"text": "y" * 200_000}, "at most 8192 tokens here, got more"),
    ],
)
def test_what_asks_for_too_much_is_told_the_limit(
    served: Served, route: str, body: dict[str, Any], part: str
) -> None:
    with served.http() as client:
        answer = client.post(route, json=body)
    assert answer.status_code == 400
    assert part in answer.json()["error"]["message"]


def test_neighbors_have_a_limit(path: Path) -> None:
    with serving(lambda: opening(path), Limits(max_k=20)) as served, served.http() as client:
        body = {"prompt": "x", "max_tokens": 1, "k": 20}
        assert client.post("/v1/completions", json=body).status_code == 200
        answer = client.post("/v1/completions", json=body | {"k": 21})
        assert answer.status_code == 400
        assert "at most 20 on this server" in answer.json()["error"]["message"]


def test_an_answer_is_counted_while_it_is_made(path: Path) -> None:
    """Passages of long words are longer than estimated."""
    with serving(lambda: opening(path), Limits(max_answer_bytes=9000)) as served:
        with served.http() as client:
            body = {"text": PROSE[:40], "sources": 0}
            assert client.post("/v1/explain", json=body).status_code == 200
            answer = client.post("/v1/explain", json={"text": PROSE[:60], "sources": 1})
        assert answer.status_code == 400
        assert "the answer must have at most 9000 bytes" in answer.json()["error"]["message"]


class _Recorded:
    """Model calls of `parts` parts, which note their work."""

    def __init__(self) -> None:
        self.events: dict[int, list[Event]] = {}
        self.done: list[int] = []
        self.closed: list[int] = []

    def job(self, number: int) -> ModelCall:
        self.events[number] = []
        return ModelCall(self.events[number].append, Overrides(), self.unused)

    def unused(self, model: KNNLM) -> Turns[int]:
        raise AssertionError

    def work(self, number: int, parts: int, fails: bool) -> Turns[int]:
        try:
            for _ in range(parts):
                time.sleep(0.004)
                self.done.append(number)
                yield
            if fails:
                raise ValueError("no")
            return number
        except GeneratorExit:
            self.closed.append(number)
            raise


def test_calls_share_the_turns() -> None:
    recorded = _Recorded()
    failed: list[Job] = []
    calls = Calls(lambda job, error: failed.append(job))
    jobs = [recorded.job(number) for number in range(5)]
    for number, job in enumerate(jobs):
        calls.begin(job, recorded.work(number, 40, fails=number == 3))
    started = time.monotonic()
    calls.turn()
    assert time.monotonic() - started < 0.2, "a turn is short, however much there is to do"
    jobs[4].cancel()
    calls.drop_cancelled()
    while calls.jobs:
        calls.turn()
    assert failed == [jobs[3]]
    assert recorded.closed == [] or recorded.closed == [4]
    assert 4 not in recorded.done, "dropped before it began"
    for number in range(3):
        assert recorded.events[number] == [Returned(number)]
    first_end = max(place for place, number in enumerate(recorded.done) if number == 0)
    assert recorded.done.index(2) < first_end, "they take turns"


def test_work_that_nobody_waits_for_ends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []
    work = analysis.Analysis.to_dict_in_turns

    def slow(self: analysis.Analysis) -> Turns[dict[str, Any]]:
        for _ in range(1000):
            time.sleep(0.01)
            yield
        finished.append(True)
        return (yield from work(self))

    monkeypatch.setattr(analysis.Analysis, "to_dict_in_turns", slow)
    with send(served, "/explorer/analysis", {"text": PROSE}):
        wait_for(lambda: not served.service.engine.is_idle)
        assert served.complete("a", max_tokens=1).choices
    started = time.monotonic()
    served.wait_until_idle()
    assert time.monotonic() - started < 2.0
    assert not finished


BUSY = """
import sys, time, pathlib
import torch
sys.path[:0] = {paths!r}
from serving import opening
from knnlm.apps.engine.worker import Worker
from knnlm.apps.server.service import Service, listen

def turn(worker):
    pathlib.Path({flag!r}).touch()
    {work}

Worker.turn = turn
listener = listen("127.0.0.1", 0)
service = Service(
    lambda: opening(pathlib.Path({path!r})),
    name="tiny",
    on_start=lambda: print(listener.getsockname()[1], flush=True),
)
service.open()
service.run([listener])
"""
ENDLESS = {
    "python": "while True: pass",
    "sleep": "time.sleep(1000)",
    "torch": "a = torch.randn(9000, 9000); [a @ a for _ in range(1000)]",
}


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process, and kill it if it is left at the end."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("work", ENDLESS)
def test_a_second_signal_ends_whatever_the_model_thread_does(
    path: Path, tmp_path: Path, work: str
) -> None:
    paths = [str(Path(__file__).parents[2])]
    flag = tmp_path / "busy"
    script = BUSY.format(paths=paths, flag=str(flag), path=str(path), work=ENDLESS[work])
    body = b'{"prompt": "x", "max_tokens": 5}'
    with running([sys.executable, "-c", script]) as server:
        assert server.stdout is not None
        with socket.create_connection(("127.0.0.1", int(server.stdout.readline()))) as asking:
            asking.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            asking.sendall(body)
            wait_for(flag.exists)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.poll() is None, "it waits for what runs"
            started = time.monotonic()
            server.send_signal(signal.SIGTERM)
            errors = server.communicate(timeout=20)[1]
            assert time.monotonic() - started < 2.5
            assert (server.returncode, errors) == (0, "")


def test_signals_while_the_process_ends(path: Path, tmp_path: Path) -> None:
    """The status is 0 however many there are, and whenever."""
    lm = fresh_lm()
    lm.save(tmp_path / "model")
    command = [sys.executable, "-m", "knnlm", "serve", str(path), "--port", "0"]
    with running([*command, "--model", str(tmp_path / "model")]) as server:
        assert server.stdout is not None
        assert re.search(r":(\d+)/v1", server.stdout.readline())
        while server.poll() is None:
            server.send_signal(signal.SIGTERM)
            time.sleep(0.03)
        assert (server.returncode, server.communicate()[1]) == (0, "")
