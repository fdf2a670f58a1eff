"""docs/serving.md: every snippet runs, as it is printed but for the port."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, byte_tokenizer, tiny_llama
from serving import wait_for
from stores import distinct_documents

from knnlm.maintenance import build
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
NAME = "HuggingFaceTB/SmolLM2-135M"
SNIPPETS: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.S)
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def snippets(language: str, word: str) -> list[str]:
    found = [source for kind, source in SNIPPETS if kind == language and word in source]
    assert found
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page speaks of: a tiny model under the real one's name."""
    work = tmp_path_factory.mktemp("page")
    LanguageModel(tiny_llama(), byte_tokenizer(), name=NAME).save(work / NAME)
    lm = LanguageModel.load(work / NAME, dtype="float32")
    lm.name = NAME
    for name in ("docs.store", "other.store"):
        store = build(work / name, lm, distinct_documents(2), window=64)
        store.save_parameters(Parameters(16, 0.4, 20.0), {})
    (work / "held-out.txt").write_text(f"{PROSE.strip()}\nThe nearest zebra.\n")
    (work / "tasks").mkdir()
    task = re.findall(r"```yaml\n(.*?)```", (PAGE.parent / "lm-eval.md").read_text(), re.S)[0]
    (work / "tasks" / "held_out.yaml").write_text(task)
    (work / "key.txt").write_text("sesame\n")
    return work


def start(command: str, work: Path, port: int) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()} --port {port}"],
        cwd=work,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert " serves docs.store (" in server.stdout.readline()
    return server


def stop(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert server.stdout is not None
    server.stdout.close()


@pytest.fixture(scope="module")
def port(work: Path) -> Iterator[int]:
    port = free_port()
    (command,) = snippets("bash", "knnlm serve docs.store\n")
    server = start(command, work, port)
    yield port
    stop(server)


def shell(source: str, work: Path, port: int) -> str:
    answer = subprocess.run(
        ["bash", "-c", source.replace(":8000", f":{port}")],
        cwd=work,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_every_snippet_is_run() -> None:
    run = ["docs.store\n", "curl", "lm_eval", "KNNLM_API_KEY", "OpenAI", "extra_body", "Service"]
    for kind, source in SNIPPETS:
        assert kind in ("bash", "python")
        assert sum(word in source for word in run) == 1, source


def test_curl(work: Path, port: int) -> None:
    completion, explanation = [
        json.loads(shell(source, work, port)) for source in snippets("bash", "curl")
    ]
    assert completion["usage"]["completion_tokens"] > 0
    assert explanation["tokens"][0]["sources"]


def test_the_client(work: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for source in [*snippets("python", "OpenAI"), *snippets("python", "extra_body")]:
        exec(source.replace(":8000", f":{port}"), names)
    names["client"].close()
    out = capsys.readouterr().out
    assert names["answer"].choices[0].text
    assert out.count(" nats\n") == 5
    assert len(re.findall(r"^  \d+% d\d, token \d+: …", out, re.M)) == 10


def test_lm_eval(work: Path, port: int, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")
    (command,) = snippets("bash", "lm_eval")
    command = command.replace("max_length=2047", "max_length=255").strip()
    out = shell(f"HF_DATASETS_CACHE={tmp_path} {command} --output_path {tmp_path}/out", work, port)
    assert "word_perplexity" in out


def test_a_public_address(work: Path) -> None:
    (command,) = snippets("bash", "KNNLM_API_KEY")
    port = free_port()
    variable, _, rest = command.partition(" knnlm")
    server = start(f"env {variable} knnlm{rest}", work, port)
    wait_for(lambda: "ok" in shell("curl -s http://127.0.0.1:8000/health", work, port))
    url = "curl -s http://127.0.0.1:8000/v1/models"
    assert "invalid_api_key" in shell(url, work, port)
    assert "docs.store" in shell(f"{url} -H 'Authorization: Bearer sesame'", work, port)
    stop(server)


def test_in_python(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    (source,) = snippets("python", "Service")
    exec(source, {})
    out = capsys.readouterr().out
    assert "lmbda=0.2" in out
    assert "lmbda=0.1" in out
