"""Held-out text that is stored is noticed, counted and said; new text is not."""

import logging
import random
from pathlib import Path

import pytest
from conftest import PROSE

import knnlm
from knnlm.datastore.append import append_documents
from knnlm.datastore.overlap import RUN, Overlap
from knnlm.index.queries import held_out_queries
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document


def text_of(seed: int, words: int) -> str:
    """Return words in an order of their own."""
    vocabulary = PROSE.split()
    generator = random.Random(seed)
    return " ".join(generator.choice(vocabulary) for _ in range(words))


STORED = [Document("long", text_of(1, 300)), Document("short", "a card"), Document("gone", PROSE)]


@pytest.fixture
def model(tmp_path: Path, llama_lm: LanguageModel) -> knnlm.KNNLM:
    store = knnlm.build(tmp_path / "a.store", llama_lm, STORED, window=64, context=16)
    store.forget(["gone"])
    return knnlm.KNNLM(llama_lm, store, k=4)


def overlap_of(model: knnlm.KNNLM, text: list[Document]) -> Overlap:
    """Return the overlap, the same from an evaluation and from tuning."""
    overlap = model.perplexity(text).overlap
    assert overlap == knnlm.tune(model, text, max_k=4).overlap
    return overlap


def test_the_same_text_is_counted_whatever_its_name(
    model: knnlm.KNNLM, caplog: pytest.LogCaptureFixture
) -> None:
    text = [Document("other", STORED[0].text), Document("b", "a card"), Document("new", "a date")]
    overlap = overlap_of(model, text)
    assert overlap.documents == 2
    assert overlap.tokens >= len(model.encode(str(STORED[0].text)))
    warnings = [each.getMessage() for each in caplog.records]
    assert len(warnings) == 2
    assert all("2 of its 3 documents are in the datastore" in warning for warning in warnings)
    caplog.clear()
    held_out_queries(model.lm, model.retrievers[0].store, text)
    assert [each.getMessage() for each in caplog.records] == warnings[:1]


@pytest.mark.parametrize("seed", range(4))
def test_a_part_of_a_stored_text_is_found_by_its_tokens(
    model: knnlm.KNNLM, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    words = str(STORED[0].text).split()
    first = random.Random(seed).randrange(150)
    text = (
        f"{text_of(seed + 10, 40)} {' '.join(words[first : first + 100])} {text_of(seed + 20, 40)}"
    )
    tokens = model.encode(text)
    part = model.encode(" " + " ".join(words[first : first + 100]))
    overlap = overlap_of(model, [Document("quotes", text)])
    assert overlap.documents == 0
    assert len(part) - 4 <= overlap.tokens <= len(part) + 8 < len(tokens)
    assert "0 of its 1 documents are in the datastore" in caplog.text


def test_new_and_forgotten_text_is_not_warned_of(
    model: knnlm.KNNLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert overlap_of(model, [Document("new", text_of(2, 300))]) == Overlap(0, 0)
    assert overlap_of(model, [Document("gone", PROSE)]) == Overlap(0, 0)
    few = model.lm.decode(model.encode(str(STORED[0].text))[: RUN - 2])
    assert overlap_of(model, [Document("few", few)]) == Overlap(0, 0)
    assert not caplog.records


def test_every_datastore_counts(model: knnlm.KNNLM, tmp_path: Path) -> None:
    other = append_documents(tmp_path / "b.store", model.lm, [Document("b", text_of(3, 200))])
    both = knnlm.KNNLM(model.lm, [model.retrievers[0].store, other], k=4, lmbda=0.1)
    text = [Document("one", STORED[0].text), Document("two", text_of(3, 200))]
    assert both.perplexity(text).overlap.documents == 2
