"""Many workers build what one process builds, whoever dies, hangs or fails on the way.

Workers are forks of the test process, which has the model, unless a test says otherwise.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, refusal
from forked_workers import POISON, Trouble, end_at_poison, fork_workers, poison_of
from kills import PLACES, die, ends_by_kill
from stores import distinct_documents, model_with_keys_times

from knnlm.datastore.append import append_documents
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.verification import verify
from knnlm.errors import ModelNotFoundError, NonFiniteKeysError, WorkerError
from knnlm.model import reading
from knnlm.model.language_model import LanguageModel
from knnlm.progress import Advance
from knnlm.text.documents import Document
from knnlm.workers.local import LocalCrew
from knnlm.workers.pool import WorkerPool

# newer Pythons warn of forks beside threads; ours use no thread pool
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

DOCUMENTS = distinct_documents(24)
ARGUMENTS: dict[str, Any] = {"window": 64, "context": 16, "shard_rows": 200}


def build_with(
    size: int,
    path: Path,
    lm: LanguageModel,
    documents: Iterable[Document],
    lease: float = 60.0,
    **arguments: Any,
) -> Datastore:
    with WorkerPool(LocalCrew(lm, size), lease) as pool:
        return append_documents(path, lm, documents, maker=pool, **{**ARGUMENTS, **arguments})


def assert_equal(one: Datastore, other: Datastore) -> None:
    """Check that files, documents and settings are the same, and that nothing else is there."""
    assert verify(one).problems == ()
    assert [shard.file.sha256 for shard in one.shards] == [s.file.sha256 for s in other.shards]
    assert [shard.start for shard in one.shards] == [shard.start for shard in other.shards]
    assert one.documents() == other.documents()
    assert one.catalog.get("stream_tail") == other.catalog.get("stream_tail")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"boundary": "stream", "context": 0}, {"boundary": "stream", "context": 24}],
    ids=["document", "stream", "stream-context"],
)
@pytest.mark.parametrize("size", [1, 3])
def test_workers_build_what_one_process_builds(
    tmp_path: Path,
    llama_lm: LanguageModel,
    arguments: dict[str, Any],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_workers(monkeypatch, lambda post: llama_lm)
    made = build_with(size, tmp_path / "made", llama_lm, DOCUMENTS, **arguments)
    whole = append_documents(tmp_path / "whole", llama_lm, DOCUMENTS, **{**ARGUMENTS, **arguments})
    assert len(whole.shards) > 2 * size, "not all are planned at once"
    assert_equal(made, whole)
    assert made.changes == whole.changes
    generation = made.generation
    again = build_with(size, tmp_path / "made", llama_lm, DOCUMENTS, **arguments)
    assert again.generation == generation, "nothing to do, nothing done"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_lm: LanguageModel) -> Datastore:
    """Return what one process builds with the batches of `trouble`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "default_batch_tokens", lambda lm: 192)
        path = tmp_path_factory.mktemp("workers") / "whole"
        return append_documents(path, llama_lm, DOCUMENTS, **ARGUMENTS)


@pytest.fixture
def trouble(llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    """Let something happen in workers."""
    return Trouble(llama_lm, monkeypatch)


def poisoned(documents: list[Document], place: int, name: str = "poisoned") -> list[Document]:
    """Return documents with one more that ends whoever reads it."""
    return [*documents[:place], Document(name, PROSE + POISON + PROSE), *documents[place:]]


def test_a_worker_that_dies_costs_its_unit_alone(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, trouble: Trouble
) -> None:
    lives = [3, 5, 2, 7, 4]  # the passes of each worker, the others live on

    def dies(tokens: torch.Tensor, passes: int) -> None:
        if passes == dict(enumerate(lives)).get(trouble.started):
            die()

    trouble.before = dies
    notes: list[str] = []
    made = build_with(2, tmp_path / "made", llama_lm, DOCUMENTS, progress=Notes(notes))
    assert len(trouble.forks) == 2 + len(lives)
    assert notes[-1] == f"2 of 2 workers, {len(lives)} retries"
    assert made.changes == whole.changes
    assert_equal(made, whole)


class Notes:
    """Progress that checks itself, and keeps what else is said."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.rows = 0.0

    @contextmanager
    def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
        def advance(amount: float, total: float | None = None, note: str | None = None) -> None:
            assert amount >= 0
            self.rows += amount
            self.notes += [] if note is None else [note]

        yield advance


@pytest.mark.parametrize("boundary", ["document", "stream"])
def test_a_document_that_ends_two_workers_is_set_aside(
    tmp_path: Path, llama_lm: LanguageModel, trouble: Trouble, boundary: str
) -> None:
    """The datastore is that of the other documents."""
    end_at_poison(trouble, llama_lm)
    made = build_with(
        2, tmp_path / "made", llama_lm, poisoned(DOCUMENTS, 11), boundary=boundary, context=0
    )
    assert made.changes is not None
    if boundary == "document":
        assert made.changes.set_aside == ("poisoned",)
        arguments = {**ARGUMENTS, "context": 0}
        whole = append_documents(tmp_path / "whole", llama_lm, DOCUMENTS, **arguments)
        assert_equal(made, whole)
    else:  # documents that share a window with it go with it
        assert "poisoned" in made.changes.set_aside
        assert len(made.changes.set_aside) <= 3
        names = {document.name for document in made.documents()}
        assert names == {document.name for document in DOCUMENTS} - set(made.changes.set_aside)
    assert verify(made).problems == ()


def test_a_long_document_is_set_aside_though_it_began_well(
    tmp_path: Path, llama_lm: LanguageModel, trouble: Trouble
) -> None:
    end_at_poison(trouble, llama_lm)
    long = Document("long", PROSE * 12 + POISON + PROSE * 4)
    documents = [*DOCUMENTS[:3], long, *DOCUMENTS[3:6]]
    made = build_with(2, tmp_path / "made", llama_lm, documents)
    assert made.changes is not None
    assert made.changes.set_aside == ("long",)
    assert made.changes.added == 6
    assert made.forgotten_rows > 200
    assert [d.name for d in made.documents()] == [d.name for d in DOCUMENTS[:6]]
    assert verify(made).problems == ()


def test_an_iterator_cannot_be_read_again_without_a_document(
    tmp_path: Path, llama_lm: LanguageModel, trouble: Trouble
) -> None:
    end_at_poison(trouble, llama_lm)
    with refusal(WorkerError, "reading poisoned ended two workers", "leave it out"):
        build_with(1, tmp_path / "made", llama_lm, iter(poisoned([], 0)))
    assert not (tmp_path / "made").exists()


def test_what_only_dies_together_ends_the_build(
    tmp_path: Path, llama_lm: LanguageModel, trouble: Trouble
) -> None:
    """As where memory does not suffice for a batch; no document is to blame."""
    trouble.before = lambda tokens, passes: die() if len(tokens) > 1 else None
    with refusal(WorkerError, "4 workers ended while they read d0", "use fewer workers"):
        build_with(2, tmp_path / "made", llama_lm, DOCUMENTS)
    assert not (tmp_path / "made").exists()


def test_a_worker_that_hangs_loses_its_lease(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, trouble: Trouble
) -> None:
    def hangs(tokens: torch.Tensor, passes: int) -> None:
        if trouble.started < 2 and passes == 3:
            time.sleep(600)

    trouble.before = hangs
    made = build_with(2, tmp_path / "made", llama_lm, DOCUMENTS, lease=1.0)
    assert [fork.wait(0) for fork in trouble.forks[:2]] == [-signal.SIGKILL] * 2
    assert_equal(made, whole)


def test_an_error_of_a_worker_is_that_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed before it is kept, by many workers as by one process."""
    broken = model_with_keys_times(1e6)
    fork_workers(monkeypatch, lambda post: broken)
    with refusal(NonFiniteKeysError, "key_dtype float16 cannot hold a key of d0"):
        build_with(2, tmp_path / "made", broken, DOCUMENTS)
    assert not (tmp_path / "made").exists()


def test_an_unknown_error_ends_the_build_if_another_worker_has_it_too(
    tmp_path: Path, llama_lm: LanguageModel, trouble: Trouble
) -> None:
    token = poison_of(llama_lm)

    def fails(tokens: torch.Tensor, passes: int) -> None:
        if bool((tokens == token).any()) or (trouble.started == 0 and passes == 2):
            raise RuntimeError("out of memory,\nor so")

    trouble.before = fails
    documents = poisoned(DOCUMENTS, 20)
    with refusal(WorkerError, "a worker failed: RuntimeError: out of memory, or so"):
        build_with(1, tmp_path / "made", llama_lm, documents)
    kept = Datastore(tmp_path / "made")
    assert 15 < len(kept.documents()) <= 21
    assert verify(kept).problems == ()


def test_workers_that_do_not_start_end_the_build(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_workers(monkeypatch, lambda post: die())  # type: ignore[arg-type,return-value]
    with refusal(WorkerError, "no worker could be started, 6 tried", "killed by signal 9"):
        build_with(2, tmp_path / "made", llama_lm, DOCUMENTS)
    assert not (tmp_path / "made").exists()


def test_a_build_goes_on_with_the_workers_that_start(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, trouble: Trouble
) -> None:
    """The first lives, though reading takes it longer than the deaths of all others."""
    trouble.before = lambda tokens, passes: time.sleep(0.02)
    trouble.load = lambda: die() if trouble.started else None
    made = build_with(2, tmp_path / "made", llama_lm, DOCUMENTS)
    assert 1 < len(trouble.forks) <= 1 + 7, "then no more are started until a lease has passed"
    assert_equal(made, whole)


def test_a_model_that_workers_cannot_find_is_refused(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a name, but exists in this process alone."""
    fork_workers(monkeypatch, lambda post: post.source.load("cpu", 1))
    lm = LanguageModel(llama_lm.model, llama_lm.tokenizer, name="./nowhere")
    with refusal(ModelNotFoundError, "'./nowhere'", "is no folder; check the path"):
        build_with(1, tmp_path / "made", lm, DOCUMENTS)


def test_an_interruption_ends_all_workers_and_keeps_what_is_committed(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, trouble: Trouble
) -> None:
    trouble.before = lambda tokens, passes: time.sleep(600) if passes == 8 else None

    class Interrupts(Notes):
        @contextmanager
        def task(self, description: str, total: float | None, unit: str) -> Iterator[Advance]:
            def advance(amount: float, total: float | None = None, note: str | None = None) -> None:
                self.rows += amount
                if self.rows > 900:
                    raise KeyboardInterrupt

            yield advance

    with pytest.raises(KeyboardInterrupt):
        build_with(2, tmp_path / "made", llama_lm, DOCUMENTS, progress=Interrupts([]))
    assert all(fork.wait(0) == -signal.SIGKILL for fork in trouble.forks)
    kept = Datastore(tmp_path / "made")
    assert verify(kept).problems == ()
    trouble.before = lambda tokens, passes: None
    made = build_with(3, tmp_path / "made", llama_lm, DOCUMENTS)
    assert_equal(made, whole)


@pytest.mark.parametrize("place", ["before rename", "after commit"])
def test_a_killed_build_goes_on_with_another_number_of_workers(
    tmp_path: Path, llama_lm: LanguageModel, whole: Datastore, trouble: Trouble, place: str
) -> None:
    pids = tmp_path / "pids"

    def leave_pid(tokens: torch.Tensor, passes: int) -> None:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def killed(size: int, count: int) -> None:
        trouble.before = leave_pid
        PLACES[place](count)
        build_with(size, tmp_path / "made", llama_lm, DOCUMENTS)

    for size, count in [(2, 2), (3, 3)]:
        assert ends_by_kill(lambda: killed(size, count))  # noqa: B023
    deadline = time.monotonic() + 20
    while any(Path("/proc", pid).exists() for pid in pids.read_text().split()):
        assert time.monotonic() < deadline, "workers end with the build"
        time.sleep(0.05)
    made = build_with(2, tmp_path / "made", llama_lm, DOCUMENTS)
    assert_equal(made, whole)
