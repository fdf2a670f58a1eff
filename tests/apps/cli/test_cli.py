"""The command line: every command on a tiny model in a folder, and every refusal in one line."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, tiny_llama
from stores import is_progress, small_disk, snapshot
from typer.testing import CliRunner

from knnlm.apps.cli.main import app
from knnlm.datastore.datastore import Datastore
from knnlm.errors import InvalidArgumentError
from knnlm.index.exact import TOLERANCE, ExactIndex
from knnlm.index.policy import open_index
from knnlm.index.queries import held_out_queries
from knnlm.mixture.parameters import Parameters
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

runner = CliRunner()


def save_model(folder: Path, change: Callable[[Any], object] = lambda model: None) -> None:
    model = tiny_llama()
    with torch.no_grad():
        change(model)
    LanguageModel(model, byte_tokenizer(), name="tiny").save(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "tiny")
    save_model(folder / "other", lambda model: model.lm_head.weight.mul_(2.0))
    save_model(folder / "wide", lambda model: model.resize_token_embeddings(512))
    norm = "model.layers.1.post_attention_layernorm.weight"
    save_model(folder / "nan", lambda model: model.get_parameter(norm).fill_(math.nan))
    save_model(folder / "huge", lambda model: model.get_parameter(norm).mul_(1e6))
    return folder


@pytest.fixture(scope="session")
def built(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace: text to store, text held out, text that is refused, and a datastore."""
    work = tmp_path_factory.mktemp("work")
    texts = work / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"{number}. " + PROSE * (number + 1))
    (work / "held.txt").write_text(PROSE[60:300] + "Something else.")
    (work / "strange.txt").write_text("QZ9#" * 40)
    (work / "empty.txt").write_text("")
    (work / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    rows = [json.dumps({"body": f"row {number}"}) for number in range(120)]
    (work / "rows.jsonl").write_text("\n".join(rows))
    (work / "bad.jsonl").write_text("\n".join([*rows[:99], '{"body": ', *rows]))
    with contextlib.chdir(work):
        ok("build", "docs.store", "texts", "--model", str(models / "tiny"), "--window", "64")
    return work


@pytest.fixture
def work(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace, and the current folder."""
    shutil.copytree(built, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def ok(*arguments: str) -> str:
    """Run a command that must succeed and say nothing but its progress on stderr.

    A build tunes only where that is asked for: it takes seconds.
    """
    if arguments[:1] == ("build",) and "--tune" not in arguments:
        arguments += ("--no-tune",)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for line in result.stderr.splitlines():
        assert is_progress(line), line
    return result.stdout


def ok_json(*arguments: str) -> dict[str, Any]:
    """Run a command with --json: one line with one object, and nothing else, on stdout."""
    out = ok(*arguments, "--json")
    assert out.endswith("\n")
    assert out.count("\n") == 1
    value = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(value, dict)
    return value


# the main job


def test_build_and_build_again(work: Path, models: Path) -> None:
    arguments = ("build", "new.store", "texts", "--model", str(models / "tiny"))
    first = ok_json(*arguments)
    assert first["entries"] == first["added"] > 300
    assert first["documents"] == 3
    again = ok_json(*arguments)
    assert (again["added"], again["generation"]) == (0, first["generation"])
    more = ok_json("build", "new.store", "texts", "held.txt")  # the model is the datastore's own
    assert more["documents"] == 4
    assert more["added"] == more["entries"] - first["entries"] > 0
    assert "added 0 entries" in ok("build", "new.store", "texts", "held.txt")


def test_a_build_says_what_became_of_the_documents(work: Path, models: Path) -> None:
    """One folder under several spellings, then changed, emptied and moved."""

    def changes_of(*arguments: str) -> str:
        return ok("build", "new.store", *arguments).partition("documents: ")[2].strip()

    assert changes_of("texts", "--model", str(models / "tiny")) == "3 added"
    for spelling in ("texts", "./texts", str(work / "texts"), "texts/../texts", "texts/*"):
        assert changes_of(spelling) == "0 added, 3 unchanged"
    (work / "texts" / "1.txt").write_text("Another text.")
    (work / "texts" / "2.txt").unlink()
    gone = "gone from their source and still stored: 1 (knnlm build --sync forgets them)"
    assert changes_of("texts") == f"0 added, 1 replaced, 1 unchanged\n{gone}"
    info = ok_json("info", "new.store", "--documents")["document_list"]
    assert {each["identity"] for each in info} == {
        str(work / "texts" / f"{number}.txt") for number in range(3)
    }
    listed = ok("info", "new.store", "--documents").splitlines()
    place = next(place for place, line in enumerate(listed) if line.endswith("  texts/0.txt"))
    assert listed[place + 1].strip() == f"= {work}/texts/0.txt"
    report = ok_json("build", "new.store", "texts", "--sync")
    counts = {"added": 0, "replaced": 0, "moved": 0, "unchanged": 2, "removed": 1, "gone": 0}
    assert report["changes"] == counts | {"emptied": [], "set_aside": []}

    (work / "texts").rename(work / "moved")
    (work / "texts").mkdir()
    (work / "moved" / "rows.jsonl").write_text('{"text": "one row"}\n{"text": "another row"}\n')
    assert changes_of("moved") == "2 added, 2 moved"
    (work / "moved" / "rows.jsonl").write_text('{"text": "another row"}\n')
    assert changes_of("moved") == "0 added, 3 unchanged, 1 removed"
    assert ok_json("forget", "new.store", "moved/rows.jsonl")["documents"] == ["moved/rows.jsonl:2"]
    for path in (work / "moved").iterdir():
        path.rename(work / "texts" / path.name)
        (work / "texts" / path.name).write_text("All of it is elsewhere, and changed.")
    emptied = f"knnlm forget new.store {work / 'moved'} forgets them"
    assert emptied in changes_of("moved", "held.txt", "--sync")
    assert len(ok_json("forget", "new.store", "moved")["documents"]) == 2


def test_build_options(work: Path, models: Path) -> None:
    built = ok_json(
        *("build", "new.store", "rows.jsonl", "--text-column", "body"),
        *("--model", str(models / "tiny"), "--key", "output", "--key-dtype", "float32"),
        *("--window", "32", "--context", "4", "--boundary", "stream", "--max-entries", "100"),
        *("--dtype", "bfloat16", "--device", "cpu"),
    )
    assert 60 < built["entries"] <= 100
    settings = built["settings"]
    assert (settings["window"], settings["context"], settings["boundary"]) == (32, 4, "stream")
    assert (settings["key"], settings["key_dtype"]) == ("output", "float32")
    assert settings["model_dtype"] == "bfloat16"
    report = ok_json("eval", "new.store", "held.txt")
    arguments = ("eval", "new.store", "held.txt", "--dtype")
    assert report["lm"] == ok_json(*arguments, "bfloat16")["lm"], "the datastore's own precision"
    assert report["lm"] != ok_json(*arguments, "float32")["lm"]


def test_tune_stores_the_defaults_and_a_picture(work: Path) -> None:
    tuned = ok_json("tune", "docs.store", "held.txt", "--max-k", "64")
    parameters = tuned["parameters"]
    assert Path(tuned["plot"]) == Path("docs.store/tuning.png")
    assert Path(tuned["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [trial["k"] for trial in tuned["sweeps"][0]["by_k"]] == [1, 2, 4, 8, 16, 32, 64]
    assert tuned["knn_perplexity"] < tuned["lm_perplexity"]
    info = ok_json("info", "docs.store")
    assert info["parameters"] == parameters
    assert info["tuning"]["tokens"] == tuned["tokens"]
    report = ok_json("eval", "docs.store", "held.txt")
    assert report["parameters"] == parameters, "the defaults from now on"
    assert report["knn"]["perplexity"] == pytest.approx(tuned["knn_perplexity"], rel=1e-5)
    assert report["lm"]["perplexity"] == pytest.approx(tuned["lm_perplexity"], rel=1e-6)

    out = ok("tune", "docs.store", "held.txt", "--plot", "elsewhere.png", "--max-tokens", "30")
    assert "30 tokens to tune on" in out
    assert "stored k" in out
    assert Path("elsewhere.png").exists()
    assert "not tuned" not in ok("info", "docs.store")


def test_several_datastores_in_every_command_that_predicts(work: Path, models: Path) -> None:
    ok("build", "other.store", "strange.txt", "--model", str(models / "tiny"))
    both = ("docs.store", "--also", "other.store")
    weights = ("--lmbda", "0.3", "--lmbda", "0.1", "--k", "8")
    report = ok_json("eval", both[0], "held.txt", *both[1:], *weights)
    assert [(p["lmbda"], p["k"]) for p in report["parameters"]] == [(0.3, 8), (0.1, 8)]
    first = ok_json("eval", "docs.store", "held.txt", "--lmbda", "0.3", "--k", "8")
    unused = ok_json(
        "eval", both[0], "held.txt", *both[1:], "--lmbda", "0.3", "--lmbda", "0", "--k", "8"
    )
    assert unused["knn"] == first["knn"] != report["knn"]
    assert ok_json("generate", both[0], "The", *both[1:], *weights)["tokens"]
    explained = ok_json("explain", both[0], "The nearest QZ9", *both[1:], *weights)
    named = {source["store"] for token in explained["tokens"] for source in token["sources"]}
    assert named == {"docs.store", "other.store"}
    tuned = ok_json("tune", both[0], "held.txt", *both[1:], "--max-k", "8")
    for path, parameters in zip(both[::2], tuned["parameters"], strict=True):
        assert ok_json("info", path)["parameters"] == parameters
    assert "together with other.store" in " ".join(ok("info", "docs.store").split())
    assert_refused(
        work,
        ("eval", both[0], "held.txt", *both[1:], "--lmbda", "0.7"),
        "(λ) of several datastores must add up to at most 1, got 0.7 + 0.7 = 1.4",
    )


def test_a_build_ends_with_tuning_on_its_own_text(work: Path, models: Path) -> None:
    out = ok("build", "new.store", "texts", "--model", str(models / "tiny"), "--tune")
    assert "not tuned" not in out
    facts = ok_json("info", "new.store")
    stored = facts["tuning"]["stored"]
    assert stored["tokens"] == facts["tuning"]["tokens"] == facts["entries"]
    assert "each without its own votes" in " ".join(out.replace("│", " ").split())
    report = ok_json("eval", "new.store", "held.txt")
    assert report["knn"]["perplexity"] <= report["lm"]["perplexity"]


def test_tune_without_a_text_reads_the_stored_one(work: Path) -> None:
    out = ok("tune", "docs.store", "--max-k", "4", "--max-tokens", "100", "--seed", "5")
    assert "tokens of the stored text, from 2 documents" in out
    assert "each without its own votes" in out
    tuned = ok_json("tune", "docs.store", "--max-k", "4")
    assert tuned["stored"]["tokens"] == tuned["tokens"]
    assert tuned["overlap"] is None
    both = ok_json("tune", "docs.store", "held.txt", "--stored", "--max-k", "4")
    assert both["tokens"] > both["stored"]["tokens"] == tuned["tokens"]
    assert ok_json("info", "docs.store")["tuning"]["text"] == ["held.txt"]
    assert_refused(
        work, ("tune", "docs.store", "--window", "32"), "window, context and boundary must go with"
    )


def test_tune_says_so_where_nothing_helps(work: Path, models: Path) -> None:
    ok("build", "strange.store", "strange.txt", "--model", str(models / "tiny"))
    (work / "plain.txt").write_text("the nearest neighbors of a hidden state")
    out = ok("tune", "strange.store", "plain.txt")
    assert "No setting beats the language model alone" in out
    assert "stored λ = 0" in " ".join(out.split())
    assert Datastore(work / "strange.store").parameters == Parameters(
        **ok_json("info", "strange.store")["parameters"]
    )
    report = ok_json("eval", "strange.store", "plain.txt")
    assert report["parameters"]["lmbda"] == 0.0
    assert report["knn"]["perplexity"] == report["lm"]["perplexity"]


def test_eval_json_has_every_field(work: Path) -> None:
    report = ok_json("eval", "docs.store", "held.txt", "--k", "8", "--temperature", "20")
    assert report["tokens"] > 50
    for name in ("perplexity", "nats_per_token", "word_perplexity", "bits_per_byte"):
        assert report["lm"][name] > 0
        assert report["knn"][name] > 0
    assert report["knn"]["perplexity"] == pytest.approx(math.exp(report["knn"]["nats_per_token"]))
    assert report["parameters"] == {"k": 8, "lmbda": 0.25, "temperature": 20.0}
    assert set(report["seconds"]) == {"lm", "search", "total"}
    assert 0 < report["tokens_helped"] + report["tokens_hurt"] <= report["tokens"]
    assert report["size_bytes"] == (work / "held.txt").stat().st_size


def test_eval_options(work: Path) -> None:
    plain = ok_json("eval", "docs.store", "held.txt", "--lmbda", "0")
    assert plain["knn"] == plain["lm"]
    assert plain["tokens_helped"] == plain["tokens_hurt"] == 0
    report = ok_json("eval", "docs.store", "held.txt", "texts/0.txt", "--max-tokens", "100")
    assert report["tokens"] == 100
    narrow = ok_json("eval", "docs.store", "held.txt", "--window", "8", "--context", "0")
    assert narrow["lm"]["perplexity"] != plain["lm"]["perplexity"]
    stream = ok_json("eval", "docs.store", "texts", "--boundary", "stream")
    document = ok_json("eval", "docs.store", "texts")
    assert stream["tokens"] == document["tokens"] + 2
    certain = ok_json("eval", "docs.store", "held.txt", "--lmbda", "1", "--k", "1")
    assert certain["knn"]["perplexity"] is None, "infinite, which JSON cannot say"
    out = ok("eval", "docs.store", "held.txt", "--lmbda", "1", "--k", "1")
    assert "inf" in out
    assert "perplexity" in ok("eval", "docs.store", "held.txt")


def memorized(models: Path, text: str, *more: str) -> tuple[str, ...]:
    """Make a datastore that knows one text by heart; returns the options that make it say so."""
    Path("code.py").write_text(text)
    ok("build", "code.store", "code.py", "--model", str(models / "tiny"))
    return ("--k", "1", "--lmbda", "1", *more)


def test_generated_text_comes_as_it_is(work: Path, models: Path) -> None:
    line = 'if x[:x:] == "[bold]:100:[/bold]":\treturn  ' + "retriever, " * 20 + "end\n"
    options = memorized(models, line)
    (length,) = {len(tokens) for tokens in [byte_tokenizer()(line)["input_ids"]]}
    prompt = line[:12]
    given = len(byte_tokenizer()(prompt)["input_ids"])
    count = str(length - given)
    out = ok("generate", "code.store", prompt, "--max-new-tokens", count, *options)
    assert out == line + "\n", "no emoji, no markup, no tab expanded, no line wrapped"
    value = ok_json("generate", "code.store", prompt, "--max-new-tokens", count, *options)
    assert value["prompt"] + value["text"] == line
    assert len(value["tokens"]) == int(count)


def test_sampling(work: Path) -> None:
    arguments = ("generate", "docs.store", "The", "--sample", "--max-new-tokens", "12")
    first = ok_json(*arguments, "--seed", "1")
    assert ok_json(*arguments, "--seed", "1") == first
    assert ok_json(*arguments, "--seed", "2") != first
    # cold enough, a sample is the likeliest continuation; so is the narrowest nucleus
    plain = ("generate", "docs.store", "The nearest", "--max-new-tokens", "12")
    heavy = ("--lmbda", "0.9", "--k", "2", "--temperature", "0.1")
    greedy = ok_json(*plain, *heavy)["tokens"]
    for narrow in [("--sampling-temperature", "0.01"), ("--top-p", "0.01")]:
        assert ok_json(*plain, *heavy, "--sample", *narrow)["tokens"] == greedy
    hot = ok_json(*plain, *heavy, "--sample", "--sampling-temperature", "50")["tokens"]
    assert hot != greedy


def test_explain_a_text_and_a_file(work: Path, models: Path) -> None:
    text = "The nearest neighbors"
    explained = ok_json("explain", "docs.store", text)["tokens"]
    assert "".join(token["text"] for token in explained) == text
    assert {len(token["sources"]) for token in explained} == {3}
    (work / "some.txt").write_text(text)
    assert ok_json("explain", "docs.store", "some.txt")["tokens"] == explained
    out = ok("explain", "docs.store", text, "--tokens", "2", "--sources", "1")
    assert text in out
    assert len(re.findall(r"^token \d+ ", out, re.MULTILINE)) == 2
    named = re.findall(r"d² \S+ +(\S+), token \d+\n", out)
    assert len(named) == 2
    assert set(named) <= {"texts/0.txt", "texts/1.txt", "texts/2.txt"}
    assert "p_LM" not in ok("explain", "docs.store", text, "--tokens", "0")
    most = max(range(len(explained)), key=lambda number: abs(explained[number]["gain"]))
    assert most > 0
    shown = ok("explain", "docs.store", text, "--tokens", "1")
    assert f"token {most} {explained[most]['text']!r}\n" in shown, "the most changed first"
    chosen = ok("explain", "docs.store", text, "--at", "3", "--at", "0")
    assert re.findall(r"^token (\d+) ", chosen, re.MULTILINE) == ["0", "3"]

    options = memorized(models, "a[:x:] = [bold]:100:[/bold]")
    out = ok("explain", "code.store", "a[:x:] = [bold]:100:[/bold]", *options)
    assert "a[:x:] = [bold]:100:[/bold]" in out


def test_explain_groups_by_vote_and_adds_up_documents(work: Path) -> None:
    plain = ok_json("explain", "docs.store", "The nearest neighbors", "--sources", "4")
    out = ok("explain", "docs.store", "The nearest neighbors", "--at", "2", "--sources", "4")
    token = plain["tokens"][2]
    named = {source["token"] for source in token["sources"]} | {token["token"]}
    lines = out.splitlines()
    for vote in token["votes"]:
        described = f"{vote['weight']:.1%} of the vote, {vote['neighbors']} neighbor"
        if vote["token"] in named:
            (place,) = [n for n, line in enumerate(lines) if line.startswith(f"  {vote['text']!r}")]
            assert described in lines[place]
            own = [s for s in token["sources"] if s["token"] == vote["token"]]
            assert len(own) == 0 or f"{own[0]['weight']:.1%}" in lines[place + 1]
        else:
            assert described in out.partition("others: ")[2]
    total = sum(credit["tokens"] for credit in plain["documents"])
    parts = sum(credit["tokens"] for token in plain["tokens"] for credit in token["credits"])
    assert total == pytest.approx(parts)
    assert f"the language model │ {len(plain['tokens']) - total:6.1f}" in out


def test_explain_what_is_generated(work: Path) -> None:
    text = "The nearest"
    written = ok_json("generate", "docs.store", text, "--max-new-tokens", "5")
    plain = ok_json("explain", "docs.store", text, "--generate", "5")
    assert [token["token"] for token in plain["tokens"]] == written["tokens"]
    assert plain["text"] == written["text"]
    out = ok("explain", "docs.store", text, "--generate", "5")
    assert text + written["text"] in out
    assert "sources of these 5 tokens" in out


def test_explain_writes_a_page(work: Path) -> None:
    out = ok("explain", "docs.store", "<b>nearest</b>", "--html", "why.html")
    assert out.endswith("page: why.html\n")
    page = (work / "why.html").read_text(encoding="utf-8")
    assert "<b>nearest" not in page
    assert "http:" not in page
    assert "https:" not in page
    before = page
    ok_json("explain", "docs.store", "<b>nearest</b>", "--html", "why.html", "--tokens", "0")
    assert (work / "why.html").read_text(encoding="utf-8") == before
    for wrong, message in [(".", "html must be a file"), ("no/why.html", "no such folder")]:
        assert_refused(work, ("explain", "docs.store", "x", "--html", wrong), message)
    assert_refused(work, ("explain", "docs.store", "x", "--at", "1"), "at must be below 1")


def test_a_text_moves_no_cursor(work: Path) -> None:
    out = ok("explain", "docs.store", "a\x1b[2J\x9b2J\rb", "--at", "0")
    assert not set("\x1b\x9b\r") & set(out)


@pytest.mark.parametrize("text", ["word " * 100, "two\nlines", "x" * 300], ids=len)
def test_explain_takes_texts_that_are_no_names_of_files(work: Path, text: str) -> None:
    explained = ok_json("explain", "docs.store", text)["tokens"]
    assert "".join(token["text"] for token in explained) == text


def test_info(work: Path, models: Path) -> None:
    info = ok_json("info", "docs.store")
    assert info["parameters"] is None
    assert info["settings"]["window"] == 64
    assert info["settings"]["model"] == str(models / "tiny")
    assert "document_list" not in info
    listed = ok_json("info", "docs.store", "--documents")["document_list"]
    assert [document["name"] for document in listed] == [f"texts/{n}.txt" for n in range(3)]
    assert listed[-1]["stop"] == info["entries"]
    out = ok("info", "docs.store", "--documents")
    assert "not tuned" in out
    assert f"{info['entries']:,}" in out
    assert "texts/1.txt" in out


@pytest.mark.parametrize("kind", ["exact", "ivf", "auto"])
def test_index(work: Path, kind: str) -> None:
    before = ok_json("eval", "docs.store", "held.txt", "--k", "5")
    built = ok_json("index", "docs.store", "--kind", kind, "--recall", "1.0", "--k", "5")
    after = ok_json("eval", "docs.store", "held.txt", "--k", "5")
    assert after["knn"]["perplexity"] == pytest.approx(before["knn"]["perplexity"], rel=1e-4)
    assert built["kind"] == (kind if kind != "auto" else "exact")
    assert ok_json("info", "docs.store")["index"] == built
    assert f"│ {built['kind']}" in ok("index", "docs.store", "--kind", kind, "--k", "5")


def test_an_index_is_measured_on_held_out_text(work: Path, models: Path) -> None:
    """One list finds the neighbors of stored keys worse or better than those of another text."""
    given = ("index", "docs.store", "--kind", "faiss", "--factory", "IVF8,Flat", "--nprobe", "1")
    stored = ok_json(*given, "--k", "5")
    held_out = ok_json(*given, "--k", "5", "--queries", "held.txt", "--queries", "strange.txt")
    assert stored["recall"] != held_out["recall"]
    lm = LanguageModel.load(str(models / "tiny"))
    store = Datastore("docs.store")
    texts = [Path(name).read_text() for name in ("held.txt", "strange.txt")]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    queries = held_out_queries(lm, store, documents)
    assert len(queries) == sum(len(lm.encode([text])[0]) for text in texts)
    farthest = ExactIndex(store).search(queries, 5).squared_distances[:, -1:]
    found = open_index(store).search(queries, 5).rows
    keys = store.keys_at(found.flatten()).view(*found.shape, -1).double()
    distances = (keys - queries.double()[:, None]).square().sum(dim=2)
    hits = (distances <= farthest * (1 + TOLERANCE)).double().mean().item()  # ties count
    assert held_out["recall"] == pytest.approx(hits, abs=1e-6)
    assert torch.equal(held_out_queries(lm, store, documents, max_tokens=100), queries[:100])
    with pytest.raises(InvalidArgumentError, match="hold no text"):
        held_out_queries(lm, store, [])


def test_a_poor_index_is_a_warning_in_every_report(work: Path) -> None:
    poor = ("--kind", "faiss", "--factory", "LSH", "--recall", "1.0", "--k", "40")
    assert ok_json("index", "docs.store", *poor)["recall"] < 1.0
    for command in ("eval", "tune"):
        result = runner.invoke(app, (command, "docs.store", "held.txt"))
        assert result.exit_code == 0, result.output
        assert "warning: the index finds" in result.stderr
        assert "below the 100.0% asked for; knnlm index docs.store" in result.stderr
    ok("index", "docs.store", "--kind", "exact")
    assert "warning" not in runner.invoke(app, ("eval", "docs.store", "held.txt")).stderr


def test_names_are_shown_as_they_are(work: Path, models: Path) -> None:
    (work / "a[b]:x:.txt").write_text("A name in brackets.")
    ok("build", "[red]:100:.store", "a[b]:x:.txt", "--model", str(models / "tiny"))
    out = ok("info", "[red]:100:.store", "--documents")
    assert out.startswith("[red]:100:.store")
    assert "a[b]:x:.txt\n" in out


def test_forget_compact_verify(work: Path) -> None:
    before = ok_json("info", "docs.store")
    forgotten = ok_json("forget", "docs.store", "texts/1.txt")
    assert forgotten["documents"] == ["texts/1.txt"]
    info = ok_json("info", "docs.store")
    assert info["entries"] == before["entries"] - forgotten["entries"]
    assert info["forgotten_entries"] == forgotten["entries"]
    assert "knnlm compact removes them" in ok("info", "docs.store")
    removed = ok_json("compact", "docs.store")
    assert (removed["documents"], removed["entries"]) == (1, forgotten["entries"])
    assert removed["size_bytes"] > 0
    found = ok_json("verify", "docs.store")
    assert found["problems"] == []
    assert found["entries"] == info["entries"]
    assert "forgot 2 documents" in ok("forget", "docs.store", "texts/*")
    assert "removed 2 documents" in ok("compact", "docs.store")
    assert "0 shards with 0 entries are sound" in ok("verify", "docs.store")
    assert ok_json("eval", "docs.store", "held.txt")["tokens_helped"] == 0
    assert ok_json("generate", "docs.store", "The", "--max-new-tokens", "2")["tokens"]


def test_verify_names_the_damaged_file(work: Path) -> None:
    (shard,) = (work / "docs.store" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = runner.invoke(app, ["verify", "docs.store"])
    assert result.exit_code == 1
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not is_progress(line)]
    assert errors == [
        f"error: docs.store/shards/{shard.name}: the contents differ from the checksum taken when "
        "it was written"
    ]
    result = runner.invoke(app, ["verify", "docs.store", "--json"])
    assert result.exit_code == 1
    assert shard.name in json.loads(result.stdout)["problems"][0]


# refusals


def assert_refused(folder: Path, arguments: tuple[str, ...], *parts: str) -> None:
    """One line on stderr that holds the parts in order, nothing on stdout, the disk as it was."""
    before = snapshot(folder)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    rest = result.stderr
    for part in parts:
        assert part in rest, result.stderr
        rest = rest.partition(part)[2]
    assert snapshot(folder) == before


NEW = ("build", "new.store")
STORE = "docs.store"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # text
        ((*NEW, "no/such.txt"), ("text source 'no/such.txt'", "nothing is there: check the path")),
        ((*NEW, "texts/*.rst"), ("text source 'texts/*.rst'", "nothing is there: check the path")),
        ((*NEW, "empty.txt"), ("empty.txt must hold UTF-8 text, but is empty: leave it out",)),
        ((*NEW, "latin.txt"), ("latin.txt must be UTF-8, but byte 3 is not", ": convert it to")),
        ((*NEW, "rows.jsonl"), ("rows.jsonl:1: text_column 'text'", "which are 'body'")),
        (
            (*NEW, "bad.jsonl", "--text-column", "body"),
            ("bad.jsonl:100: the row cannot be read (JSONDecodeError", "correct or leave it out"),
        ),
        (("build", STORE, "bad.jsonl", "--text-column", "body"), ("bad.jsonl:100: ",)),
        (("eval", STORE, "no/such.txt"), ("text source 'no/such.txt'",)),
        (("eval", STORE, "bad.jsonl", "--text-column", "body"), ("bad.jsonl:100: ",)),
        (("eval", STORE, "rows.jsonl"), ("rows.jsonl:1: text_column 'text'",)),
        (("eval", STORE, "latin.txt"), ("latin.txt must be UTF-8, but byte 3 is not",)),
        (("tune", STORE, "empty.txt"), ("empty.txt must hold UTF-8 text",)),
        (("tune", STORE, "texts/*.rst"), ("text source 'texts/*.rst'",)),
        (("explain", STORE, "latin.txt"), ("latin.txt must be UTF-8, but byte 3 is not",)),
        (("explain", STORE, ""), ("the text to explain must have a token, got none",)),
        # the model
        (
            (*NEW, "texts", "--model", "./nowhere"),
            ("model './nowhere' must be a folder with config.json", "is no folder; check the path"),
        ),
        (("eval", STORE, "held.txt", "--model", "./nowhere"), ("model './nowhere' must be",)),
        (
            ("eval", STORE, "held.txt", "--model", "{models}/other"),
            ("docs.store was built with ", "tiny (weights ", "not with ", "other (weights "),
        ),
        (
            ("build", STORE, "held.txt", "--model", "{models}/other"),
            ("docs.store was built with ", "not with ", "load that model or build another"),
        ),
        (
            ("generate", STORE, "x", "--model", "{models}/wide"),
            ("docs.store was built with ", "(vocabulary size 384), not with", "size 512)"),
        ),
        (
            (*NEW, "texts", "--model", "{models}/nan"),
            ("a key of texts/2.txt is not finite: ", "load it in float32 or leave"),
        ),
        (
            (*NEW, "texts", "--model", "{models}/huge"),
            ("key_dtype float16 cannot hold a key of texts/", "key_dtype bfloat16"),
        ),
        (("eval", STORE, "held.txt", "--device", "tpu"), ("device='tpu' must be auto, cpu",)),
        # the datastore
        (("eval", "texts", "held.txt"), ("texts is not a datastore", "make one with: knnlm build")),
        (("tune", "texts", "held.txt"), ("texts is not a datastore",)),
        (("generate", "nowhere", "x"), ("nowhere is not a datastore",)),
        (("explain", "texts", "x"), ("texts is not a datastore",)),
        (("info", "held.txt"), ("held.txt is not a datastore",)),
        (("forget", "texts", "x"), ("texts is not a datastore",)),
        (("compact", "texts"), ("texts is not a datastore",)),
        (("verify", "texts"), ("texts is not a datastore",)),
        (("build", "texts", "held.txt"), ("texts is a folder with other files in it",)),
        (("forget", STORE, "texts/0.txt", "nothing"), ("docs.store has no document 'nothing'",)),
        (
            ("build", STORE, "held.txt", "--window", "32"),
            ("docs.store was built with window 64, not 32; leave window out",),
        ),
        (
            ("build", STORE, "held.txt", "--key", "output"),
            ("docs.store was built with key ffn_input, not output; leave --key out",),
        ),
        (
            ("index", STORE, "--kind", "ivf", "--factory", "Flat"),
            ("factory goes with kind faiss", "got kind 'ivf' and factory 'Flat'"),
        ),
        # parameters
        *(
            ((command, STORE, text, *bad), (rule,))
            for command, text in [("eval", "held.txt"), ("generate", "x"), ("explain", "x")]
            for bad, rule in [
                (("--k", "0"), "k must be at least 1, got 0: ask for a neighbor"),
                (("--k", "99999"), "k must be at most the number of entries, "),
                (("--lmbda", "1.5"), "lmbda (λ) must lie in [0, 1], got 1.5: 0 is the language"),
                (("--lmbda", "-0.1"), "lmbda (λ) must lie in [0, 1], got -0.1: 0 is the language"),
                (("--temperature", "0"), "temperature must be positive and finite, got 0.0: 1 is"),
                (("--temperature", "-2"), "temperature must be positive and finite, got -2.0"),
            ]
        ),
        *(
            ((*command, *bad), (rule,))
            for command in [
                (*NEW, "texts"),
                ("eval", STORE, "held.txt"),
                ("tune", STORE, "held.txt"),
            ]
            for bad, rule in [
                (("--window", "257"), "window must be at most 256 for "),
                (("--window", "0"), "window must be at least 1, got 0: choose a larger one"),
                (
                    ("--window", "32", "--context", "32"),
                    "context must be at least 0 and less than window (32), got 32: choose",
                ),
            ]
        ),
        ((*NEW, "texts", "--max-entries", "0"), ("max_entries must be at least 1, got 0",)),
        (("eval", STORE, "held.txt", "--max-tokens", "0"), ("max_tokens must be at least 1",)),
        (("tune", STORE, "held.txt", "--max-k", "0"), ("max_k must be at least 1, got 0",)),
        (("generate", STORE, "x", "--max-new-tokens", "0"), ("max_new_tokens must be at least 1",)),
        (
            ("generate", STORE, "x" * 200, "--max-new-tokens", "100"),
            (
                "prompt (",
                "and max_new_tokens (100) must fit the model's 256 positions; shorten",
            ),
        ),
        # the disk
        (("build", "held.txt/new", "texts"), ("cannot write held.txt/new: Not a directory",)),
        (("build", "held.txt", "texts"), ("held.txt is a file, not a folder; name a new folder",)),
        (("build", "/proc/new", "texts"), ("cannot write /proc/new: ",)),
        (
            ("tune", STORE, "held.txt", "--plot", "no/where.png"),
            ("cannot write to no: no such folder; create it first",),
        ),
        (("info", "x" * 300 + "\nx"), ("x/catalog.sqlite cannot be read (File name too long)",)),
        (("info", "two\nlines"), ("two lines is not a datastore",)),
        # what needs no model is refused before one is loaded
        (
            ("eval", STORE, "held.txt", "--k", "0", "--model", "./nowhere"),
            ("k must be at least 1",),
        ),
        (("tune", STORE, "held.txt", "--max-k", "0", "--model", "./nowhere"), ("max_k must be",)),
    ],
    ids=lambda value: " ".join(value)[:60] if value and isinstance(value, tuple) else None,
)
def test_refused(
    work: Path, models: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    filled = tuple(argument.replace("{models}", str(models)) for argument in arguments)
    if filled[0] == "build" and filled[1] != STORE and "--model" not in filled:
        filled += ("--model", str(models / "tiny"))
    assert_refused(work, filled, *parts)


def test_a_folder_that_is_not_writable(work: Path, models: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2048) as disk:
        store = disk.path / "docs.store"
        shutil.copytree("docs.store", store)
        disk.make_read_only()
        rule = "the folder is not writable; change its permissions or choose another"
        new = disk.path / "new.store"
        build = ("build", str(new), "texts", "--model", str(models / "tiny"))
        assert_refused(disk.path, build, f"cannot write {new}: {rule}")
        assert_refused(disk.path, ("build", str(store), "held.txt"), str(store), rule)
        assert_refused(disk.path, ("forget", str(store), "texts/*"), str(store), rule)
        assert_refused(disk.path, ("compact", str(store)), str(store), rule)
        assert_refused(disk.path, ("tune", str(store), "held.txt"), str(store), rule)
        # reading needs no permission to write
        assert ok_json("eval", str(store), "held.txt")["tokens"] > 0
        assert ok_json("verify", str(store))["problems"] == []
        assert "texts/0.txt" in ok("info", str(store), "--documents")


def test_a_damaged_catalog_is_one_line(work: Path) -> None:
    (work / "docs.store" / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    assert_refused(work, ("info", "docs.store"), "catalog.sqlite", "is damaged")


def test_an_empty_datastore_has_nothing_to_tune_or_explain_with(work: Path) -> None:
    ok("forget", "docs.store", "*")
    assert_refused(work, ("tune", "docs.store", "held.txt"), "docs.store must have entries to tune")
    assert_refused(work, ("explain", "docs.store", "x"), "docs.store must have entries to explain")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("build",),
        ("build", "new.store"),
        ("eval", "docs.store", "held.txt", "--no-such-option"),
        ("eval", "docs.store", "held.txt", "--k", "many"),
        ("build", "new.store", "texts", "--boundary", "page"),
        ("generate", "docs.store", "x", "--top-p", "2"),
        ("explain", "docs.store", "x", "--sources", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(work: Path, arguments: tuple[str, ...]) -> None:
    before = snapshot(work)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output
    assert snapshot(work) == before


@pytest.mark.parametrize("command", [(), ("build",), ("eval",), ("forget",)], ids=" ".join)
def test_help(command: tuple[str, ...]) -> None:
    out = ok(*command, "--help")
    assert "Usage: " in out
    assert "--help" in out


def test_an_interruption_exits_130_and_the_same_command_goes_on(
    work: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["build", "new.store", "texts", "--model", str(models / "tiny")]

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("knnlm.datastore.shard_making.read_batch", interrupted)
        result = runner.invoke(app, arguments)
    assert result.exit_code == 130
    assert result.stdout == ""
    (message,) = [line for line in result.stderr.splitlines() if not is_progress(line)]
    assert message == (
        "interrupted: everything committed so far is kept; rerun the same command to resume"
    )
    assert "Aborted" not in result.stderr
    assert ok_json(*arguments)["documents"] == 3


def test_progress_stays_off_the_standard_output(work: Path) -> None:
    result = runner.invoke(app, ["eval", "docs.store", "held.txt", "--json"])
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("eval ")]
    tokens = json.loads(result.stdout)["tokens"]
    assert f"{tokens}/{tokens} tokens" in line


def lines_of(*arguments: str) -> tuple[int, list[str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "knnlm", *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_a_real_process_prints_nothing_but_results_and_progress(work: Path, models: Path) -> None:
    for arguments in [
        ("build", "new.store", "texts", "--model", str(models / "tiny"), "--no-tune", "--json"),
        ("tune", "new.store", "held.txt", "--max-tokens", "20", "--json"),
        ("generate", "new.store", "The", "--sample", "--max-new-tokens", "5", "--json"),
    ]:
        status, out, err = lines_of(*arguments)
        assert (status, len(out)) == (0, 1)
        assert json.loads(out[0])
        assert [line for line in err if not is_progress(line)] == []
    status, out, err = lines_of("eval", "new.store", "no/such.txt")
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("error: text source 'no/such.txt'")
    status, out, err = lines_of("eval", "--nonsense")
    assert (status, out) == (2, [])
    assert "Usage: python -m knnlm eval" in err[0] or "Usage: knnlm eval" in err[0]
