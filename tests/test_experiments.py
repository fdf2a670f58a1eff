"""Every experiment on a tiny random model and tiny texts: it ends, writes JSON and a picture."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, byte_tokenizer, tiny_llama

from knnlm.mixture.interpolation import Voters
from knnlm.mixture.parameters import Parameters

FOLDER = Path(__file__).parents[1] / "experiments"
EXPERIMENTS = [
    "datastore_size",
    "domain_adaptation",
    "helped_and_hurt",
    "in_domain",
    "k",
    "key_choices",
    "lmbda",
    "more_data",
    "ngram",
    "other_domain",
    "quantized_distances",
    "rare_and_factual",
    "saved_searches",
    "self_tuning",
    "stranger",
    "sweep",
    "temperature",
]
OPTIONS = {
    "more_data": ["--tuned-on", "300", "--entries", "900"],
    "self_tuning": ["--entries", "900"],
}
SHARED = {"experiment", "measuring", "reference", "texts", "training"}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run an experiment's `main`; all of them share a folder, as they are meant to."""
    folder = tmp_path_factory.mktemp("experiments")
    model = folder / "model"
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    texts = {}
    for split, documents in (("train", 30), ("valid", 6), ("test", 6), ("other", 9)):
        texts[split] = folder / split
        texts[split].mkdir()
        for number in range(documents):
            text = f"The {split} of Number {number}, {number * number}: {PROSE[number % 17 :]}"
            (texts[split] / f"{number}.txt").write_text(text)

    def run_main(name: str, *options: str) -> dict[str, Any]:
        held_out = [str(texts["valid"]), str(texts["test"])]
        sources = ["--train", str(texts["train"]), "--valid", held_out[0], "--test", held_out[1]]
        if name in ("domain_adaptation", "stranger"):
            sources = ["--domain", "one", str(texts["train"]), *held_out]
            sources += ["--domain", "two", str(texts["other"]), *held_out]
        common = ["--model", str(model), "--work", str(folder / "work")]
        common += ["--results", str(folder / "results")]
        common += ["--valid-tokens", "500", "--test-tokens", "500"]
        importlib.import_module(name).main([*common, *sources, *options])
        assert (folder / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        results: dict[str, Any] = json.loads((folder / "results" / f"{name}.json").read_text())
        return results

    return run_main


def test_every_script_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*EXPERIMENTS, *SHARED])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_begins_with_the_command_to_copy(name: str) -> None:
    docstring = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert docstring.split("\n\n")[1].strip().startswith(f"python experiments/{name}.py --model ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_to_the_end(run: Run, name: str) -> None:
    results = run(name, *OPTIONS.get(name, []))
    assert results["setting"]["windows_scored"]["boundary"] == "stream"
    assert results["provenance"]["versions"]["knnlm"]


def test_nothing_is_read_or_searched_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("k")
    experiment = importlib.import_module("experiment")
    monkeypatch.setattr(experiment, "read_scores", None)
    monkeypatch.setattr(experiment, "ExactIndex", None)
    monkeypatch.setattr(experiment.knnlm, "build", None, raising=False)
    second = run("k")
    assert second["curves"] == first["curves"]


def test_lambda_0_is_the_language_model(run: Run) -> None:
    curve = run("lmbda")["curves"]["given"]["given"]
    assert curve[0] == pytest.approx(run("k")["lm_perplexity"], rel=1e-6)


def test_all_of_the_datastore_is_the_paper_recipe(run: Run) -> None:
    whole = run("datastore_size")["curves"]["given"][-1]["perplexity"]
    assert whole == run("in_domain")["measured"]["+ kNN"]["perplexity"]
    assert whole == run("quantized_distances")["measured"]["exact search"]["perplexity"]


def test_the_default_key_is_found_as_the_datastore_finds_it(run: Run) -> None:
    """Keys captured beside five others, searched by FAISS, against build and exact search."""
    captured = run("key_choices")["measured"]["ffn_input"]["T 1"]["perplexity"]
    stored = run("in_domain")["measured"]["+ kNN"]["perplexity"]
    assert captured == pytest.approx(stored, rel=2e-3)


def test_agrees_with_the_library(run: Run, tmp_path: Path) -> None:
    """The recipe's perplexity against `KNNLM.perplexity` on the same datastore."""
    import knnlm

    results = run("in_domain")
    recipe = results["measured"]["+ kNN"]["parameters"][0]
    work = next(path for path in tmp_path.parent.glob("experiments*/work") if path.is_dir())
    store = next(
        knnlm.Datastore(path)
        for path in work.glob("*.store")
        if knnlm.Datastore(path).rows == results["entries"]
    )
    lm = knnlm.LanguageModel.load(work.parent / "model")
    if store.settings.weights_fingerprint != lm.weights_fingerprint:
        pytest.fail("another model's datastore has as many entries")
    model = knnlm.KNNLM(lm, store, **recipe)
    report = model.perplexity(knnlm.read_documents(work.parent / "test"), max_tokens=500)
    measured = results["measured"]
    assert report.lm.perplexity == pytest.approx(measured["LM"]["perplexity"], rel=1e-5)
    assert report.knn.perplexity == pytest.approx(measured["+ kNN"]["perplexity"], rel=1e-5)
    assert report.lm.word_perplexity == pytest.approx(measured["LM"]["word_perplexity"], rel=1e-3)
    report = model.perplexity(knnlm.read_documents(work.parent / "valid"), max_tokens=500)
    on_valid = {setting: numbers["valid_perplexity"] for setting, numbers in measured.items()}
    assert report.lm.perplexity == pytest.approx(on_valid["LM"], rel=1e-5)
    assert report.knn.perplexity == pytest.approx(on_valid["+ kNN"], rel=1e-5)
    assert on_valid[results["chosen"]] == min(on_valid.values())


def test_the_papers_protocol(tmp_path: Path) -> None:
    experiment = importlib.import_module("experiment").Experiment(
        "x", ["--model", "m", "--work", str(tmp_path), "--paper-protocol"]
    )
    assert (experiment.built.window, experiment.built.context) == (3072, 1536)
    assert (experiment.scored.window, experiment.scored.context) == (3072, 2560)


def test_the_papers_protocol_from_building_to_the_picture(run: Run, tmp_path: Path) -> None:
    """A model of 3,072 positions; the first 1,536 tokens of the stream are read, but not stored."""
    model = tiny_llama()
    model.config.max_position_embeddings = 3072
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    texts = ["--valid-tokens", "700", "--test-tokens", "700", "--entries", "4000"]
    results = run("in_domain", "--paper-protocol", "--model", str(tmp_path), *texts)
    assert results["setting"]["windows_built"] == {
        "window": 3072,
        "context": 1536,
        "boundary": "stream",
        "control_tokens": False,
    }
    assert results["setting"]["windows_scored"]["context"] == 2560
    assert 0 < results["entries"] <= 4000
    assert results["measured"]["+ kNN"]["perplexity"] < results["measured"]["LM"]["perplexity"]


def test_ngram_probabilities_sum_to_1() -> None:
    ngram = importlib.import_module("ngram")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (300,), generator=generator).tolist()
    model = ngram.KneserNey(tokens, 9)
    for before in [(), (3,), (8,), (1, 2), tuple(tokens[10:14]), (8, *tokens[20:23]), (5, 5, 5, 5)]:
        assert sum(model.prob(before, token) for token in range(9)) == pytest.approx(1.0)


def test_ngrams_against_kneser_and_ney_by_hand() -> None:
    """Counts of a b a c a b: bigrams ab 2, ba 1, ac 1, ca 1; discounts of both orders by hand."""
    ngram = importlib.import_module("ngram")
    model = ngram.KneserNey([0, 1, 0, 2, 0, 1], 3, max_order=2)
    # unigrams count distinct predecessors: a 2 (b, c), b 1 (a), c 1 (a); n1 2, n2 1: D = 2/4
    # bigrams: n1 3, n2 1: D = 3/5
    unigram = [(2 - 0.5) / 4 + 1.5 / 4 / 3, 0.5 / 4 + 1.5 / 4 / 3, 0.5 / 4 + 1.5 / 4 / 3]
    left = 0.6 * 2 / 3
    expected = [left * unigram[0], 1.4 / 3 + left * unigram[1], 0.4 / 3 + left * unigram[2]]
    assert [model.prob((0,), token) for token in range(3)] == pytest.approx(expected)


def test_only_the_first_rows_are_found(run: Run) -> None:
    points = run("datastore_size")["curves"]["given"]
    assert [point["entries"] for point in points] == sorted(point["entries"] for point in points)
    assert (
        points[0]["median_nearest_squared_distance"]
        >= (points[-1]["median_nearest_squared_distance"])
    )


def test_measures_add_up() -> None:
    measuring = importlib.import_module("measuring")
    lm_log_probs = torch.tensor([-1.0, -2.0, -3.0])
    held_out = measuring.HeldOut(
        keys=torch.zeros(3, 2),
        inputs=torch.zeros(3),
        targets=torch.tensor([4, 5, 6]),
        lm_log_probs=lm_log_probs,
        lm=None,
        documents=torch.zeros(3),
        words=2,
        size_bytes=5,
        digest="",
    )
    measured = measuring.measure(held_out, lm_log_probs + 0.5)
    assert measured["perplexity"] == pytest.approx(math.exp(1.5))
    assert measured["word_perplexity"] == pytest.approx(math.exp(4.5 / 2))
    assert measured["bits_per_byte"] == pytest.approx(4.5 / math.log(2) / 5)
    assert measured["change"] == pytest.approx(math.exp(-0.5) - 1)
    assert measured["change_interval"] == pytest.approx([measured["change"]] * 2)
    assert measured["drawn_from"] == "blocks of 256 tokens"
    voters = Voters(torch.tensor([[1.0], [1.0], [torch.inf]]), torch.tensor([[4], [9], [-1]]))
    neighbors = measuring.target_neighbors(held_out, voters)
    mixed = measuring.mixed(neighbors, Parameters(1, 0.5, 1.0))
    expected = [0.5 + 0.5 * math.exp(-1), 0.5 * math.exp(-2), math.exp(-3)]
    assert mixed.exp().tolist() == pytest.approx(expected)
    groups = measuring.groups(
        held_out, mixed, {"first": torch.tensor([True, False, False]), "none": torch.zeros(3) > 0}
    )
    assert list(groups) == ["first"]
    assert groups["first"]["knn_perplexity"] == pytest.approx(1 / expected[0])


def test_words_are_sorted_into_kinds() -> None:
    script = importlib.import_module("rare_and_factual")

    class Characters:
        def decode(self, tokens: list[int]) -> str:
            return "".join(map(chr, tokens))

    text = "The call os.path of PyTorch in Paris was 42 % – well. Then it ended"
    kinds = script.token_kinds(Characters(), torch.tensor([ord(c) for c in text]))
    of_words = {word: kinds[text.index(word)] for word in text.split()}
    assert of_words == {
        "The": "other word",
        "call": "other word",
        "os.path": "identifier",
        "of": "other word",
        "PyTorch": "identifier",
        "in": "other word",
        "Paris": "capitalized",
        "was": "other word",
        "42": "number",
        "%": "punctuation",
        "–": "punctuation",
        "well.": "other word",
        "Then": "other word",
        "it": "other word",
        "ended": "other word",
    }
    assert kinds[text.index(" ")] == "space"


def test_tags_are_stripped() -> None:
    texts = importlib.import_module("texts")
    page = (
        "<html><head><title>T</title></head><body><div class='navheader'><div>Up</div></div>"
        "<div><p>One &lt; two</p>\n \n\n<pre>x = 1\n</pre></div></body></html>"
    )
    assert texts._strip_tags(page) == "One < two\n\nx = 1\n"


def test_modules_do_not_stay() -> None:
    """Scripts are imported by name: none may hide a module of the tests or the benchmarks."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    others = {path.stem for path in Path(__file__).parent.rglob("*.py")}
    others |= {path.stem for path in (FOLDER.parent / "benchmarks").glob("*.py")}
    assert not names & (others | set(sys.stdlib_module_names))
