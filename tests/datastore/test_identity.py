"""Identities: whatever is built, from wherever, the datastore holds what the sources hold, once."""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, refusal
from kills import PLACES, ends_by_kill

from knnlm.datastore.append import append_documents
from knnlm.datastore.compaction import compact
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.sources import Changes
from knnlm.datastore.verification import verify
from knnlm.errors import InvalidArgumentError, InvalidTextError, TextNotFoundError
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document, Documents
from knnlm.text.sources import read_documents

# newer Pythons warn of forks beside threads; ours use no thread pool
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ARGUMENTS: dict[str, Any] = {"window": 64, "context": 16, "shard_rows": 60}
FOLDERS = ["one/docs", "one/docs/sub", "two/docs"]
FILES = ["a.txt", "b.md", "c#1.txt", "r.jsonl"]


@dataclass
class World:
    """Two projects with the same file names, and what must be stored of them."""

    root: Path
    chance: random.Random
    by_id: bool
    stored: dict[str, str] = field(default_factory=dict)  # texts by identity

    def __post_init__(self) -> None:
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True)
        (self.root / "link").symlink_to(self.root / "one")
        for _ in range(8):
            self.change()

    def text(self) -> str:
        start = self.chance.randrange(60)
        return f"{self.chance.randrange(30)} {PROSE[start : start + self.chance.choice([5, 90])]}"

    def change(self) -> None:
        """Add, change, move or remove a file or rows."""
        path = self.root / self.chance.choice(FOLDERS) / self.chance.choice(FILES)
        target = self.root / self.chance.choice(FOLDERS) / path.name
        if path.exists() and not target.exists() and self.chance.random() < 0.3:
            path.rename(target)
            return
        if path.suffix != ".jsonl":
            if path.exists() and self.chance.random() < 0.4:
                path.unlink()
            else:
                path.write_text(self.text())
            return
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        kind = self.chance.choice(["add", "add", "remove", "copy", "shuffle", "change", "delete"])
        if kind == "delete":
            path.unlink(missing_ok=True)
            return
        if kind == "add" or not rows:
            rows.insert(self.chance.randrange(len(rows) + 1), {"text": self.text()})
        elif kind == "remove":
            rows.pop(self.chance.randrange(len(rows)))
        elif kind == "copy":
            rows.append({"text": self.chance.choice(rows)["text"]})
        elif kind == "change":
            self.chance.choice(rows)["text"] = self.text()
        else:
            self.chance.shuffle(rows)
        free = iter(sorted(set(range(99)) - {row.get("id") for row in rows}))
        for row in rows:
            row.setdefault("id", next(free))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def choose_sources(self) -> list[str]:
        """Return a source or two, spelled somehow, in a current folder that is chosen too."""
        os.chdir(self.root / self.chance.choice([".", "one", "two/docs"]))
        return [self.spelled() for _ in range(self.chance.choice([1, 1, 2]))]

    def spelled(self) -> str:
        path = self.root / self.chance.choice(FOLDERS)
        files = [file for file in path.iterdir() if file.is_file() and file.stat().st_size]
        kind = self.chance.choice(["folder", "folder", "file", "glob"])
        if kind == "file" and files:
            path = self.chance.choice(files)
        linked = str(path).replace(f"{self.root}/one", f"{self.root}/link")
        relative = os.path.relpath(path)
        spelling = self.chance.choice([str(path), linked, relative, f"./{relative}"])
        return f"{spelling}/*" if kind == "glob" else spelling

    def read(self, sources: list[str]) -> Documents:
        return read_documents(*sources, id_column="id" if self.by_id else None)

    def texts_of(self, path: Path) -> dict[str, str]:
        """Return what a file holds, by identity."""
        if path.suffix != ".jsonl":
            return {str(path): path.read_text()} if path.stat().st_size else {}
        texts: dict[str, str] = {}
        copies: Counter[str] = Counter()
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = hashlib.sha256(row["text"].encode()).hexdigest()[:16]
            copies[key] += 1
            again = f"-{copies[key]}" if copies[key] > 1 else ""
            texts[f"{path}#{row['id']}" if self.by_id else f"{path}#{key}{again}"] = row["text"]
        return texts

    def expect(self, sources: list[str], sync: bool, found: set[str]) -> None:
        """Change what must be stored as a build does.

        found: what is stored, for which of several documents with the same text was moved.
        """
        met: dict[str, str] = {}
        files: set[Path] = set()
        folders: set[Path] = set()
        for source in sources:
            path = Path(source.removesuffix("/*")).resolve()
            if source.endswith("/*"):
                files |= {file for file in path.iterdir() if file.is_file()}
            elif path.is_dir():
                folders.add(path)
                files |= {file for file in path.rglob("*") if file.is_file()}
            else:
                files.add(path)
        for file in files:
            met |= self.texts_of(file)
        for identity in set(met) - set(self.stored):
            same_text = [
                each
                for each, text in self.stored.items()
                if text == met[identity] and not path_of(each).exists() and each not in met
            ]
            if same_text:  # it was moved from there
                del self.stored[min(same_text, key=lambda each: each in found)]
        self.stored |= met
        for identity in set(self.stored) - set(met):
            path = path_of(identity)
            owner = min((each for each in folders if each in path.parents), default=None)
            emptied = not any(owner in Path(one).parents for one in met if owner is not None)
            if path.suffix == ".jsonl" and path in files:
                del self.stored[identity]  # a source with rows replaces itself
            elif sync and owner is not None and not emptied:
                del self.stored[identity]


def path_of(identity: str) -> Path:
    return Path(identity.rpartition("#")[0] if ".jsonl#" in identity else identity)


def check(store: Datastore, world: World, lm: LanguageModel) -> None:
    documents = store.documents()
    assert sorted(d.identity for d in documents) == sorted(world.stored)
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    texts = [world.stored[document.identity] for document in documents]
    for document, tokens in zip(documents, lm.encode(texts), strict=True):
        assert document.complete
        assert store.values[document.start : document.stop].tolist() == tokens.tolist()


@pytest.mark.parametrize("by_id", [False, True], ids=["by text", "by id"])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_builds_holds_what_the_sources_hold(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, seed: int, by_id: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path / "world", random.Random(seed), by_id)
    path = tmp_path / "store"
    builds = kills = 0
    for _ in range(40):
        for _ in range(world.chance.randrange(3)):
            world.change()
        sources = world.choose_sources()
        sync = world.chance.random() < 0.4 and not all("*" in source for source in sources)
        try:
            world.read(sources)
        except (InvalidTextError, TextNotFoundError):  # there is nothing to read
            continue

        def build(sources: list[str] = sources, sync: bool = sync, **more: Any) -> Datastore:
            return append_documents(
                path, llama_lm, world.read(sources), sync=sync, **ARGUMENTS, **more
            )

        if path.exists() and world.chance.random() < 0.4:
            place = world.chance.choice(["before commit", "after commit", "before rename"])
            count = world.chance.randrange(1, 3)

            def killed(place: str = place, count: int = count) -> None:
                PLACES[place](count)
                build()

            kills += ends_by_kill(killed)
        elif world.chance.random() < 0.1:
            build(max_entries=world.chance.randrange(1, 500))
        store = build()
        world.expect(sources, sync, {document.identity for document in store.documents()})
        check(store, world, llama_lm)
        again = build()
        assert again.generation == store.generation, "building again changes nothing"
        assert again.changes is not None
        assert again.changes.added == again.changes.replaced == again.changes.removed == 0
        builds += 1
        if world.chance.random() < 0.1:
            compact(again)
        if world.stored and world.chance.random() < 0.1:
            identity = world.chance.choice(sorted(world.stored))
            again.forget([identity])
            del world.stored[identity]
    assert verify(Datastore(path)).problems == ()
    assert builds > 20
    assert kills > 0


def files_of(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build(path: Path, lm: LanguageModel, *sources: str | Path, **arguments: Any) -> Datastore:
    return append_documents(path, lm, read_documents(*sources), **ARGUMENTS, **arguments)


def test_names_are_unique_and_the_identity_steps_in(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two projects with a README each, built from their own folders."""
    for project in ("one", "two"):
        files_of(tmp_path / project, {"README.md": f"{project}: {PROSE}"})
        monkeypatch.chdir(tmp_path / project)
        store = build(tmp_path / "s", llama_lm, "README.md")
    two = str(tmp_path / "two" / "README.md")
    assert [d.name for d in store.documents()] == ["README.md", two]
    files_of(tmp_path / "two", {"README.md": "another text"})
    store = build(tmp_path / "s", llama_lm, "README.md")
    assert store.changes == Changes(replaced=1)
    assert [d.name for d in store.documents()] == ["README.md", two]

    # here it is the name of the one and the path of the other
    with refusal(InvalidArgumentError, "'README.md' is the name of", "one/README.md", two):
        store.forget(["README.md"])
    assert [d.identity for d in store.forget([two])] == [two]
    monkeypatch.chdir(tmp_path / "one")
    assert [d.name for d in store.forget(["README.md"])] == ["README.md"]


def test_a_link_that_becomes_a_file_has_a_third_name(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    files_of(tmp_path, {"real.txt": "the real one"})
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real.txt")
    build(tmp_path / "s", llama_lm, link)
    link.unlink()
    link.write_text("another one")
    store = build(tmp_path / "s", llama_lm, link)
    assert [(d.name, d.identity) for d in store.documents()] == [
        (str(link), str(tmp_path / "real.txt")),
        (f"{link} (2)", str(link)),
    ]


def test_forget_takes_names_patterns_and_paths(
    tmp_path: Path, llama_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = '{"text": "a row"}\n{"text": "another row"}\n'
    files_of(tmp_path / "docs", {"a.txt": "a", "b.txt": "b", "c/d.txt": "d", "r.jsonl": rows})
    files_of(tmp_path / "docs2", {"a.txt": "not below docs"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("docs")
    documents = [*read_documents("docs", "docs2"), Document("made/in/python", "x")]
    whole = append_documents(tmp_path / "s", llama_lm, documents, **ARGUMENTS)
    docs = ["docs/a.txt", "docs/b.txt", "docs/c/d.txt", "docs/r.jsonl:1", "docs/r.jsonl:2"]
    for number, (given, forgotten) in enumerate(
        {
            "docs/a.txt": docs[:1],
            "./docs/../docs/a.txt": docs[:1],
            "link/a.txt": docs[:1],
            str(tmp_path / "docs" / "b.txt"): docs[1:2],
            "docs/?.txt": docs[:2],
            "docs/c": docs[2:3],
            "docs/c/": docs[2:3],
            "docs/r.jsonl": docs[3:],
            "docs/r.jsonl:2": docs[4:],
            "link": docs,
            "docs": docs,
            "*.txt": [*docs[:3], "docs2/a.txt"],
            "made/in/python": ["made/in/python"],
            ".": [*docs, "docs2/a.txt"],
        }.items()
    ):
        store = Datastore(shutil.copytree(whole.path, tmp_path / str(number)))
        assert [d.name for d in store.forget([given])] == forgotten, given
        with refusal(InvalidArgumentError, "has no document"):
            store.forget([given])


def test_a_folder_that_has_become_empty_forgets_nothing(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    mounted = files_of(tmp_path / "mounted", {"a.txt": "a", "b.txt": "b"})
    other = files_of(tmp_path / "other", {"c.txt": "c", "d.txt": "d"})
    build(tmp_path / "s", llama_lm, mounted, other)
    for path in [*mounted.iterdir(), other / "d.txt"]:
        path.unlink()
    with refusal(InvalidTextError, "must hold a document, but hold none"):
        build(tmp_path / "s", llama_lm, mounted, sync=True)
    store = build(tmp_path / "s", llama_lm, mounted, other, sync=True)
    assert store.changes == Changes(unchanged=1, removed=1, emptied=(str(mounted),))
    assert len(store.documents()) == 3
    mounted.rmdir()
    with refusal(TextNotFoundError, "nothing is there"):
        build(tmp_path / "s", llama_lm, mounted, other, sync=True)
    store.forget([str(mounted)])
    assert [d.name for d in store.documents()] == [str(other / "c.txt")]


def test_nothing_is_gone_from_a_source_that_was_not_read_to_its_end(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    folder = files_of(tmp_path / "docs", {f"{n}.txt": f"{n}: {PROSE}" for n in range(6)})
    rows = [json.dumps({"text": f"{n}: {PROSE[n:]}"}) + "\n" for n in range(4)]
    files_of(folder, {"r.jsonl": "".join(rows)})
    whole = build(tmp_path / "s", llama_lm, folder)
    (folder / "3.txt").unlink()
    files_of(folder, {"r.jsonl": "".join(rows[1:]), "z.txt": PROSE * 3})
    for arguments in ({"max_entries": whole.rows + 70}, {"max_entries": 1}):
        store = build(tmp_path / "s", llama_lm, folder, sync=True, **arguments)
        assert store.changes is not None
        assert (store.changes.removed, store.changes.gone) == (0, 0)
    store = build(tmp_path / "s", llama_lm, folder)
    assert store.changes == Changes(added=1, unchanged=8, removed=1, gone=1)

    def fails() -> Any:
        yield from list(read_documents(folder))[:2]
        raise OSError("the disk is gone")

    documents = read_documents(folder)
    with pytest.raises(OSError, match="the disk is gone"):
        append_documents(
            tmp_path / "s", llama_lm, Documents([fails], None, documents.sources), sync=True
        )
    assert len(Datastore(tmp_path / "s").documents()) == 10
    skipped = Documents([lambda: iter(documents)], None, documents.sources, [])

    def skips() -> Any:
        yield from list(documents)[:3]
        assert isinstance(skipped.skipped, list)
        skipped.skipped.append("a row that cannot be read")

    skipped._readers = [skips]
    store = append_documents(tmp_path / "s", llama_lm, skipped, sync=True)
    assert store.changes == Changes(unchanged=3)


@pytest.mark.parametrize("place", ["before commit", "after commit"])
def test_what_is_gone_goes_in_one_transaction(
    tmp_path: Path, llama_lm: LanguageModel, place: str
) -> None:
    folder = files_of(tmp_path / "docs", {f"{n}.txt": f"{n}: {PROSE}" for n in range(6)})
    build(tmp_path / "s", llama_lm, folder)
    for name in ("1.txt", "2.txt", "4.txt"):
        (folder / name).unlink()

    def killed() -> None:
        PLACES[place](1)
        build(tmp_path / "s", llama_lm, folder, sync=True)

    assert ends_by_kill(killed)
    left = Datastore(tmp_path / "s")
    assert len(left.documents()) == (3 if place == "after commit" else 6)
    store = build(tmp_path / "s", llama_lm, folder, sync=True)
    assert len(store.documents()) == 3


def test_sync_needs_a_source_that_says_what_is_gone(
    tmp_path: Path, llama_lm: LanguageModel
) -> None:
    folder = files_of(tmp_path / "docs", {"a.txt": "a"})
    made: list[Any] = [[Document("d", "text")], read_documents(folder / "*.txt")]
    for documents in made:
        with refusal(InvalidArgumentError, "sync needs a file, a folder or an hf: dataset"):
            append_documents(tmp_path / "s", llama_lm, documents, sync=True)
    assert not (tmp_path / "s").exists()


def test_a_folder_that_was_moved_is_not_read_again(tmp_path: Path, llama_lm: LanguageModel) -> None:
    rows = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(3))
    texts = {f"{n}.txt": f"{n}: {PROSE}" for n in range(4)} | {"copy.txt": f"1: {PROSE}"}
    old = files_of(tmp_path / "old", texts | {"r.jsonl": rows})
    first = build(tmp_path / "s", llama_lm, old)
    new = tmp_path / "new"
    shutil.copytree(old, tmp_path / "copy")
    old.rename(new)
    store = build(tmp_path / "s", llama_lm, new)
    assert store.changes == Changes(moved=8)
    assert store.rows == first.rows
    assert all(d.identity.startswith(f"{new}/") for d in store.documents())
    assert all(d.name.startswith(f"{new}/") for d in store.documents())
    assert build(tmp_path / "s", llama_lm, new, sync=True).changes == Changes(unchanged=8)
    # a copy is no move: both are there
    assert build(tmp_path / "s", llama_lm, tmp_path / "copy").changes == Changes(added=8)

    (new / "1.txt").rename(new / "renamed.txt")
    (new / "2.txt").write_text("changed too")
    store = build(tmp_path / "s", llama_lm, new, sync=True)
    assert store.changes == Changes(replaced=1, moved=1, unchanged=6)


def test_a_killed_build_of_a_moved_folder_goes_on(tmp_path: Path, llama_lm: LanguageModel) -> None:
    old = files_of(tmp_path / "old", {f"{n}.txt": f"{n}: {PROSE}" for n in range(6)})
    build(tmp_path / "s", llama_lm, old)
    new = old.rename(tmp_path / "new")
    files_of(new, {f"{n}{n}.txt": f"new {n}: {PROSE}" for n in range(3)})
    for place in ("before commit", "after commit", "before commit"):

        def killed(place: str = place) -> None:
            PLACES[place](1)
            build(tmp_path / "s", llama_lm, new)

        assert ends_by_kill(killed)
        assert verify(Datastore(tmp_path / "s")).shards
    store = build(tmp_path / "s", llama_lm, new)
    assert len(store.documents()) == 9
    assert {d.identity for d in store.documents()} == {str(path) for path in new.iterdir()}


def test_documents_made_in_python_are_their_names(tmp_path: Path, llama_lm: LanguageModel) -> None:
    first = append_documents(tmp_path / "s", llama_lm, [Document("a", "a"), Document("b", "b")])
    assert [d.identity for d in first.documents()] == ["a", "b"]
    store = append_documents(tmp_path / "s", llama_lm, [Document("other name", "a", "a")])
    assert store.changes == Changes(unchanged=1)
    assert [d.name for d in store.documents()] == ["a", "b"]
    store = append_documents(tmp_path / "s", llama_lm, [Document("a", "")])
    assert store.changes == Changes(removed=1), "a text that became empty is replaced by nothing"
    with refusal(InvalidArgumentError, "two texts are both b: give each a name"):
        append_documents(tmp_path / "s", llama_lm, [Document("b", "b"), Document("b", "c")])
    assert [d.name for d in Datastore(tmp_path / "s").documents()] == ["b"]


def test_sync_says_that_it_forgets_nothing_where_something_cannot_be_read(
    tmp_path: Path, llama_lm: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    folder = files_of(tmp_path / "docs", {"a.txt": "a", "b.txt": "b"})
    other = files_of(tmp_path / "other", {"c.txt": "c", "d.txt": "d"})
    build(tmp_path / "s", llama_lm, folder, other)
    for path in (folder / "b.txt", other / "d.txt"):
        path.unlink()
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    for sources, changes in [
        ([folder], Changes(unchanged=1)),
        ([folder, other], Changes(unchanged=2, removed=1)),
    ]:
        caplog.clear()
        documents = read_documents(*sources, skip_bad=True)
        store = append_documents(tmp_path / "s", llama_lm, documents, sync=True)
        assert store.changes == changes
        assert "sync forgets nothing of the files and folders in which" in caplog.text
    (folder / "bad.txt").unlink()
    caplog.clear()
    assert build(tmp_path / "s", llama_lm, folder, other, sync=True).changes == Changes(
        unchanged=2, removed=1
    )
    assert not caplog.text


def test_a_file_named_like_a_row_is_no_row(tmp_path: Path, llama_lm: LanguageModel) -> None:
    def build_rows(source: Path) -> Datastore:
        documents = read_documents(source, id_column="id")
        return append_documents(tmp_path / "s", llama_lm, documents, sync=True, **ARGUMENTS)

    rows = '{"id": "%s", "text": "a row"}\n'
    files = {"r.jsonl": rows % ("n" * 300) + rows % "b", "r.jsonl#note.txt": "a file"}
    folder = files_of(tmp_path / "docs", files)
    build_rows(folder)
    files_of(folder, {"r.jsonl": rows % "b"})
    store = build_rows(folder / "r.jsonl")
    assert store.changes == Changes(unchanged=1, removed=1)
    assert [d.name for d in store.forget([str(folder / "r.jsonl")])] == [f"{folder}/r.jsonl:b"]
    assert [d.name for d in store.documents()] == [f"{folder}/r.jsonl#note.txt"]
    (folder / "r.jsonl#note.txt").unlink()
    assert build_rows(folder).changes == Changes(added=1, removed=1)
