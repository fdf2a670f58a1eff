"""Drafts: where they come from, and how much of them is read."""

import pytest
import torch
from conftest import tiny_llama
from stores import distinct_documents
from transformers import PreTrainedTokenizerFast

from knnlm.datastore.datastore import Datastore
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.maintenance import build
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.draft_lengths import Chances, DraftedText, PassCosts, choose_lengths
from knnlm.retrieval.drafts import LONGEST_DRAFT, Draft, Drafter
from knnlm.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Datastore:
    lm = LanguageModel(tiny_llama(), tokenizer, name="tiny")
    return build(tmp_path_factory.mktemp("drafts") / "s", lm, distinct_documents(3), window=48)


def found(store: Datastore, *rows: int) -> list[tuple[Retriever, Neighbors]]:
    """Return neighbors of two positions: none, and some rows, the nearest first."""
    padded = torch.tensor([[-1] * (len(rows) + 1), [*rows, -1]])
    distances = torch.where(padded < 0, torch.inf, 1.0)
    return [(Retriever(store, ExactIndex(store), Parameters()), Neighbors(distances, padded))]


def test_a_text_that_repeats_itself_is_continued_likewise() -> None:
    drafter = Drafter([5, 1, 2, 3, 9, 1, 2, 4, 8, 5, 1])
    drafter.push(2)
    draft = drafter.draft([], 0)
    assert draft.tokens[0] == 3, "5, 1, 2 agrees in three tokens, 9, 1, 2 in two"
    assert draft.tokens == [3, 9, 1, 2, 4, 8, 5, 1, 2]
    assert draft.matches[:3] == [3, 4, 5]
    assert draft.shares == [8 / 12, *[1.0] * 8]
    assert Drafter([1, 2, 3]).draft([], 0).tokens == []
    assert Drafter([]).draft([], 0).tokens == []


def test_neighbors_are_continued_as_far_as_their_documents_go(store: Datastore) -> None:
    document = store.documents()[1]
    values = store.values.tolist()
    row = document.start + 20
    drafter = Drafter(values[row - 3 : row + 1])
    ahead = values[row + 1 : row + 1 + LONGEST_DRAFT]
    draft = drafter.draft(found(store, row), 1)
    assert draft.tokens == ahead
    assert draft.matches[0] == 4
    other = next(r for r in range(document.start, document.stop) if values[r] != values[row])
    assert drafter.draft(found(store, other), 1).tokens == [], "it voted for another token"
    assert drafter.draft(found(store, row), 0).tokens == [], "of a position without neighbors"
    last = document.stop - 3
    ending = Drafter([values[last]]).draft(found(store, last), 1)
    assert ending.tokens == values[last + 1 : document.stop]


def test_the_place_whose_past_agrees_longest_is_followed(store: Datastore) -> None:
    values = store.values.tolist()
    token = max(set(values), key=values.count)
    rows = [row for row, value in enumerate(values[:-LONGEST_DRAFT]) if value == token]
    rows = [row for row in rows if row > 8 and store.document_at(row + LONGEST_DRAFT)]
    right = rows[len(rows) // 2]
    draft = Drafter(values[right - 8 : right + 1]).draft(found(store, *rows), 1)
    assert draft.tokens[:3] == values[right + 1 : right + 4]
    assert draft.matches[0] == 9


def test_chances_follow_what_the_text_shows() -> None:
    draft = Draft([1, 2, 3], [1, 4, 12], [0.4, 0.8, 1.0])
    chances = Chances()
    first = chances.of(draft)
    assert first == pytest.approx([0.22, 0.22 * 0.66, 0.22 * 0.66 * 0.98])
    for _ in range(50):
        chances.learn(draft, [7, 2, 3])
    assert chances.of(draft)[0] < 0.5 * first[0]
    hopeful = Chances()
    for _ in range(50):
        hopeful.learn(draft, [1, 2, 3])
    assert hopeful.of(draft) == pytest.approx([0.22 / 0.22 * 0.5, 0.5, 0.5], rel=0.5)
    assert all(a >= b for a, b in zip(hopeful.of(draft), hopeful.of(draft)[1:], strict=False))


def repeating() -> DraftedText:
    text = DraftedText([*range(10, 30)] * 2)
    text.guess([], 0, 8)
    assert text.chances[-1] > 0.8
    return text


def test_a_draft_is_read_as_far_as_it_pays() -> None:
    costs, text = PassCosts(), repeating()
    choose_lengths([text], costs)
    assert text.reading == [], "what passes cost is not known"
    for seconds in (9.0, 1.0):  # the first pass compiles
        costs.note(1, 1, seconds)
    choose_lengths([text], costs)
    assert text.reading == [*range(10, 18)]
    for width in range(5, 10):
        costs.note(1, width, 5.0)
    choose_lengths([text], costs)
    assert text.reading == [10, 11, 12], "further ones were seen to cost too much"
    dear = PassCosts()
    for width in (1, 1, *range(2, 10)):
        dear.note(1, width, 1.0 if width == 1 else 9.0)
    choose_lengths([text], dear)
    assert text.reading == []


def test_texts_that_are_read_together_share_one_length() -> None:
    costs = PassCosts()
    for _ in range(2):
        costs.note(3, 1, 1.0)
    for width in range(2, 10):
        costs.note(3, width, 1.5)
    hopeless, one, other = DraftedText([1, 2]), repeating(), repeating()
    choose_lengths([hopeless, one, None], costs)
    assert (len(one.reading), hopeless.reading) == (8, [])
    costs.note(3, 1, 0.6)  # so that the others cost 2.5
    choose_lengths([hopeless, one, None], costs)
    assert len(one.reading) == 8, "8 more tokens for three texts"
    costs.note(3, 1, 0.3)
    choose_lengths([hopeless, one, None], costs)
    assert one.reading == []
    choose_lengths([other, one, None], costs)
    assert len(one.reading) == len(other.reading) == 8


def test_what_was_read_is_not_read_again() -> None:
    text = repeating()
    text.read_first(3)
    text.push([10, 11])
    assert (text.reading, text.chances) == ([], [])
