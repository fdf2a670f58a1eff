"""Clients that nobody here wrote: lm-eval's perplexity, and requests that a fuzzer makes up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from conftest import PROSE, byte_tokenizer
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Served, opening, serving, tiny_store

from knnlm.apps.engine.limits import Limits
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
LINES = [PROSE.strip(), "The nearest zebra.", "Another memory of places.", PROSE[100:].strip()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("clients") / "store")


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(lambda: opening(path), Limits(max_tokens=20, max_batch=4, max_queue=50)) as one:
        yield one


def test_lm_eval_gives_the_perplexity_of_eval(
    served: Served, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'"
    )
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "held-out.txt").write_text("\n".join(LINES))
    (tmp_path / "held_out.yaml").write_text(f"""\
task: held_out
dataset_path: text
dataset_kwargs:
  data_files:
    test: {tmp_path}/held-out.txt
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""")
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{served.url}/v1/completions",
            "tokenizer": str(tmp_path / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "max_length": 255,  # with the one token that the harness asks for beside
            "num_concurrent": 3,
            "max_retries": 1,
        },
        tasks=["held_out"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["held_out"]
    documents = [Document(str(number), line) for number, line in enumerate(LINES)]
    model = opening(path)
    report = model.perplexity(documents, windowing=Windowing(256, 0))
    assert found["word_perplexity,none"] == pytest.approx(report.knn.word_perplexity, rel=1e-5)
    assert found["bits_per_byte,none"] == pytest.approx(report.knn.bits_per_byte, rel=1e-5)
    assert report.knn.perplexity < 0.98 * report.lm.perplexity, "the datastore must matter here"


ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/explain"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


# it is the server's threads that may use it while a request is made up
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize(
    ("method", "route", "mode"),
    [(*one, GenerationMode.POSITIVE) for one in ROUTES]
    # what has no body cannot be wrong
    + [(*one, GenerationMode.NEGATIVE) for one in ROUTES if one[0] == "POST"],
)
def test_no_request_makes_the_server_fail(
    served: Served, method: str, route: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    described = schema.raw_schema["paths"].items()
    assert {(name.upper(), path) for path, names in described for name in names} == set(ROUTES)
    operation = schema[route][method]
    statuses = set()

    @seed(0)
    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=300).status_code)

    check()
    assert max(statuses) < 500
    if mode is GenerationMode.POSITIVE and "{" not in route:
        assert 200 in statuses
