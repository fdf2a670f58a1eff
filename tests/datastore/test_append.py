"""Building: every token once, resumable after any kill, equal however it was interrupted."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, documents_of, tiny_gpt2, tiny_llama
from stores import assert_same, model_with_keys_times

from knnlm.datastore.append import append_documents
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.verification import verify
from knnlm.errors import (
    DatastoreMismatchError,
    InvalidArgumentError,
    InvalidTextError,
    NonFiniteKeysError,
)
from knnlm.model import reading
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document
from knnlm.text.sources import read_documents


def test_every_token_is_a_value_and_its_key_is_the_models(
    tmp_path: Path, tiny_lm: LanguageModel
) -> None:
    documents = documents_of(5)
    store = append_documents(
        tmp_path / "store", tiny_lm, documents, window=64, context=16, shard_rows=100
    )
    assert verify(store).problems == ()
    tokens = tiny_lm.encode([PROSE * (1 + n % 3) for n in range(5)])
    assert store.rows == sum(map(len, tokens))
    for stored, expected in zip(store.documents(), tokens, strict=True):
        assert store.values[stored.start : stored.stop].tolist() == expected.tolist()
        assert stored.complete

    # the slow way: each position's key from a window that ends there, read alone
    keys = torch.cat([block for _, block in store.key_blocks(1 << 20)]).float()
    sequence = torch.tensor([tiny_lm.start_token, *tokens[1].tolist()])
    start = store.documents()[1].start
    for position in range(0, len(tokens[1]), 7):
        # later windows score 48 new positions after 16 of context
        first = 0 if position < 64 else 64 + (position - 64) // 48 * 48 - 16
        alone = tiny_lm.keys(sequence[None, first : position + 1])[0, -1]
        torch.testing.assert_close(keys[start + position], alone, atol=5e-3, rtol=2e-3)


def test_stream_stores_every_token_but_the_first(tmp_path: Path, llama_lm: LanguageModel) -> None:
    store = append_documents(
        tmp_path / "s", llama_lm, documents_of(4), window=32, context=0, boundary="stream"
    )
    stream = [
        token
        for tokens in llama_lm.encode([PROSE * (1 + n % 3) for n in range(4)])
        for token in (llama_lm.start_token, *tokens.tolist())
    ]
    assert store.values.tolist() == stream[1:]
    keys = torch.cat([block for _, block in store.key_blocks(1 << 20)]).float()
    alone = llama_lm.keys(torch.tensor([stream[64:96]]))[0]
    torch.testing.assert_close(keys[64:96], alone, atol=5e-3, rtol=2e-3)


def test_stream_with_context_drops_the_first_block(tmp_path: Path, llama_lm: LanguageModel) -> None:
    arguments: dict[str, Any] = {"boundary": "stream", "window": 48, "context": 16}
    store = append_documents(tmp_path / "s", llama_lm, documents_of(4), **arguments)
    whole = append_documents(
        tmp_path / "whole", llama_lm, documents_of(4), boundary="stream", window=48, context=0
    )
    assert store.rows == whole.rows - 32
    assert torch.equal(store.values, whole.values[32:])
    assert verify(store).problems == ()


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 64, "context": 16},
        {"window": 64, "context": 0, "boundary": "stream"},
        {"window": 64, "context": 24, "boundary": "stream"},
    ],
    ids=["document", "stream", "stream-context"],
)
@pytest.mark.parametrize("failures", [1, 4])
def test_an_interrupted_build_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_lm: LanguageModel, arguments: dict[str, Any], failures: int
) -> None:
    documents = documents_of(9)
    whole = append_documents(tmp_path / "whole", tiny_lm, documents, shard_rows=150, **arguments)

    chance = random.Random(failures)
    for _ in range(failures):
        stop_at = chance.randrange(1, len(documents))

        def stops() -> Iterator[Document]:
            yield from documents[:stop_at]  # noqa: B023
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            append_documents(tmp_path / "resumed", tiny_lm, stops(), shard_rows=150, **arguments)
    resumed = append_documents(
        tmp_path / "resumed", tiny_lm, documents, shard_rows=150, **arguments
    )
    assert verify(resumed).problems == ()
    assert_same(resumed, whole)


@pytest.mark.parametrize("boundary", ["document", "stream"])
@pytest.mark.parametrize("context", [0, 16])
def test_empty_documents_do_not_keep_a_build_from_going_on(
    tmp_path: Path, llama_lm: LanguageModel, boundary: str, context: int
) -> None:
    arguments: dict[str, Any] = {
        "window": 64,
        "context": context,
        "boundary": boundary,
        "shard_rows": 64,
    }
    documents = [Document("empty", ""), *documents_of(3), Document("also empty", "")]
    whole = append_documents(tmp_path / "whole", llama_lm, documents, **arguments)
    assert all(document.complete for document in whole.documents())
    assert_same(
        append_documents(tmp_path / "without", llama_lm, documents_of(3), **arguments), whole
    )
    for max_entries in range(50, whole.rows, 100):
        append_documents(
            tmp_path / "part", llama_lm, documents, max_entries=max_entries, **arguments
        )
    part = append_documents(tmp_path / "part", llama_lm, documents, **arguments)
    assert part.forgotten_rows == 0
    assert torch.equal(part.values, whole.values)
    assert [d.complete for d in part.documents()] == [True] * 3


def test_max_entries_stops_and_goes_on(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    documents = documents_of(9)
    whole = append_documents(
        tmp_path / "whole", tiny_lm, documents, window=64, context=16, shard_rows=150
    )
    part = append_documents(
        tmp_path / "part",
        tiny_lm,
        documents,
        window=64,
        context=16,
        shard_rows=150,
        max_entries=700,
    )
    assert 700 - 64 < part.rows <= 700
    assert [d.complete for d in part.documents()].count(False) <= 1
    again = append_documents(tmp_path / "part", tiny_lm, documents, shard_rows=150, max_entries=700)
    assert again.generation == part.generation, "nothing to do, nothing done"
    grown = append_documents(tmp_path / "part", tiny_lm, documents, shard_rows=150)
    assert torch.equal(grown.values, whole.values)
    assert [d.name for d in grown.documents()] == [d.name for d in whole.documents()]


def test_appending_skips_what_is_there_and_replaces_what_changed(
    tmp_path: Path, tiny_lm: LanguageModel
) -> None:
    documents = documents_of(3)
    store = append_documents(tmp_path / "store", tiny_lm, documents, window=64, context=16)
    rows, generation = store.rows, store.generation
    assert append_documents(tmp_path / "store", tiny_lm, documents).generation == generation

    changed = [Document("d1", "Something else entirely."), Document("new", "A new document.")]
    store = append_documents(tmp_path / "store", tiny_lm, [*documents[:1], *changed, documents[2]])
    assert [d.name for d in store.documents()] == ["d0", "d2", "d1", "new"]
    old = len(tiny_lm.encode([str(documents[1].text)])[0])
    assert store.forgotten_rows == old
    assert store.rows == rows + sum(
        len(new) for new in tiny_lm.encode([str(d.text) for d in changed])
    )
    assert verify(store).problems == ()


def test_an_unfinished_document_with_a_changed_text_is_replaced(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    long = Document("long", PROSE * 9)
    part = append_documents(
        tmp_path / "s", llama_lm, [long], window=64, context=16, max_entries=200
    )
    assert not part.documents()[0].complete
    store = append_documents(tmp_path / "s", llama_lm, [Document("long", PROSE * 2)])
    (document,) = store.documents()
    assert document.complete
    assert len(store) == len(llama_lm.encode([PROSE * 2])[0])


def test_the_same_document_twice_is_stored_once(tmp_path: Path, llama_lm: LanguageModel) -> None:
    documents = documents_of(2)
    store = append_documents(
        tmp_path / "s", llama_lm, [*documents, *documents], window=64, context=0
    )
    assert [d.name for d in store.documents()] == ["d0", "d1"]


def test_documents_without_text_leave_no_trace(tmp_path: Path, llama_lm: LanguageModel) -> None:
    documents = [Document("empty", ""), *documents_of(2), Document("also empty", "")]
    store = append_documents(tmp_path / "s", llama_lm, documents, window=64, context=0)
    assert [d.name for d in store.documents()] == ["d0", "d1"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 0.0)]
)
def test_key_dtypes(tmp_path: Path, llama_lm: LanguageModel, dtype: str, tolerance: float) -> None:
    documents = documents_of(1)
    store = append_documents(
        tmp_path / "s", llama_lm, documents, window=256, context=0, key_dtype=dtype
    )
    (_, keys), *_ = store.key_blocks(1 << 20)
    assert str(keys.dtype) == f"torch.{dtype}"
    tokens = llama_lm.encode([PROSE])[0].tolist()
    expected = llama_lm.keys(torch.tensor([[llama_lm.start_token, *tokens[:-1]]]))[0]
    torch.testing.assert_close(keys.float(), expected, atol=tolerance, rtol=tolerance)


def test_keys_beyond_float16_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    large = model_with_keys_times(1e6)
    with pytest.raises(NonFiniteKeysError, match="key_dtype float16 cannot hold a key of d0"):
        append_documents(tmp_path / "s", large, documents_of(1), window=64, context=0)
    assert not (tmp_path / "s").exists()
    assert len(append_documents(tmp_path / "s", large, documents_of(1), key_dtype="bfloat16")) > 0


def test_keys_that_are_not_finite_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteKeysError, match="a key of d0 is not finite: broken in"):
        append_documents(tmp_path / "s", model_with_keys_times(float("nan")), documents_of(1))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 10, "context": 10}, r"context must be at least 0 and less than window \(10\)"),
        ({"window": 257}, "window must be at most 256 for tiny, got 257"),
        ({"boundary": "page"}, "boundary must be one of document, stream, got 'page'"),
        ({"key_dtype": "int8"}, "key_dtype must be one of float16, bfloat16, float32, got 'int8'"),
        ({"max_entries": 0}, "max_entries must be at least 1, got 0"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, got 0"),
    ],
)
def test_bad_arguments_leave_nothing_behind(
    tmp_path: Path, llama_lm: LanguageModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        append_documents(tmp_path / "deep" / "s", llama_lm, documents_of(1), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_fails_before_the_first_commit_leaves_nothing_behind(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good until \xff here")
    with pytest.raises(InvalidTextError, match=r"bad\.txt must be UTF-8, but byte 11 is not"):
        append_documents(tmp_path / "s", llama_lm, read_documents(tmp_path / "bad.txt"))
    assert not (tmp_path / "s").exists()


def test_a_text_that_fails_later_leaves_what_was_committed(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    documents = [*documents_of(6), Document("bad", tmp_path / "bad.txt")]

    # the tokenizer reads ahead, so the shards before it must be committed by an earlier run
    append_documents(tmp_path / "s", llama_lm, documents[:6], window=64, context=0, shard_rows=50)
    with pytest.raises(InvalidTextError):
        append_documents(tmp_path / "s", llama_lm, documents)
    store = Datastore(tmp_path / "s")
    assert len(store.documents()) == 6
    assert verify(store).problems == ()


def test_a_folder_with_other_files_is_refused(tmp_path: Path, llama_lm: LanguageModel) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InvalidArgumentError, match="a folder with other files in it"):
        append_documents(tmp_path, llama_lm, documents_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(InvalidArgumentError, match="is a file, not a folder"):
        append_documents(tmp_path / "precious.txt", llama_lm, documents_of(1))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_another_model_or_setting_is_refused(tmp_path: Path, llama_lm: LanguageModel) -> None:
    store = append_documents(tmp_path / "s", llama_lm, documents_of(1), window=64, context=0)
    other = LanguageModel(tiny_llama(seed=1), byte_tokenizer(), name="other")
    with pytest.raises(DatastoreMismatchError, match=r"built with tiny \(weights .*not with other"):
        append_documents(tmp_path / "s", other, documents_of(2))
    gpt2 = LanguageModel(tiny_gpt2(), byte_tokenizer(), name="gpt2")
    with pytest.raises(DatastoreMismatchError, match="not with gpt2"):
        append_documents(tmp_path / "s", gpt2, documents_of(2))
    other_key = LanguageModel(tiny_llama(), byte_tokenizer(), name="tiny", key="output")
    with pytest.raises(
        DatastoreMismatchError, match=r"key ffn_input\), not with tiny \(key output"
    ):
        append_documents(tmp_path / "s", other_key, documents_of(2))
    with pytest.raises(DatastoreMismatchError, match="with window 64, not 32"):
        append_documents(tmp_path / "s", llama_lm, documents_of(2), window=32)
    with pytest.raises(DatastoreMismatchError, match="with key_dtype float16, not float32"):
        append_documents(tmp_path / "s", llama_lm, documents_of(2), key_dtype="float32")
    assert Datastore(tmp_path / "s").generation == store.generation


def test_another_vocabulary_is_refused(tmp_path: Path, llama_lm: LanguageModel) -> None:
    append_documents(tmp_path / "s", llama_lm, documents_of(1), window=64, context=0)
    small = tiny_llama()
    small.resize_token_embeddings(512)
    other = LanguageModel(small, byte_tokenizer(), name="larger")
    with pytest.raises(DatastoreMismatchError, match=r"vocabulary size 384\), not with larger"):
        append_documents(tmp_path / "s", other, documents_of(2))


@pytest.mark.parametrize("boundary", ["document", "stream"])
@pytest.mark.parametrize("breaks", ["iteration", "fingerprint", "blocks"])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_at_a_text_that_breaks_off_what_is_whole_is_kept(
    tmp_path: Path,
    llama_lm: LanguageModel,
    boundary: str,
    breaks: str,
    place: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The datastore is that of the documents before it, and building it to the end still works."""

    @dataclass(frozen=True)
    class Breaking(Document):
        def blocks(self) -> Iterator[str]:
            yield "x" * 500
            yield "y" * 500
            if breaks == "blocks":
                raise InvalidTextError("it broke off")

        def fingerprint(self) -> str:
            if breaks == "fingerprint":
                raise InvalidTextError("it broke off")
            return "0" * 64

    monkeypatch.setattr(reading, "_ENCODE_BLOCKS", 1)  # the tokenizer does not read ahead
    given = documents_of(5)

    def documents() -> Iterator[Document]:
        yield from given[:place]
        if breaks == "iteration":
            raise InvalidTextError("it broke off")
        yield Breaking("broken", "")
        yield from given[place:]

    options = {"window": 64, "context": 16, "boundary": boundary, "shard_rows": 100}
    with pytest.raises(InvalidTextError, match="it broke off") as caught:
        append_documents(tmp_path / "s", llama_lm, documents(), **options)  # type: ignore[arg-type]
    if place or breaks == "blocks":
        assert "what came before it is stored, the rest is left out" in str(caught.value)
        store = Datastore(tmp_path / "s")
        assert [document.name for document in store.documents()] == [d.name for d in given[:place]]
        assert all(document.complete for document in store.documents())
        assert verify(store).problems == ()
    else:
        assert not (tmp_path / "s").exists()
    whole = append_documents(tmp_path / "s", llama_lm, given, **options)  # type: ignore[arg-type]
    assert sorted(d.name for d in whole.documents()) == [d.name for d in given]
    assert all(document.complete for document in whole.documents())
    if boundary == "document":
        append_documents(tmp_path / "t", llama_lm, given, **options)  # type: ignore[arg-type]
        assert len(whole) == len(Datastore(tmp_path / "t"))
