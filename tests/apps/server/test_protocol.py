"""The protocol as the official client and others speak it, against the kNN-LM in process."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from conftest import PROSE
from pydantic import ValidationError
from serving import Served, opening, serving, tiny_store

from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.sampling import Sampler, SamplingOptions
from knnlm.apps.server.schema import CompletionRequest, CompletionResponse, ExplainResponse, Health
from knnlm.apps.server.service import Service
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explain import explain
from knnlm.knn_lm import KNNLM

TEXT = "A datastore is a retriever: one entry for every token of the"
LIMITS = Limits(max_tokens=100, max_batch=8, max_queue=40, max_body_bytes=20_000)
KEY = "sesame-öffne-dich".encode().hex()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("protocol") / "store")


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(lambda: opening(path), LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def model(path: Path) -> KNNLM:
    """The same in process, with a language model of its own."""
    return opening(path)


def log_probs_of(model: KNNLM, tokens: list[int]) -> list[float]:
    """Log p of all tokens but the first."""
    log_probs = model.log_probs(torch.tensor([tokens]))[0, :-1]
    found: list[float] = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    return found


def tokens_of(model: KNNLM, text: str) -> list[int]:
    tokens: list[int] = model.lm.encode([text])[0].tolist()
    return tokens


def test_greedy_completions_are_those_of_generate(served: Served, model: KNNLM) -> None:
    texts = [TEXT, "", "x", PROSE[:120]]
    answer = served.complete(texts, max_tokens=20, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    generated = 0
    for text, choice in zip(texts, answer.choices, strict=True):
        generation = model.generate(text, max_new_tokens=20)
        ended = generation.tokens[-1] == model.lm.tokenizer.eos_token_id
        assert choice.text == generation.text
        assert choice.finish_reason == ("stop" if ended else "length")
        generated += len(generation.tokens) - ended
    assert answer.usage.completion_tokens == generated
    assert answer.usage.prompt_tokens == sum(len(tokens_of(model, text)) for text in texts)
    assert answer.usage.total_tokens == generated + answer.usage.prompt_tokens
    assert answer.object == "text_completion"
    assert answer.model == "tiny"


def test_a_default_completion_has_16_tokens(served: Served) -> None:
    answer = served.complete(TEXT, seed=1)
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("options", [{}, {"lmbda": 0.9, "k": 3, "knn_temperature": 99.0}])
def test_scoring_a_prompt(served: Served, path: Path, options: dict[str, Any]) -> None:
    answer = served.complete(TEXT, max_tokens=0, echo=True, logprobs=2, **options)
    (choice,) = answer.choices
    names = {"knn_temperature": "temperature"}
    model = opening(path, **{names.get(name, name): value for name, value in options.items()})
    tokens = tokens_of(model, TEXT)
    assert choice.text == TEXT
    assert choice.finish_reason == "length"
    expected = log_probs_of(model, [model.lm.start_token, *tokens])
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=2e-5)
    assert choice.logprobs.tokens == [model.lm.decode([token]) for token in tokens]
    assert "".join(choice.logprobs.tokens) == TEXT
    offsets = choice.logprobs.text_offset
    assert [TEXT[offset:] for offset in offsets] == [
        model.lm.decode(tokens[number:]) for number in range(len(tokens))
    ]
    for top in choice.logprobs.top_logprobs:
        assert 2 <= len(top) <= 3


def test_token_ids_are_taken_as_they_are(served: Served, model: KNNLM) -> None:
    tokens = tokens_of(model, TEXT)
    one = served.complete(tokens, max_tokens=1, echo=True, logprobs=0, temperature=0)
    several = served.complete([tokens[3:], tokens], max_tokens=0, echo=True, logprobs=0)
    scores = one.choices[0].logprobs.token_logprobs
    assert one.choices[0].text.startswith(TEXT)
    assert scores[0] is None
    assert several.choices[0].text == model.lm.decode(tokens[3:])
    assert several.choices[1].logprobs.token_logprobs == pytest.approx(scores[:-1], abs=2e-5)
    assert scores[1:-1] == pytest.approx(log_probs_of(model, tokens), abs=2e-5)


def test_what_is_impossible_has_a_number(served: Served, model: KNNLM) -> None:
    """λ = 1 gives most tokens probability 0, whose logarithm is not JSON."""
    answer = served.complete(TEXT, max_tokens=0, echo=True, logprobs=5, lmbda=1.0, k=1)
    scores = answer.choices[0].logprobs.token_logprobs
    assert min(scores) == -9999.0
    assert all(math.isfinite(value) for value in scores)


def test_streams_are_the_whole_in_pieces(served: Served) -> None:
    options: dict[str, Any] = {
        "max_tokens": 30, "n": 3, "seed": 7, "logprobs": 1, "echo": True, "sources": 2,
    }  # fmt: skip
    prompts = [TEXT, "x"]
    whole = served.complete(prompts, **options)
    stream = served.complete(
        prompts, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = stream
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [c for chunk in chunks[:-1] for c in chunk.choices if c.index == choice.index]
        assert len(parts) > 2
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [
            choice.finish_reason
        ]
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [value for part in parts for value in getattr(part.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            assert joined == (pytest.approx(expected, abs=1e-5) if "prob" in name else expected)
        sources = [one for part in parts for one in part.model_dump()["sources"]]
        assert [one["token"] for one in sources] == [
            one["token"] for one in choice.model_dump()["sources"]
        ]
    assert len({choice.text for choice in whole.choices}) == 6


def test_server_sent_events_by_hand(served: Served) -> None:
    with served.http() as client:
        body = {"prompt": TEXT, "max_tokens": 3, "temperature": 0, "stream": True}
        answer = client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        CompletionResponse.model_validate_json(event.removeprefix("data: "))


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences(served: Served, stream: bool) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "logprobs": 0}
    free = served.complete(TEXT, **options).choices[0]
    middle = free.text[len(free.text) // 2 :]
    for stop in (middle[:1], middle[:5], ["never there", middle[3:9], middle[:12]]):
        answer = served.complete(TEXT, stop=stop, stream=stream, **options)
        pieces = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
        ends = [stop] if isinstance(stop, str) else stop
        first = min(free.text.find(end) + len(end) for end in ends if end in free.text)
        wanted = min(
            free.text.find(end)
            for end in ends
            if end in free.text and free.text.find(end) + len(end) == first
        )
        assert "".join(piece.text for piece in pieces) == free.text[:wanted]
        assert pieces[-1].finish_reason == "stop"
        offsets = [offset for piece in pieces for offset in piece.logprobs.text_offset]
        assert offsets == [o for o in free.logprobs.text_offset if o < wanted]


def test_sources_come_with_their_passages(served: Served, model: KNNLM) -> None:
    choice = served.complete(TEXT, max_tokens=5, temperature=0, sources=True).choices[0]
    sources = choice.model_dump()["sources"]
    assert "".join(one["text"] for one in sources) == choice.text
    store = model.retrievers[0].store
    documents = {document.name: document for document in store.documents()}
    for one in sources:
        assert len(one["sources"]) == 3
        assert one["gain"] == pytest.approx(one["log_prob"] - one["lm_log_prob"])
        weights = [source["weight"] for source in one["sources"]]
        assert weights == sorted(weights, reverse=True)
        for source in one["sources"]:
            row = documents[source["document"]].start + source["position"]
            assert row == source["row"]
            passage = store.passage(row)
            assert source["before"] == model.lm.decode(passage.before)
            assert source["value"] == model.lm.decode([passage.value])
    assert served.complete(TEXT, max_tokens=2).choices[0].model_dump().get("sources") is None


def test_explain(served: Served, model: KNNLM) -> None:
    with served.http() as client:
        answer = client.post("/v1/explain", json={"text": TEXT, "sources": 2, "before": 3})
        found = ExplainResponse.model_validate_json(answer.text).tokens
        other = client.post("/v1/explain", json={"text": TEXT, "lmbda": 0.0})
    expected = explain(model, TEXT, sources=2, before=3)
    assert [one.token for one in found] == [one.token for one in expected]
    for one, wanted in zip(found, expected, strict=True):
        assert one.log_prob == pytest.approx(wanted.log_prob, abs=1e-5)
        assert [s.before for s in one.sources] == [s.before for s in wanted.sources]
    assert all(one["gain"] == 0.0 for one in other.json()["tokens"])


SAMPLING: list[dict[str, Any]] = [
    {"logit_bias": {"66": 100}},
    {"logit_bias": {"32": -100, "101": 2.5}, "temperature": 0},
    {"top_k": 2, "temperature": 2.0},
    {"min_p": 0.3, "temperature": 2.0},
    {"top_p": 0.5, "top_k": 7, "temperature": 1.5},
    {"presence_penalty": 2, "temperature": 0},
    {"frequency_penalty": 1.5, "temperature": 0},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 1.4, "temperature": 0},
    {
        **{"logit_bias": {"32": 1}, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        **{"frequency_penalty": 0.5, "top_k": 20, "min_p": 0.01, "top_p": 0.9},
    },
]


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("stream", [False, True])
def test_sampling_options_act_on_the_mixture(
    served: Served, model: KNNLM, options: dict[str, Any], stream: bool
) -> None:
    """A sampler with the same seed, and the mixture in process, choose the same tokens."""
    fields = {"max_tokens": 12, "seed": 3, "n": 2, "logprobs": 0, "stream": stream, **options}
    found = served.complete(TEXT, **fields)
    chunks = found if stream else [found]
    own = dict(options)
    own["logit_bias"] = {int(token): bias for token, bias in own.get("logit_bias", {}).items()}
    for sample in range(2):
        prompt = [model.lm.start_token, *tokens_of(model, TEXT)]
        sampler = Sampler(SamplingOptions(seed=3, **own), sample, prompt)
        log_probs: list[float] = []
        tokens: list[int] = []
        while len(tokens) < 12:
            last = model.log_probs(torch.tensor([prompt + tokens]))[0, -1]
            token = sampler.next_token(last)
            if token in model.lm.end_tokens:
                break
            tokens.append(token)
            log_probs.append(float(last[token]))
        choices = [one for chunk in chunks for one in chunk.choices if one.index == sample]
        assert "".join(one.text for one in choices) == model.lm.decode(tokens)
        reported = [nats for one in choices for nats in one.logprobs.token_logprobs]
        assert reported == pytest.approx(log_probs, abs=2e-5), "the mixture's own"


def test_options_of_generate_mean_the_same(served: Served, model: KNNLM) -> None:
    answer = served.complete(TEXT, max_tokens=20, temperature=0, repetition_penalty=1.3)
    assert (
        answer.choices[0].text
        == model.generate(TEXT, max_new_tokens=20, repetition_penalty=1.3).text
    )


def test_options_that_change_nothing(served: Served) -> None:
    plain = served.complete(TEXT, max_tokens=20, seed=5).choices[0].text
    neutral = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "logit_bias": {}}
    zero = {"presence_penalty": 0, "frequency_penalty": 0}
    assert served.complete(TEXT, max_tokens=20, seed=5, **neutral, **zero).choices[0].text == plain


def test_head_of_health(served: Served) -> None:
    with served.http() as client:
        asked, answered = client.head("/health"), client.get("/health")
    assert (asked.status_code, asked.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert asked.headers[name] == answered.headers[name]


PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_no_page_from_elsewhere_by_default(served: Served) -> None:
    with served.http() as client:
        assert client.options("/v1/completions", headers=PREFLIGHT).status_code == 405
        for route in ("/health", "/v1/models"):
            answer = client.get(route, headers={"Origin": PAGE})
            assert not any("access-control" in name for name in answer.headers)


@pytest.mark.parametrize("origins", [[PAGE, "http://localhost:3000"], ["*"]])
def test_pages_of_the_given_origins(path: Path, origins: list[str]) -> None:
    with (
        serving(lambda: opening(path), LIMITS, api_key=KEY, cors_origins=origins) as running,
        running.http() as client,
    ):
        expected = "*" if origins == ["*"] else PAGE
        preflight = client.options("/v1/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type"} <= set(allowed.replace(" ", "").split(","))
        refused = client.get("/v1/models", headers={"Origin": PAGE})
        check_error(refused, 401)
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        headers = {"Origin": PAGE, "Authorization": f"Bearer {KEY}"}
        answered = client.post("/v1/completions", content=body, headers=headers)
        assert answered.status_code == 200
        for answer in (preflight, refused, answered):
            assert answer.headers["access-control-allow-origin"] == expected
        if origins != ["*"]:
            other = {**headers, "Origin": "https://other.example"}
            answered = client.post("/v1/completions", content=body, headers=other)
            assert "access-control-allow-origin" not in answered.headers
            stranger = {**PREFLIGHT, "Origin": "https://other.example"}
            assert client.options("/v1/completions", headers=stranger).status_code == 400


@pytest.mark.parametrize(
    "origin",
    ["", "page.example", "https://page.example/", "https://Page.example", "https://a b", "null"],
)
def test_what_is_no_origin_is_refused(path: Path, origin: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cors_origins must be like https://"):
        Service(lambda: opening(path), name="x", cors_origins=[origin])


@pytest.mark.parametrize(
    "origin",
    ["*", "https://page.example", "http://localhost:3000", "http://[::1]:80", "app://local"],
)
def test_origins(path: Path, origin: str) -> None:
    Service(lambda: opening(path), name="x", cors_origins=[origin])


def test_models_and_health(served: Served) -> None:
    with served.openai() as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "knnlm"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
    with served.http() as client:
        health = Health.model_validate_json(client.get("/health").text)
        assert health.status == "ok"
        assert health.entries[0] > 100


def samples(page: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics(served: Served) -> None:
    with served.http() as client:
        before = samples(client.get("/metrics").text)
        answer = served.complete(TEXT, max_tokens=7, temperature=0)
        client.get("/nowhere")
        client.get("/v1/completions")
        page = client.get("/metrics")
    after = samples(page.text)
    assert page.headers["content-type"].startswith("text/plain")

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('knnlm_requests_total{route="/v1/completions",status="200"}') == 1
    assert grown('knnlm_requests_total{route="other",status="404"}') == 1
    assert grown('knnlm_requests_total{route="/v1/completions",status="405"}') == 1
    assert grown("knnlm_generated_tokens_total") == 7
    assert grown("knnlm_prompt_tokens_total") == answer.usage.prompt_tokens + 1, "the start token"
    assert grown("knnlm_first_token_seconds_count") == 1
    assert grown('knnlm_request_seconds_count{route="/v1/completions"}') == 2
    assert grown("knnlm_model_seconds_total") > 0
    assert grown("knnlm_search_seconds_total") > 0
    assert after["knnlm_waiting"] == 0
    deadline = time.monotonic() + 10  # the model thread counts its rows after the last answer
    while after["knnlm_running"] and time.monotonic() < deadline:
        with served.http() as client:
            after = samples(client.get("/metrics").text)
    assert after["knnlm_running"] == 0


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "required"),
    ({"prompt": 3}, "prompt", "string"),
    ({"prompt": []}, "prompt", ""),
    ({"prompt": [[]]}, "prompt", ""),
    ({"prompt": [True]}, "prompt", ""),
    ({"prompt": ["a", 3]}, "prompt", ""),
    ({"prompt": [384]}, "prompt", "below 384"),
    ({"prompt": [10**30]}, "prompt", "less than 2147483648"),
    ({"prompt": [-1]}, "prompt", ""),
    ({"prompt": None}, "prompt", ""),
    ({"prompt": "x", "max_tokens": 101}, "max_tokens", "at most 100"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens", "0"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "integer"),
    ({"prompt": "x", "max_tokens": 10**4000}, "max_tokens", "less than or equal"),
    ({"prompt": "x", "temperature": 2.1}, "temperature", "2"),
    ({"prompt": "x", "temperature": -0.1}, "temperature", "0"),
    ({"prompt": "x", "temperature": float("nan")}, "temperature", "finite"),
    ({"prompt": "x", "top_p": float("inf")}, "top_p", "finite"),
    ({"prompt": "x", "top_p": 1.1}, "top_p", "1"),
    ({"prompt": "x", "n": 0}, "n", "1"),
    ({"prompt": "x", "n": 9}, "n", "at most 8"),
    ({"prompt": ["x"] * 41}, "prompt", "40"),
    ({"prompt": ["x"] * 6, "n": 7}, "prompt", "more completions than the 40"),
    ({"prompt": "x " * 300, "max_tokens": 1}, "prompt", "256 positions"),
    ({"prompt": "x", "stop": ""}, "stop", ""),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "16"),
    ({"prompt": "x", "stop": [3]}, "stop", ""),
    ({"prompt": "x", "logprobs": 6}, "logprobs", "5"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "integer"),
    ({"prompt": "x", "seed": 2**63}, "seed", ""),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, None, "stream: true"),
    ({"prompt": "x", "stream": True, "stream_options": {"x": 1}}, "stream_options", ""),
    ({"prompt": "x", "best_of": 2}, None, "best_of"),
    ({"prompt": "x", "presence_penalty": 2.5}, "presence_penalty", "[-2, 2], got 2.5"),
    ({"prompt": "x", "presence_penalty": "1"}, "presence_penalty", "number"),
    ({"prompt": "x", "frequency_penalty": -2.01}, "frequency_penalty", "[-2, 2], got -2.01"),
    ({"prompt": "x", "frequency_penalty": float("nan")}, "frequency_penalty", "finite"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "got 0"),
    ({"prompt": "x", "repetition_penalty": True}, "repetition_penalty", "number"),
    ({"prompt": "x", "top_k": -1}, "top_k", "0 allows every token"),
    ({"prompt": "x", "top_k": 1.5}, "top_k", "integer"),
    ({"prompt": "x", "min_p": 1.1}, "min_p", "[0, 1], got 1.1"),
    ({"prompt": "x", "min_p": -0.1}, "min_p", "[0, 1], got -0.1"),
    ({"prompt": "x", "logit_bias": {"50256": -100}}, "logit_bias", "below 384"),
    ({"prompt": "x", "logit_bias": {"1" * 30: 1}}, "logit_bias", ""),
    ({"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias", ""),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", ""),
    ({"prompt": "x", "logit_bias": {"01": 1}}, "logit_bias", ""),
    ({"prompt": "x", "logit_bias": {"7": 100.5}}, "logit_bias", "[-100, 100], got 100.5"),
    ({"prompt": "x", "logit_bias": {"7": None}}, "logit_bias", "number"),
    ({"prompt": "x", "logit_bias": [7, 1]}, "logit_bias", "dictionary"),
    ({"prompt": "x", "suffix": "y"}, "suffix", ""),
    ({"prompt": "x", "lambda": 0.5}, "lambda", "not a field"),
    ({"prompt": "x", "lmbda": 1.1}, "lmbda", "1"),
    ({"prompt": "x", "lmbda": [0.5, 0.5]}, None, "one for each of the 1"),
    ({"prompt": "x", "lmbda": []}, None, "one for each of the 1"),
    ({"prompt": "x", "k": 0}, "k", "1"),
    ({"prompt": "x", "k": 10**6}, None, "at most the number of entries"),
    ({"prompt": "x", "knn_temperature": 0.0}, "knn_temperature", "0"),
    ({"prompt": "x", "sources": 65}, "sources", "64"),
    ({"prompt": "x", "sources": -1}, "sources", "0"),
]


def check_error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """Return the error object, which has OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = json.loads(answer.text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param", "part"), BAD)
def test_bad_requests(
    served: Served, body: dict[str, Any], param: str | None, part: str, stream: bool
) -> None:
    if stream and "stream_options" not in body:
        body = body | {"stream": True}
    with served.http() as client:
        answer = client.post("/v1/completions", content=dumps(body))
    error = check_error(answer, 400)
    assert error["param"] == param
    assert part in error["message"]


def dumps(body: dict[str, Any]) -> bytes:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(body).encode()
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": "\xe9"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "temperature": 1e999}', 400),
        (b"[" * 15_000, 400),
        (b'{"a":' * 3_000, 400),
        (b'{"prompt": "' + b"x" * 30_000 + b'"}', 413),
        (b" " * 3_000_000, 413),
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/explain"])
def test_bad_bodies(served: Served, content: bytes, status: int, route: str) -> None:
    with served.http() as client:
        check_error(client.post(route, content=content), status)


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_only_json(served: Served, kind: str) -> None:
    with served.http() as client:
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        headers = {"Content-Type": kind}
        error = check_error(client.post("/v1/completions", content=body, headers=headers), 415)
        assert "application/json" in error["message"]
        headers = {"Content-Type": "application/json; charset=utf-8"}
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_a_body_without_a_length(served: Served) -> None:
    with served.http() as client:
        pieces = (b" " * 10_000 for _ in range(50))
        check_error(client.post("/v1/completions", content=pieces), 413)
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        good = client.post("/v1/completions", content=(bytes([byte]) for byte in body))
        assert good.status_code == 200


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/completions/", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PATCH", "/health", 405),
    ],
)
def test_where_there_is_nothing(served: Served, method: str, route: str, status: int) -> None:
    with served.http() as client:
        check_error(client.request(method, route), status)


def test_another_model(served: Served) -> None:
    with served.openai() as client, pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="davinci", prompt="x")
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"


def test_texts_to_explain_have_a_size(served: Served) -> None:
    with served.http() as client:
        check_error(client.post("/v1/explain", json={"text": ""}), 400)
        error = check_error(client.post("/v1/explain", json={"text": "x " * 200}), 400)
        assert "1 to 100 tokens" in error["message"]
        check_error(client.post("/v1/explain", json={"text": "x", "k": 10**6}), 400)


@pytest.mark.parametrize(
    "prompt",
    ["\n" * 200, "", "<s>", "</s></s>", "\x00\x01", "日本語🙂", "\ufffd", "a" * 150, "\r\n\t  "],
)
def test_odd_prompts(served: Served, model: KNNLM, prompt: str) -> None:
    answer = served.complete(prompt, max_tokens=10, temperature=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    generation = model.generate(prompt, max_new_tokens=10)
    assert choice.text == prompt + generation.text


@pytest.mark.parametrize("host", ["knnlm.example", "localhost.example:80", "10.0.0.1", ""])
def test_a_name_that_was_pointed_here_is_refused(served: Served, host: str) -> None:
    with served.http() as client:
        answer = client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert "--api-key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000"])
def test_this_machines_own_names_are_answered(served: Served, host: str) -> None:
    with served.http() as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_key(path: Path) -> None:
    with serving(lambda: opening(path), api_key=KEY) as served:
        with served.openai(api_key=KEY) as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        for wrong in ("none", KEY[:-1], KEY + "0", "", "ключ".encode().hex()):
            with (
                served.openai(api_key=wrong or "x") as client,
                pytest.raises(openai.AuthenticationError) as raised,
            ):
                client.completions.create(model="tiny", prompt="x", max_tokens=1)
            assert raised.value.code == "invalid_api_key"
        with served.http() as http:
            assert http.get("/health").status_code == 200
            for header in ({}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
                for route in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                    check_error(http.get(route, headers=header), 401)
                check_error(http.post("/v1/completions", headers=header, content=b"{"), 401)
            right = {"Authorization": f"bearer {KEY}"}
            assert http.get("/metrics", headers=right).status_code == 200
            check_error(http.get("/nowhere", headers=right), 404)


def test_a_bias_for_too_many_tokens() -> None:
    most = 1 << 14
    biases = {str(token): 1 for token in range(most + 1)}
    with pytest.raises(ValidationError, match=f"at most {most} items"):
        CompletionRequest.model_validate({"prompt": "x", "logit_bias": biases})
    del biases["0"]
    CompletionRequest.model_validate({"prompt": "x", "logit_bias": biases})
