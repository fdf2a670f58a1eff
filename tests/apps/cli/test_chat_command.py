"""Conversations in the terminal: answers are the library's, and commands do what they say."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, byte_tokenizer, refusal, tiny_llama
from serving import TEMPLATE, fresh_lm, opening, tiny_store
from typer.testing import CliRunner, Result

from knnlm.apps.cli.conversation import Conversation, written_by_passages
from knnlm.apps.cli.main import app
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.evaluation.explanation import Explanation, Source
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

MIXED = ("--k", "12", "--lmbda", "0.4", "--temperature", "10")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that can chat, one that cannot, and a datastore of each."""
    folder = tmp_path_factory.mktemp("chat")
    for name, template in [("chatty", TEMPLATE), ("mute", None)]:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        LanguageModel(tiny_llama(), tokenizer, name=name).save(folder / name)
        lm = LanguageModel.load(folder / name, dtype="float32", device="cpu")
        build(folder / f"{name}.store", lm, [Document("prose", PROSE * 2)], window=64)
    return folder


def run(work: Path, *arguments: str, says: str | None = None) -> Result:
    command, store, *others = arguments
    return CliRunner().invoke(app, [command, str(work / store), *others, *MIXED], input=says)


def library(work: Path) -> KNNLM:
    return KNNLM(
        LanguageModel.load(work / "chatty", dtype="float32", device="cpu"),
        Datastore(work / "chatty.store"),
        k=12,
        lmbda=0.4,
        temperature=10.0,
    )


def shown(text: str) -> str:
    """Return a text as the terminal shows it."""
    from knnlm.apps.cli.console import visible

    return visible(text)


def test_generate_answers_a_question(work: Path) -> None:
    arguments = ("generate", "chatty.store", "What is a key?", "--chat", "--max-new-tokens", "12")
    expected = library(work).chat(
        [{"role": "user", "content": "What is a key?"}], max_new_tokens=12
    )
    done = run(work, *arguments)
    assert done.stdout == shown(expected.text) + "\n"
    answer = json.loads(run(work, *arguments, "--json").stdout)
    assert answer == {
        "prompt": "What is a key?",
        "text": expected.text,
        "tokens": expected.tokens,
        "coverage": 1.0,
        "searches_saved": 0.0,
    }
    assert json.loads(run(work, *arguments[:3], "--json").stdout)["text"] != expected.text


@pytest.mark.parametrize(
    "command", [("generate", "mute.store", "x", "--chat"), ("chat", "mute.store")]
)
def test_a_model_that_cannot_chat_is_refused(work: Path, command: tuple[str, ...]) -> None:
    done = run(work, *command, says="Hello\n")
    assert done.exit_code == 1
    assert "must have a chat template" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_conversation_goes_on(work: Path) -> None:
    options = ("chat", "chatty.store", "--system", "Be brief.", "--max-new-tokens", "9")
    done = run(work, *options, says="What is a key?\n\nAnd a value?\n/sources\n/quit\nunread\n")
    assert done.exit_code == 0
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a key?"},
    ]
    model = library(work)
    first = model.chat(messages, max_new_tokens=9).text
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And a value?"},
    ]
    second = model.chat(messages, max_new_tokens=9).text
    out = done.stdout
    assert f"\n{shown(first)}\n{shown(second)}\n" in out
    assert out.index(shown(second)) < out.index("votes, prose, token ")
    assert done.stderr == ""


def test_commands(work: Path) -> None:
    says = "/sources\n/lmbda 0.9\n/lmbda\n/lmbda 2\n/lmbda x\n/what\n/help\n/clear\n"
    done = run(work, "chat", "chatty.store", says=says)
    assert done.exit_code == 0
    for part in ("there is no answer yet", "λ is 0.9", "λ is as at the beginning", "/sources "):
        assert part in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    for error, part in zip(errors, ["got 2.0", "got 'x'", "/what is no command"], strict=True):
        assert part in error


def test_refused_words_are_not_remembered(tmp_path: Path) -> None:
    conversation = Conversation(opening(tiny_store(tmp_path / "store")), max_tokens=5)
    assert "".join(conversation.answer("Hello")) == conversation.messages[-1]["content"]
    known = [*conversation.messages]
    with refusal(InvalidArgumentError, "the conversation", "256 positions", "begin a new one"):
        list(conversation.answer("é" * 200))
    with refusal(InvalidArgumentError, "messages[2]", "UTF-8"):
        list(conversation.answer("\udcff"))
    assert conversation.messages == known
    conversation.clear()
    assert conversation.messages == []
    assert conversation.explanations == []


def test_lmbda_changes_the_next_answer(tmp_path: Path) -> None:
    model = opening(tiny_store(tmp_path / "store"))
    conversation = Conversation(model, max_tokens=6)
    conversation.lmbda = 0.0

    assert "".join(conversation.answer("A store"))
    assert all(one.gain == pytest.approx(0.0, abs=1e-6) for one in conversation.explanations)
    conversation.clear()
    conversation.lmbda = 1.0
    list(conversation.answer("A store"))
    assert all(one.log_prob > one.lm_log_prob for one in conversation.explanations)


def test_an_interrupted_answer_is_remembered_as_far_as_it_goes(tmp_path: Path) -> None:
    conversation = Conversation(opening(tiny_store(tmp_path / "store")), max_tokens=20)
    parts = []
    for part in conversation.answer("Hello"):
        parts.append(part)
        if len(parts) == 3:
            signal.raise_signal(signal.SIGINT)
    assert len(parts) == 3
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(parts)}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(conversation.answer("Go on")), "the next one is answered"


def test_answers_are_sampled_if_asked(tmp_path: Path) -> None:
    model = opening(tiny_store(tmp_path / "store"))

    def answers(seed: int) -> list[str]:
        conversation = Conversation(model, max_tokens=8, sampling=SamplingOptions(1.0, 1.0, seed))
        return ["".join(conversation.answer(said)) for said in ("One", "Two")]

    assert answers(1) == answers(1) != answers(2)


def test_passages_are_put_together() -> None:
    def source(document: str, position: int, token: int, weight: float) -> Source:
        return Source("s", position, document, position, token, weight, 1.0, "a", "b", "c")

    def told(token: int, *sources: Source) -> Explanation:
        return Explanation(token, f"t{token}", f"t{token}", -1.0, 0.5, -0.5, sources)

    found = written_by_passages(
        [
            told(1, source("d", 7, 1, 0.5), source("d", 30, 1, 0.25), source("e", 7, 2, 0.25)),
            told(2, source("d", 8, 2, 0.75), source("d", 31, 5, 0.2)),
            told(3, source("d", 40, 3, 0.5)),
        ]
    )
    assert [(one.text, one.votes, one.first, one.source.position) for one in found] == [
        ("t1t2", 1.25, 7, 8),
        ("t3", 0.5, 40, 40),
        ("t1", 0.25, 30, 30),
    ]


def test_a_start_token_is_not_doubled() -> None:
    lm = fresh_lm()
    said: list[Any] = [{"role": "user", "content": "Hello"}]
    tokens = lm.chat_template.encode(said)
    assert tokens[0] == lm.start_token != tokens[1]
