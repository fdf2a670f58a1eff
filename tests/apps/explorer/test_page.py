"""The page in a real browser: its numbers are the library's, and nothing in a text is markup."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import PARAMETERS, Served, fresh_lm, opening, serving
from stores import distinct_documents

from knnlm.apps.explorer.analysis import analyze
from knnlm.apps.explorer.page import standalone_page
from knnlm.datastore.datastore import Datastore
from knnlm.evaluation.explanation import sum_credits
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.text.documents import Document

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser found: {', '.join(BROWSERS)}")

OWNED = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
TEXT = f"A datastore is a retriever: one entry.\n{OWNED} ☃ The nearest places vote."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "store"
    documents = [*distinct_documents(3), Document(f"{OWNED}.html", f"{OWNED} {TEXT}")]
    build(path, fresh_lm(), documents, window=64, context=16)
    return path


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(lambda: opening(path)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Yield a page on which nothing may go wrong and which may ask nobody else."""
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if is_elsewhere(request) else None)
    yield page
    assert "owned" not in page.title()
    page.close()
    assert wrong == []


def is_elsewhere(request: Any) -> bool:
    return not str(request.url).startswith(("http://127.0.0.1:", "file:", "data:"))


@pytest.fixture
def explained(page: Any, served: Served) -> Any:
    """A page that has explained TEXT."""
    page.goto(f"{served.url}/explorer")
    page.fill("#text", TEXT)
    page.click("#explain")
    page.wait_for_selector("#result:not([hidden])")
    return page


@pytest.fixture(scope="module")
def with_parameters(path: Path) -> Callable[..., KNNLM]:
    lm = fresh_lm()
    return lambda **parameters: KNNLM(lm, Datastore(path), **(PARAMETERS | parameters))


def figure(page: Any, which: str) -> float:
    """Return a perplexity as precisely as the page has it."""
    title: str = page.get_attribute(f"#{which}-perplexity", "title")
    value = float(title.removeprefix("perplexity ").replace("Infinity", "inf"))
    shown: str = page.inner_text(f"#{which}-perplexity")
    assert shown == ("∞" if math.isinf(value) else f"{value:.4f}")
    return value


def put(page: Any, **values: float) -> None:
    for name, value in values.items():
        page.fill(f"#{name}-0-number", str(value))
    settle(page)


def settle(page: Any) -> None:
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def test_it_shows_the_datastore(page: Any, served: Served, path: Path) -> None:
    page.goto(f"{served.url}/explorer")
    page.wait_for_selector("#datastores:not([hidden])")
    assert page.inner_text("#title") == "tiny"
    page.click("#datastores summary")
    shown = page.inner_text("#datastore-list")
    for part in (str(path), f"{len(Datastore(path)):,}", "exact search", f"{OWNED}.html", "d2"):
        assert part in shown


def test_the_perplexities_are_the_librarys(
    explained: Any, with_parameters: Callable[..., KNNLM]
) -> None:
    report = with_parameters().perplexity([Document("t", TEXT)])
    assert figure(explained, "lm") == pytest.approx(report.lm.perplexity, rel=1e-4)
    assert figure(explained, "knn") == pytest.approx(report.knn.perplexity, rel=1e-4)
    shown = explained.inner_text("#tokens").replace("⏎\n", "\n").replace("·", "")
    assert shown == TEXT  # "·" for the further tokens of one character
    assert explained.locator("#tokens .token").count() == report.tokens
    helped, hurt = explained.inner_text("#helped").split(" / ")
    assert helped == f"{report.tokens_helped / report.tokens * 100:.1f} %"
    assert hurt == f"{report.tokens_hurt / report.tokens * 100:.1f} %"


@pytest.mark.parametrize(
    "values",
    [
        {"lmbda": 0.73},
        {"lmbda": 0.0},
        {"lmbda": 1.0, "k": 256},
        {"k": 1},
        {"temperature": 0.5},
        {"lmbda": 0.2, "k": 100, "temperature": 3.0},
    ],
    ids=str,
)
def test_the_sliders_give_what_the_library_computes(
    explained: Any, with_parameters: Callable[..., KNNLM], values: dict[str, float]
) -> None:
    put(explained, **values)
    report = with_parameters(**values).perplexity([Document("t", TEXT)])
    assert figure(explained, "knn") == pytest.approx(report.knn.perplexity, rel=1e-4)
    assert figure(explained, "lm") == pytest.approx(report.lm.perplexity, rel=1e-4)
    explained.click("text=reset")
    settle(explained)
    report = with_parameters().perplexity([Document("t", TEXT)])
    assert figure(explained, "knn") == pytest.approx(report.knn.perplexity, rel=1e-4)


def test_a_slider_moved_by_key_and_by_mouse(
    explained: Any, with_parameters: Callable[..., KNNLM]
) -> None:
    colours = "() => [...document.querySelectorAll('#tokens .token')].map((t) => t.dataset.level)"
    before = explained.evaluate(colours)
    explained.focus("#lmbda-0")
    for _ in range(3):
        explained.keyboard.press("ArrowRight")
    settle(explained)
    assert explained.input_value("#lmbda-0-number") == "0.43"
    report = with_parameters(lmbda=0.43).perplexity([Document("t", TEXT)])
    assert figure(explained, "knn") == pytest.approx(report.knn.perplexity, rel=1e-4)
    box = explained.locator("#lmbda-0").bounding_box()
    explained.mouse.click(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    settle(explained)
    assert explained.input_value("#lmbda-0-number") == "1"
    assert explained.evaluate(colours) != before


def test_every_token_is_mixed_as_the_library_does(
    page: Any, served: Served, with_parameters: Callable[..., KNNLM], path: Path, tmp_path: Path
) -> None:
    lm = with_parameters().lm
    other = build(tmp_path / "other", lm, [Document("o", f"{TEXT} Again.")], window=64)
    model = KNNLM(lm, [Datastore(path), other], k=[9, 5], lmbda=[0.3, 0.5], temperature=[8.0, 20.0])
    page.goto(f"{served.url}/explorer")
    settings = [
        {"k": 9, "lmbda": 0.3, "temperature": 8.0},
        {"k": 5, "lmbda": 0.5, "temperature": 20.0},
    ]
    found = page.evaluate(
        """([plain, settings]) => {
          const mixed = Mixture.mix(Mixture.read(plain), settings);
          return {
            logProbs: [...mixed.logProbs], knnProbs: [...mixed.knnProbs],
            credits: mixed.credits.map((of) => [...of]), lm: mixed.lmCredit,
          };
        }""",
        [analyze(model, TEXT).to_dict(), settings],
    )
    explanations = model.explain(TEXT)
    assert found["logProbs"] == pytest.approx([e.log_prob for e in explanations], abs=1e-5)
    assert found["knnProbs"] == pytest.approx([e.knn_prob for e in explanations], abs=1e-5)
    total = sum_credits(explanations)
    assert sum(map(sum, found["credits"])) == pytest.approx(sum(c.tokens for c in total), abs=1e-4)
    assert found["lm"] == pytest.approx(len(explanations) - sum(c.tokens for c in total), abs=1e-4)
    assert found["credits"][1] == pytest.approx(
        [credit.tokens for credit in total if credit.store == str(other.path)], abs=1e-4
    )


def test_a_token_shows_its_neighbors(explained: Any, with_parameters: Callable[..., KNNLM]) -> None:
    number = TEXT.index("nearest") % 7 + 10
    explained.click(f"#tokens .token >> nth={number}")
    explanation = with_parameters().explain(TEXT, sources=1000)[number]
    explained.wait_for_selector("#detail mark")
    shown = explained.inner_text("#detail")
    assert f"Token {explanation.text.replace(' ', '␣')} ({number} of" in " ".join(shown.split())
    assert f"{explanation.gain:+.2f} nats".replace("-", "−") in shown
    own = [vote for vote in explanation.votes if vote.token == explanation.token]
    for vote in [*explanation.votes[:5], *own]:
        neighbors = "neighbor" if vote.neighbors == 1 else "neighbors"
        assert f"{vote.weight * 100:.1f} % of the vote, {vote.neighbors} {neighbors}" in shown
    strongest = explanation.sources[0]
    assert f"{strongest.document}, token {strongest.position}" in shown
    marked = explained.eval_on_selector_all(
        "#detail mark", "(all) => all.map((m) => m.textContent)"
    )
    assert strongest.value.replace(" ", "") in [text.replace(" ", "") for text in marked]
    assert explained.get_attribute("#tokens [aria-selected=true]", "data-number") == str(number)


def test_the_keyboard_reaches_everything(explained: Any) -> None:
    explained.click("#tokens .token >> nth=3")
    selected = "document.activeElement.dataset.number"
    for key, number in [("ArrowRight", 4), ("ArrowLeft", 3), ("Home", 0), ("ArrowLeft", 0)]:
        explained.keyboard.press(key)
        assert explained.evaluate(selected) == str(number)
    heading = explained.inner_text("#detail h2")
    explained.keyboard.press("ArrowDown")
    assert int(explained.evaluate(selected)) > 1
    assert explained.inner_text("#detail h2") != heading
    explained.keyboard.press("ArrowUp")
    assert explained.evaluate(selected) == "0"
    explained.keyboard.press("End")
    assert int(explained.evaluate(selected)) == explained.locator("#tokens .token").count() - 1
    explained.focus("#text")
    met = set()
    for _ in range(40):
        explained.keyboard.press("Tab")
        met.add(explained.evaluate("document.activeElement.id || document.activeElement.className"))
    assert met >= {"explain", "continue", "length", "lmbda-0", "k-0", "temperature-0", "token"}


def test_what_the_model_writes_and_who_wrote_it(
    page: Any, served: Served, with_parameters: Callable[..., KNNLM]
) -> None:
    page.goto(f"{served.url}/explorer")
    page.fill("#text", TEXT)
    page.fill("#length", "12")
    page.click("#continue")
    page.wait_for_selector("#tokens .written")
    model = with_parameters()
    generation = model.generate(TEXT, max_new_tokens=12)
    assert page.locator("#tokens .written").count() == len(generation.tokens)
    assert (
        page.inner_text("#documents-heading")
        == f"Who wrote the {len(generation.tokens)} new tokens"
    )
    new = model.explain(TEXT, generated=generation.tokens)[-len(generation.tokens) :]
    total = sum_credits(new)
    rows = page.locator("#contributions tbody tr").all_inner_texts()
    assert rows[0].split("\t")[1] == f"{len(new) - sum(c.tokens for c in total):.2f}"
    for row, credit in zip(rows[1:], total, strict=False):
        assert row.split("\t")[0] == credit.document
        assert float(row.split("\t")[1]) == pytest.approx(credit.tokens, abs=0.006)
    page.click("#contributions button >> nth=0")
    assert page.locator("#tokens .credited").count() > 0


def test_markup_in_texts_and_documents_is_text(explained: Any) -> None:
    for number in range(explained.locator("#tokens .token").count()):
        explained.click(f"#tokens .token >> nth={number}")
    explained.wait_for_selector("#detail mark")
    assert OWNED in explained.inner_text("#tokens")
    assert f"{OWNED}.html" in explained.inner_text("#contributions")
    for tag in ("img", "#tokens script", "#detail script", "#contributions script"):
        assert explained.locator(tag).count() == 0


def test_one_file_does_the_same_without_a_server(
    page: Any, with_parameters: Callable[..., KNNLM], tmp_path: Path
) -> None:
    model = with_parameters()
    (tmp_path / "why.html").write_text(standalone_page(analyze(model, TEXT)), encoding="utf-8")
    page.goto((tmp_path / "why.html").as_uri())
    report = model.perplexity([Document("t", TEXT)])
    assert figure(page, "knn") == pytest.approx(report.knn.perplexity, rel=1e-4)
    put(page, lmbda=0.6)
    report = with_parameters(lmbda=0.6).perplexity([Document("t", TEXT)])
    assert figure(page, "knn") == pytest.approx(report.knn.perplexity, rel=1e-4)
    page.click("#tokens .token >> nth=12")
    assert page.locator("#detail mark").count() > 0
    assert page.is_hidden("#ask")
    assert page.locator("img").count() == 0


def test_learned_weights_have_a_figure_of_their_own(
    page: Any, with_parameters: Callable[..., KNNLM], tmp_path: Path
) -> None:
    analysis = replace(analyze(with_parameters(lmbda=0.3), TEXT), weights="learned")
    (tmp_path / "why.html").write_text(standalone_page(analysis), encoding="utf-8")
    page.goto((tmp_path / "why.html").as_uri())
    report = with_parameters(lmbda=0.3).perplexity([Document("t", TEXT)])
    put(page, lmbda=0.9)
    assert figure(page, "tuned") == pytest.approx(report.knn.perplexity, rel=1e-4)
    assert "tuned weights" in page.inner_text("#detail")
    assert page.is_visible("#fixed-note")


def test_a_server_with_a_key_asks_for_it(browser: Any, path: Path) -> None:
    page = browser.new_page()
    with serving(lambda: opening(path), api_key="sesame") as served:
        page.goto(f"{served.url}/explorer")
        page.wait_for_selector("#key-field:not([hidden])")
        assert "API key" in page.inner_text("#status")
        assert page.is_hidden("#datastores")
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        page.wait_for_selector("#datastores:not([hidden])")
        page.fill("#text", TEXT)
        page.click("#explain")
        page.wait_for_selector("#result:not([hidden])")
        page.close()


def test_refusals_are_shown_in_one_line(page: Any, served: Served) -> None:
    page.goto(f"{served.url}/explorer")
    page.wait_for_selector("#datastores:not([hidden])")
    page.route(
        "**/explorer/analysis",
        lambda route: route.fulfill(
            status=200, content_type="application/json", body=json.dumps({})
        ),
    )
    page.fill("#text", "x")
    page.click("#explain")
    page.wait_for_selector("#status.wrong")
    assert page.inner_text("#status").startswith("It failed: ")
    page.unroute("**/explorer/analysis")
    page.click("#explain")
    page.wait_for_selector("#result:not([hidden])")
    assert "wrong" not in (page.get_attribute("#status", "class") or "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_light_and_dark(explained: Any, scheme: str) -> None:
    explained.emulate_media(color_scheme=scheme)
    contrasts = explained.evaluate(
        """() => {
          const box = document.getElementById("tokens");
          const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
          const paper = numbers(getComputedStyle(box).backgroundColor);
          const light = (rgb) => {
            const [r, g, b] = rgb.map((x) => {
              const c = x / 255;
              return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const contrast = (a, b) => {
            const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
            return (bright + 0.05) / (dark + 0.05);
          };
          const token = box.firstChild;
          const found = [];
          for (const effect of ["none", "help", "hurt"]) {
            for (const level of [1, 2, 3, 4]) {
              token.dataset.effect = effect;
              token.dataset.level = level;
              const style = getComputedStyle(token);
              const [r, g, b, alpha = 1] = numbers(style.backgroundColor);
              const over = [r, g, b].map((x, i) => x * alpha + paper[i] * (1 - alpha));
              found.push(contrast(numbers(style.color).slice(0, 3), over));
            }
          }
          const quiet = getComputedStyle(document.querySelector("#summary dt"));
          found.push(contrast(numbers(quiet.color), paper));
          return found;
        }"""
    )
    assert len(contrasts) == 13
    assert min(contrasts) >= 4.5, "WCAG AA"


@pytest.fixture
def chatting(page: Any, served: Served) -> Any:
    """A page with its chat open, whose answers are short."""
    page.goto(f"{served.url}/explorer")
    page.click("#tab-chat")
    page.fill("#chat-length", "12")
    return page


def say(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('Choose')")


def test_a_chat_goes_on_as_the_library_answers(
    chatting: Any, with_parameters: Callable[..., KNNLM]
) -> None:
    model = with_parameters()
    assert chatting.is_hidden("#ask")
    messages: list[dict[str, str]] = []
    for said in (f"What is {OWNED}?", "And then? ☃"):
        say(chatting, said)
        messages.append({"role": "user", "content": said})
        answer = model.chat(messages, max_new_tokens=12).text
        messages.append({"role": "assistant", "content": answer})
    turns = chatting.locator("#talk .said").all_text_contents()
    assert [turn.replace("·", "") for turn in turns] == [one["content"] for one in messages]
    assert chatting.is_enabled("#send")
    assert chatting.is_hidden("#stop")
    chatting.click("#forget")
    assert chatting.locator("#talk .turn").count() == 0
    say(chatting, "And then? ☃")
    again = chatting.locator("#talk .said").last.text_content()
    alone = model.chat([{"role": "user", "content": "And then? ☃"}], max_new_tokens=12).text
    assert again.replace("·", "") == alone


def test_the_tokens_of_an_answer_show_their_passages(chatting: Any, path: Path) -> None:
    chatting.fill("#chat-lmbda", "0.9")
    say(chatting, "Which places vote?")
    tokens = chatting.locator("#talk .token")
    tokens.nth(2).click()
    assert tokens.nth(2).get_attribute("aria-pressed") == "true"
    assert chatting.locator("#talk [aria-pressed='true']").count() == 1
    shown = chatting.inner_text("#chat-detail")
    names = {document.name for document in Datastore(path).documents()}
    assert any(name in shown for name in names)
    assert chatting.locator("#chat-detail .passage").count() == 4
    assert "voted for this token" in chatting.inner_text("#chat-detail .vote.true >> nth=0")
    chatting.keyboard.press("ArrowRight")
    assert tokens.nth(3).get_attribute("aria-pressed") == "true"
    assert {"help", "hurt"} & {tokens.nth(n).get_attribute("data-effect") for n in range(10)}


def test_a_refused_message_can_be_corrected(chatting: Any) -> None:
    say(chatting, "x")
    error = {"message": "it is too long", "type": "x", "param": None, "code": None}
    chatting.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=200,
            content_type="text/event-stream",
            body=f"data: {json.dumps({'error': error})}\n\n",
        ),
    )
    chatting.fill("#message", "y" * 250)
    chatting.click("#send")
    chatting.wait_for_selector("#status.wrong")
    assert chatting.inner_text("#status") == "It failed: it is too long"
    assert chatting.input_value("#message") == "y" * 250
    assert chatting.locator("#talk .turn").count() == 2
    chatting.click("#tab-ask")
    assert chatting.is_visible("#ask")
    assert chatting.is_hidden("#chat")
