"""Many clients, clients that leave, failures, limits, and the end of the server."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from conftest import PROSE, refusal
from serving import PARAMETERS, Served, fresh_lm, opening, serving, tiny_store, wait_for
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.apps.engine.jobs import Completion
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.worker import Worker
from knnlm.apps.server.service import check_exposure, listen
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.knn_lm import KNNLM

TEXT = "The nearest neighbors of"
LONG: dict[str, Any] = {"prompt": TEXT, "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("service") / "store")


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(lambda: opening(path)) as running:
        yield running


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every turn of the model thread take 20 ms more: a completion of 200 tokens, 4 s."""
    original = Worker.turn

    def turn(self: Worker) -> None:
        time.sleep(0.02)
        original(self)

    monkeypatch.setattr(Worker, "turn", turn)


def request_of(number: int) -> dict[str, Any]:
    """One of many different requests, each with a seed."""
    chosen = random.Random(number)
    request: dict[str, Any] = {
        "prompt": PROSE[chosen.randrange(100) :][: chosen.randrange(1, 120)],
        "max_tokens": chosen.randrange(1, 40),
        "temperature": chosen.choice([0.0, 0.7, 1.0]),
        "top_p": chosen.choice([0.9, 1.0]),
        "seed": number,
        "stream": chosen.random() < 0.5,
        "stop": chosen.choice([None, "e t", [" a", "st"]]),
    }
    own = chosen.choice([{}, {"lmbda": 0.1}, {"k": 3, "knn_temperature": 40.0}, {"lmbda": 0.0}])
    return request | {"extra_body": own}


def answer_to(client: openai.OpenAI, request: dict[str, Any]) -> tuple[str, str | None]:
    answer = client.completions.create(model="tiny", **request)
    chunks = list(answer) if request["stream"] else [answer]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.text for choice in choices), choices[-1].finish_reason


def test_64_clients_get_what_a_lone_client_gets(served: Served) -> None:
    requests = [request_of(number) for number in range(96)]
    with served.openai() as client, ThreadPoolExecutor(64) as clients:
        together = list(clients.map(lambda request: answer_to(client, request), requests))
        alone = [answer_to(client, request) for request in requests]
    assert together == alone
    assert len({text for text, _ in alone}) > 50
    served.wait_until_idle()


def test_requests_really_share_a_batch(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    original = Worker.turn

    def turn(self: Worker) -> None:
        places.append(self.places)
        original(self)

    monkeypatch.setattr(Worker, "turn", turn)
    served.complete([TEXT] * 40, max_tokens=30)
    assert max(places) == 16, "as many as fit, and no more"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_client_that_leaves_frees_its_place(path: Path, stream: bool, is_waiting: bool) -> None:
    with serving(lambda: opening(path), Limits(max_batch=1)) as served:
        engine = served.service.engine
        staying = None
        if is_waiting:
            staying = threading.Thread(
                target=served.complete, args=(TEXT,), kwargs={"max_tokens": 60, "temperature": 0}
            )
            staying.start()
            wait_for(lambda: not engine.is_idle)
        body = json.dumps(LONG | {"stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        head += "Content-Type: application/json\r\n\r\n"
        address = served.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as leaving:
            leaving.sendall(head.encode() + body)
            wait_for(lambda: len(engine._waiting) + len(engine._running) == 1 + is_waiting)
            if stream and not is_waiting:
                assert leaving.recv(1000)
            jobs = [*engine._waiting, *engine._running]
        started = time.monotonic()
        if staying is None:
            served.wait_until_idle()
        else:
            wait_for(lambda: not engine._waiting)
        assert time.monotonic() - started < 2.0, "4 seconds of work were left"
        cancelled = [job for job in jobs if job.cancelled]
        assert len(cancelled) == 1
        assert isinstance(cancelled[0], Completion)
        assert cancelled[0].max_tokens == 200
        if staying is not None:
            staying.join()
        assert served.complete(TEXT, max_tokens=2).choices
        status = '499"' if not stream or is_waiting else '200"'
        with served.http() as client:
            page = client.get("/metrics").text
        assert f'route="/v1/completions",status="{status}' in page


def holds(served: Served, running: int, waiting: int) -> bool:
    engine = served.service.engine
    return (len(engine._running), len(engine._waiting)) == (running, waiting)


@pytest.mark.usefixtures("slow")
def test_a_full_queue(path: Path) -> None:
    with serving(lambda: opening(path), Limits(max_batch=2, max_queue=3)) as served:
        with ThreadPoolExecutor(5) as clients:
            waiting = []
            for number in range(5):
                waiting.append(clients.submit(served.complete, TEXT, max_tokens=60, temperature=0))
                wait_for(partial(holds, served, min(number + 1, 2), max(number - 1, 0)))
            with pytest.raises(openai.RateLimitError) as raised:
                served.complete(TEXT, max_tokens=1)
            assert raised.value.response.headers["Retry-After"] == "1"
            assert "3 completions are waiting" in raised.value.message
            assert [len(one.result().choices) for one in waiting] == [1] * 5
        assert served.complete([TEXT] * 3, max_tokens=1).choices


def test_a_failure_in_the_model_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Worker._read_some

    def read(self: Worker, prompt: Any) -> int:
        if prompt.job.max_tokens == 13:
            raise RuntimeError("no memory left")
        return int(original(self, prompt))

    monkeypatch.setattr(Worker, "_read_some", read)
    with serving(lambda: opening(path)) as served:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as raised:
                served.complete(TEXT, max_tokens=13, stream=stream)
            assert "no memory" not in raised.value.message, "which is for the log"
        # of several prompts, one answer or none
        with pytest.raises(openai.InternalServerError):
            served.complete([TEXT] * 20, max_tokens=13)
        served.wait_until_idle()
        assert served.complete(TEXT, max_tokens=12, temperature=0).usage.completion_tokens == 12
        with served.http() as client:
            assert client.get("/health").json()["status"] == "ok"
            page = client.get("/metrics").text
        found = re.search(r"^knnlm_failures_total (\d+)", page, re.M)
        assert found
        assert 3 <= int(found[1]) <= 22


def test_a_failure_within_a_stream(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(self: Worker, group: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(Worker, "_advance", advance)
    with serving(lambda: opening(path)) as served:
        with pytest.raises(openai.APIError, match="the server failed at this request"):
            served.complete(TEXT, max_tokens=5, stream=True, temperature=0)
        served.wait_until_idle()
        assert served.complete(TEXT, max_tokens=1).choices


def test_a_dead_model_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(self: Worker) -> None:
        raise RuntimeError("the end")

    with serving(lambda: opening(path)) as served, served.http() as client:
        monkeypatch.setattr(Worker, "turn", turn)
        answer = client.post("/v1/completions", json=LONG)
        assert answer.status_code == 500
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert client.post("/v1/completions", json=LONG).status_code == 503


def test_what_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="is not a datastore"),
        serving(lambda: opening(tmp_path)),
    ):
        pass


def test_numbers_that_are_none(path: Path) -> None:
    def broken() -> KNNLM:
        lm = fresh_lm()
        model = KNNLM(lm, Datastore(path), **PARAMETERS)
        lm.model.lm_head.weight.data[5] = float("nan")
        return model

    with serving(broken) as served:
        for options in ({"max_tokens": 3}, {"max_tokens": 0, "echo": True, "logprobs": 1}):
            with pytest.raises(openai.InternalServerError):
                served.complete(TEXT, **options)
        with served.http() as client:
            assert client.post("/v1/explain", json={"text": TEXT}).status_code == 500


def test_slow_senders_are_cut_off(path: Path) -> None:
    with serving(lambda: opening(path), Limits(request_seconds=0.5)) as served:
        address = served.url.removeprefix("http://").split(":")
        for sent, answered in [
            (b"POST /v1/comp", b""),
            (b"", b""),
            (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ", b""),
            (
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
                b"HTTP/1.1 408 ",
            ),
        ]:
            with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
                client.sendall(sent)
                answer = b"".join(iter(lambda: client.recv(10_000), b""))
                assert answer.startswith(answered)
                assert bool(answer) == bool(answered)
        # a second request on a connection has its own time
        with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
            for _ in range(3):
                time.sleep(0.3)
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += client.recv(10_000)
                assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("slow")
def test_the_end_waits_for_what_runs(path: Path) -> None:
    with serving(lambda: opening(path)) as served, ThreadPoolExecutor(4) as clients:
        kept = served.http()
        kept.get("/health")
        running = [
            clients.submit(served.complete, TEXT, max_tokens=60, temperature=0, stream=stream)
            for stream in (False, True, False)
        ]
        wait_for(lambda: len(served.service.engine._running) == 3)
        served.service.stop()
        answer = kept.post("/v1/completions", json=LONG)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the server is stopping"
        health = kept.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopping")
        for one in running:
            result = one.result()
            last = result[-1] if isinstance(result, list) else result
            assert last.choices[0].finish_reason == "length"
        kept.close()


@pytest.mark.usefixtures("slow")
def test_the_end_does_not_wait_for_ever(path: Path) -> None:
    limits = Limits(grace_seconds=0.5)
    with serving(lambda: opening(path), limits) as served, ThreadPoolExecutor(2) as clients:
        whole = clients.submit(served.complete, TEXT, max_tokens=200, temperature=0)
        parts = clients.submit(served.complete, TEXT, max_tokens=200, temperature=0, stream=True)
        wait_for(lambda: len(served.service.engine._running) == 2)
        served.service.stop()
        error = whole.exception()
        assert isinstance(error, openai.InternalServerError)
        assert error.status_code == 503
        assert isinstance(parts.exception(), openai.APIError)


def command(path: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "knnlm", "serve", str(path), *options]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A datastore whose model is a folder."""
    lm = fresh_lm()
    lm.save(tmp_path / "model")
    return tiny_store(tmp_path / "docs.store")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command(stored: Path, tmp_path: Path, number: signal.Signals) -> None:
    arguments = command(stored, "--port", "0", "--model", str(tmp_path / "model"), "--k", "9")
    server = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"KNNLM_API_KEY": "sesame", "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.fullmatch(
        r"(http://127\.0\.0\.1:\d+/v1) serves docs\.store \([\d,]+ entries, k 9, λ 0\.25, T 1\)\n",
        line,
    )
    assert found, line
    with (
        openai.OpenAI(base_url=found[1], api_key="sesame", max_retries=0) as client,
        ThreadPoolExecutor(20) as clients,
    ):
        assert [model.id for model in client.models.list()] == ["docs.store"]

        def complete(_: int) -> Any:
            return client.completions.create(model="docs.store", prompt=TEXT, max_tokens=100)

        answers = [clients.submit(complete, number) for number in range(20)]
        with httpx2.Client(base_url=found[1].removesuffix("/v1")) as http:
            key = {"Authorization": "Bearer sesame"}
            wait_for(lambda: "knnlm_running 0.0" not in http.get("/metrics", headers=key).text)
        server.send_signal(number)
        for one in answers:
            error = one.exception()
            if error is None:
                assert one.result().choices[0].finish_reason
            else:  # those that had not arrived
                assert isinstance(error, openai.APIConnectionError | openai.InternalServerError)
        assert sum(one.exception() is None for one in answers) > 0
    out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--host", "0.0.0.0"], ["host 0.0.0.0 can be reached by others", "--api-key"]),
        (["--host", "::"], ["host :: can be reached by others"]),
        (["--host", ""], ["host '' can be reached by others"]),
        (["--api-key", " "], ["api_key must be"]),
        (["--max-batch", "0"], ["max_batch must be at least 1"]),
        (["--grace", "-1"], ["grace_seconds must be at least 0"]),
        (["--host", "203.0.113.1", "--api-key", "x"], ["cannot listen on host 203.0.113.1"]),
        (["--lmbda", "2"], ["lmbda"]),
        (["--k", "100000"], ["k must be at most"]),
    ],
)
def test_refusals_of_the_command(path: Path, options: list[str], parts: list[str]) -> None:
    result = CliRunner().invoke(app, ["serve", str(path), "--port", "0", *options])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_a_port_that_is_taken(path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(path), "--port", port])
    assert result.exit_code == 1
    assert f"port {port}: Address already in use" in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.2", "example.org", "::ffff:8.8.8.8"]
)
def test_others_need_a_key(host: str) -> None:
    check_exposure(host, "x")
    with refusal(InvalidArgumentError, "needs a key"):
        check_exposure(host, None)


def test_without_the_packages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["serve", str(path)])
    assert result.exit_code == 1
    assert "pip install 'knnlm[server]'" in result.stderr


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"max_batch": 0}, {"max_queue": 0}, {"max_body_bytes": 0},
     {"request_seconds": 0.0}, {"grace_seconds": -0.1}],
)  # fmt: skip
def test_limits_have_rules(options: dict[str, Any]) -> None:
    with refusal(InvalidArgumentError, *options):
        Limits(**options)
