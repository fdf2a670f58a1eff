"""Conversations in a datastore: only answers are stored, with the keys that a chat would have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, refusal
from serving import fresh_lm
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.datastore.append import append_documents
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.verification import verify
from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document
from knnlm.text.sources import read_documents

TALKS = [
    [
        {"role": "system", "content": "You know </s> keys."},
        {"role": "user", "content": "What is a key?"},
        {"role": "assistant", "content": "A hidden state."},
        {"role": "user", "content": PROSE[:90]},
        {"role": "assistant", "content": "Its value, then: naïve 🙂"},
    ],
    [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "One entry."}],
]


@pytest.fixture
def lm() -> LanguageModel:
    return fresh_lm()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [{"messages": talk, "source": "x"} for talk in TALKS]
    return write(tmp_path / "talks.jsonl", [*rows, {"messages": TALKS[0][:2]}])


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def conversations(*paths: Path) -> Any:
    return read_documents(*paths, text_column="messages", chat=True)


def answers(talks: list[Any]) -> list[str]:
    said = [message["content"] for talk in talks for message in talk if is_answer(message)]
    return [f"{content}</s>" for content in said]


def is_answer(message: Any) -> bool:
    return bool(message["role"] == "assistant")


@pytest.mark.parametrize("window", [256, 40])
def test_only_answers_are_stored(
    tmp_path: Path, lm: LanguageModel, path: Path, window: int
) -> None:
    store = build(tmp_path / "s", lm, conversations(path), window=window, key_dtype="float32")
    assert lm.decode(store.values) == "".join(answers(TALKS))
    ends = [token for token in store.values.tolist() if token in lm.end_tokens]
    assert len(ends) == 3, "the model is to end its turns too"
    assert [document.name for document in store.documents()] == [f"{path}:1", f"{path}:2"]
    assert verify(store).problems == ()
    again = build(tmp_path / "s", lm, conversations(path))
    assert again.changes is not None
    assert again.changes.unchanged == 2
    assert len(again) == len(store)


def test_keys_are_those_of_a_chat(tmp_path: Path, lm: LanguageModel, path: Path) -> None:
    store = build(tmp_path / "s", lm, conversations(path), window=256, key_dtype="float32")
    row = 0
    for talk in TALKS:
        for number, message in enumerate(talk):
            if not is_answer(message):
                continue
            prompt = lm.chat_template.encode(talk[:number])
            answer = [*lm.encode([message["content"]])[0].tolist(), lm.tokenizer.eos_token_id]
            keys = lm.keys(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
            stored = store.keys_at(torch.arange(row, row + len(answer)))
            torch.testing.assert_close(stored, keys.float(), atol=1e-5, rtol=1e-4)
            row += len(answer)
    assert row == len(store)
    model = KNNLM(lm, store, k=1, lmbda=1.0)
    assert model.chat(TALKS[1][:1], max_new_tokens=40).text == "One entry."


def test_documents_and_conversations_together(
    tmp_path: Path, lm: LanguageModel, path: Path
) -> None:
    documents = [Document("a", PROSE), *conversations(path), Document("b", PROSE[:50])]
    store = build(tmp_path / "s", lm, documents, window=64, context=16)
    assert lm.decode(store.values) == PROSE + "".join(answers(TALKS)) + PROSE[:50]


def test_an_interrupted_build_goes_on(tmp_path: Path, lm: LanguageModel, path: Path) -> None:
    whole = append_documents(tmp_path / "whole", lm, conversations(path), window=40, context=8)
    for most in range(1, len(whole) + 1, 7):
        part = tmp_path / f"part{most}"
        options: Any = {"window": 40, "context": 8, "shard_rows": 5}
        first = append_documents(part, lm, conversations(path), max_entries=most, **options)
        assert len(first) <= most
        store = append_documents(part, lm, conversations(path), **options)
        assert store.values.tolist() == whole.values.tolist()
        assert store.documents() == whole.documents()


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"messages": "Hello"}, (":1: messages must be a list", "got str", "--text-column")),
        ({"messages": []}, (":1: messages must hold at least one",)),
        ({"messages": [{"role": "tool", "content": "x"}]}, ("messages[0]: the role", "'tool'")),
        ({"messages": [{"role": "user"}]}, ("messages[0]: the content", "NoneType")),
        ({"text": "x"}, ("text_column 'messages' must be one of the columns", "'text'")),
    ],
)
def test_what_is_no_conversation_is_refused(
    tmp_path: Path, row: Any, parts: tuple[str, ...]
) -> None:
    with refusal(InvalidTextError, str(tmp_path / "bad.jsonl"), *parts):
        conversations(write(tmp_path / "bad.jsonl", [row]))


def test_a_text_is_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text(PROSE)
    with refusal(InvalidTextError, "page.txt", "rows with conversations", "without --chat"):
        conversations(tmp_path / "page.txt")


def test_a_stream_of_conversations_is_refused(
    tmp_path: Path, lm: LanguageModel, path: Path
) -> None:
    with refusal(InvalidArgumentError, "talks.jsonl:1", "boundary document, got stream"):
        build(tmp_path / "s", lm, conversations(path), boundary="stream")
    assert not (tmp_path / "s").exists()


def test_a_template_that_rewrites_answers_is_refused(
    tmp_path: Path, lm: LanguageModel, path: Path
) -> None:
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    with refusal(InvalidTextError, "talks.jsonl:1", "differently once", "what came before"):
        build(tmp_path / "s", lm, conversations(path))
    one = write(tmp_path / "one.jsonl", [{"messages": TALKS[1]}])
    store = build(tmp_path / "s", lm, conversations(one))
    assert lm.decode(store.values) == "<think>One entry.</s>"


def test_the_command(tmp_path: Path, lm: LanguageModel, path: Path) -> None:
    lm.save(tmp_path / "model")
    arguments = ["build", str(tmp_path / "s"), str(path), "--chat", "--model"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert lm.decode(Datastore(tmp_path / "s").values) == "".join(answers(TALKS))
    assert len(Datastore(tmp_path / "s").documents()) == 2
