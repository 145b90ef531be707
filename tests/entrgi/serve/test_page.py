"""The page of `entrgi serve`: what it is made of, and, in a browser, what a person does with it."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import html
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from entrgi import compare, loading, report
from entrgi.comparison import Comparison
from entrgi.serve import page
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.names import METHODS

MASK = 13  # of the stand-in tokenizer
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> {{ data }}"
ABOUT = {
    "model": "fake",
    "rewards": ["tone", "length"],
    "methods": {name: method.label for name, method in METHODS.items()},
    "defaults": {
        "steps": 4,
        "max_new_tokens": 8,
        "num_samples": 4,
        "guidance_steps": 3,
        "learning_rate": 0.5,
        "guidance_scale": 1.0,
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": 0,
    },
    "limits": {"max_new_tokens": 64, "steps": 64, "num_samples": 8, "guidance_steps": 10},
    "examples": ["Write a review of the soup.", NASTY],
    "note": "",
    "key": False,
}


def test_loads_nothing_but_answers_of_its_server(parse_page) -> None:
    text = page.build(ABOUT)
    assert all(link.startswith("#") for link in parse_page(text).links)
    assert not re.search(r"@import|url\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert set(re.findall(r"https?://[^\s\"'{]+", text)) == {"http://www.w3.org/2000/svg"}


def test_only_its_own_script_may_run() -> None:
    text = page.build(ABOUT)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    header = page.headers()["Content-Security-Policy"]
    meta = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1])
    for policy in (header, meta):
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["script-src"] == f"'sha256-{digest}'"
        assert rules["connect-src"] == "'self'" and rules["default-src"] == rules["form-action"] == "'none'"
    assert "frame-ancestors 'none'" in header and "frame-ancestors" not in meta  # a browser warns of it in a meta


def test_what_is_served_stays_text(parse_page) -> None:
    about = ABOUT | {"model": NASTY, "rewards": [NASTY], "note": NASTY, "methods": {"none": NASTY, "entrgi": NASTY}}
    reader = parse_page(page.build(about))
    assert len(reader.scripts) == 2 and "img" not in reader.tags
    assert {name: reader.data[name] for name in about} == about


def test_the_template_is_a_report_without_data(parse_page) -> None:
    text = page.report_template()
    assert report.POLICY in text and "connect-src" not in text
    assert parse_page(text).data == {"title": report.TITLE, "heading": report.HEADING}


# ---- in a browser, before a stand-in for the server: it streams a finished comparison as if it happened now ----------
def messages_of(comparison: Comparison, tokenizer: Any, mask: int) -> Iterator[dict[str, Any]]:
    """What ``POST /compare`` streams of a comparison of one prompt that was run with traces."""
    whole = report.payload(comparison, tokenizer)
    slots = comparison.settings["max_new_tokens"]
    start = copy.deepcopy(whole)
    for method in start["methods"]:
        del method["estimates"], method["seconds"]
    blank = {"tokens": [mask] * slots, "at": [-1] * slots, "h": [], "w": [], "reward": [], "before": [], "after": []}
    start |= {
        "samples": {run.key: [[]] for run in comparison.runs},
        "traces": {run.key: [[copy.deepcopy(blank)]] for run in comparison.runs},
        "strings": {str(mask): "…"},
        "differences": [],
        "top": 0.5,
        "mask": mask,
        "steps": comparison.settings["steps"],
    }
    yield {"start": start}
    sent = {mask}
    for run in comparison.runs:
        for step in run.results[0].samples[0].trace:
            compact = report.compact_step(step)
            new = sorted(set(compact["tokens"]) - sent)
            sent.update(new)
            strings = {str(token): report.token_text(tokenizer, token) for token in new}
            yield {"step": {"method": run.key, "step": step.step, **compact}, "strings": strings}
    yield {"report": whole}


class PageServer(ThreadingHTTPServer):
    """Serves the page on loopback.

    Attributes:
        answer: messages of one request, from its body; an HTTP status and a message instead is an error.
        asked: the bodies of all requests to compare; ``keys`` their Authorization headers.
        hold: streams stop before message number `hold` until the client goes away, which sets ``left``.
    """

    daemon_threads = True

    def __init__(self, about: dict[str, Any], answer: Callable[[dict[str, Any]], Any], pause: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.about, self.answer, self.pause = about, answer, pause
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hold: int | None = None
        self.left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    @contextlib.contextmanager
    def running(self) -> Iterator[PageServer]:
        thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, kind: str, body: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, "text/html; charset=utf-8", page.build(self.server.about), **page.headers())
        elif self.path == "/report.html":
            self.reply(200, "text/html; charset=utf-8", page.report_template())
        else:
            self.reply(404, "text/plain", "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        answer = self.server.answer(body)
        if isinstance(answer, tuple):
            status, message = answer
            self.reply(status, "application/json", json.dumps({"error": {"message": message}}), Retry_After="7")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for index, message in enumerate(answer):
                while index == self.server.hold:
                    self.wfile.write(b": still here\n\n")
                    time.sleep(0.01)
                self.wfile.write(f"data: {json.dumps(message)}\n\n".encode())
                time.sleep(self.server.pause)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()


in_browser = pytest.mark.slow


@pytest.fixture
def server(fake) -> Iterator[PageServer]:
    """Answers any request with what the stand-in models make of it; ``.last`` is that comparison."""

    def answer(body: dict[str, Any]) -> Any:
        loaded = loading.load(None)
        config = GuidanceConfig(**body["settings"])
        server.last = compare.compare(loaded, [body["prompt"]], body["methods"], config, trace=True)
        return messages_of(server.last, loaded.tokenizer, MASK)

    server = PageServer(ABOUT, answer)
    with server.running():
        yield server


@pytest.fixture
def visit(browser, server) -> Iterator[Callable[..., Any]]:
    """Opens the page, at a fragment and under a browser's settings; afterwards nothing must have gone wrong in any."""
    contexts, wrong = [], []

    def visit(fragment: str = "", **settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(20_000)
        # The browser itself says so when a server answers 4xx.
        tab.on(
            "console", lambda m: m.type in ("error", "warning") and "status of 4" not in m.text and wrong.append(m.text)
        )
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(server.url + fragment)
        return tab

    yield visit
    for context in contexts:
        for tab in context.pages:
            assert tab.title() == "EntRGi: watch it steer" and not tab.locator("img").count()
        context.close()
    assert not wrong


def finished(tab: Any) -> None:
    tab.wait_for_selector('html[data-run="done"]', state="attached")


def masked(tab: Any, side: int) -> int:
    return tab.locator(f'.panel[data-side="{side}"] .tok.masked').count()


@in_browser
def test_type_press_watch(server, visit) -> None:
    """The left side fills first, the curve grows, and then every text stands there with its reward."""
    tab = visit(reduced_motion="reduce")
    server.hold = 3  # start, and two steps of two slots each
    tab.fill("#ask", NASTY)
    tab.select_option("#reward", "length")
    tab.press("#ask", "Control+Enter")
    tab.wait_for_selector('.panel[data-side="0"] .facts >> text=step 2 of 4')
    assert (masked(tab, 0), masked(tab, 1)) == (4, 8)
    assert "waiting" in tab.inner_text('.panel[data-side="1"] .facts')
    assert tab.locator('.panel[data-side="0"] .tok.fresh').count() == 2
    assert not tab.is_visible("#results") and not tab.is_visible("#play")
    (body,) = server.asked
    assert body["prompt"] == NASTY and body["reward"] == "length" and body["methods"] == ["none", "entrgi"]
    assert body["settings"] == ABOUT["defaults"]

    server.hold = None
    finished(tab)
    assert (masked(tab, 0), masked(tab, 1)) == (0, 0)
    assert tab.inner_text("#position") == "step 4 of 4"
    assert tab.text_content("#question") == NASTY
    for run, column in zip(server.last.runs, tab.locator(".columns > div").all(), strict=True):
        samples = sorted(run.results[0].samples, key=lambda sample: -sample.reward)
        shown = [row.split("\n", 1) for row in column.locator("li").all_inner_texts()]
        assert [text.replace("−", "-") for text, _ in shown] == [f"{sample.reward:.2f}" for sample in samples]
        assert [text.split() for _, text in shown] == [(s.text.strip() or "(empty)").split() for s in samples]
        assert f"{run.label} best of 4 {samples[0].reward:.2f}" in tab.inner_text("#outcome").replace("−", "-")


@in_browser
def test_a_slow_reader_misses_steps(server, visit) -> None:
    """What is left stays in its place: entropies are those of the slots that were masked."""
    whole = server.answer
    server.answer = lambda body: [m for i, m in enumerate(whole(body)) if i not in (1, 3)]  # of the left: steps 0, 2
    server.hold = 2
    tab = visit("#prompt=a")
    tab.click("#run")
    tab.wait_for_selector('.panel[data-side="0"] .facts >> text=step 1 of 4')
    step = server.last.runs[0].results[0].samples[0].trace[1]
    titles = tab.eval_on_selector_all('.panel[data-side="0"] .tok', "nodes => nodes.map((node) => node.title)")
    for slot, title in enumerate(titles):
        if step.entropy[slot] is not None:
            assert f"entropy {step.entropy[slot]:.2f} nats" in title
        assert ("masked" in title) == (step.tokens[slot] == MASK)
    server.hold = None
    finished(tab)


@in_browser
def test_stop(server, visit) -> None:
    tab = visit("#prompt=a")
    server.hold = 3
    tab.click("#run")
    tab.wait_for_selector('.panel[data-side="0"] .facts >> text=step 2 of 4')
    tab.click(".meter button")
    assert server.left.wait(20), "the server was not told"
    tab.wait_for_selector('html[data-run="stopped"]', state="attached")
    assert tab.inner_text("#said") == "Stopped." and tab.inner_text("#run") == "Run"
    assert masked(tab, 0) == 4 and tab.is_disabled("#save") and not tab.is_visible("#error")
    server.hold = None
    tab.click("#run")
    finished(tab)


@in_browser
@pytest.mark.parametrize("when", ["at once", "in the middle", "cut off"])
def test_errors_are_shown(server, visit, when: str) -> None:
    whole = server.answer
    message = f"the queue is full {NASTY}"

    def answer(body: dict[str, Any]) -> Any:
        first = list(whole(body))[:2]
        return {"at once": (429, message), "in the middle": [*first, {"error": {"message": message}}]}.get(when, first)

    server.answer = answer
    tab = visit("#prompt=a", viewport={"width": 375, "height": 700}, reduced_motion="reduce")
    tab.click("#run")
    tab.wait_for_selector("#error")
    place = tab.locator("#error").bounding_box()
    assert 0 <= place["y"] <= 700 - place["height"], "out of sight"
    expected = {"at once": f"{message} Try again in 7 s.", "in the middle": message}
    assert tab.text_content("#error") == expected.get(when, "The server broke off.")
    server.answer = whole
    tab.click("#run")
    finished(tab)
    assert not tab.is_visible("#error")


@in_browser
def test_a_link_holds_everything_but_the_key(server, visit) -> None:
    server.about = ABOUT | {"key": True}
    tab = visit()
    values = {"max_new_tokens": "12", "steps": "3", "learning_rate": "1.25", "top_p": "0.8", "seed": "-77"}
    tab.fill("#ask", NASTY + "\nümlaut & = #")
    tab.fill("#key", "sesame")
    tab.select_option("#reward", "length")
    tab.select_option("#left", "first_order")
    tab.fill("#seed", values["seed"])
    for title, name in [("L:", "max_new_tokens"), ("T,", "steps"), ("η:", "learning_rate"), ("Draws", "top_p")]:
        tab.fill(f'label[title^="{title}"] input', values[name])
    tab.click("#link")
    fragment = urlsplit(tab.url).fragment
    wish = {name: value for name, (value,) in parse_qs(fragment).items()}
    assert wish.items() >= (values | {"reward": "length", "left": "first_order", "right": "entrgi"}).items()
    assert "sesame" not in tab.url

    other = visit("#" + fragment)
    read = (
        "() => [...document.querySelectorAll('#form :is(textarea, select, input:not(#key))')].map((node) => node.value)"
    )
    assert other.evaluate(read) == tab.evaluate(read)
    assert other.input_value("#ask") == NASTY + "\nümlaut & = #"
    assert not server.asked, "a link runs nothing by itself"
    assert not other.input_value("#key")

    tab.click("#run")
    finished(tab)
    assert server.keys == ["Bearer sesame"]
    assert server.asked[0]["settings"]["learning_rate"] == 1.25 and server.asked[0]["settings"]["seed"] == -77
    tab.click("nav >> text=Texts")
    assert urlsplit(tab.url).fragment == fragment
    tab.reload()
    assert tab.input_value("#key") == "sesame"


@in_browser
def test_the_download_is_a_report(server, visit, browser, parse_page, tmp_path: Path) -> None:
    prompt = f"{NASTY} $& $1"
    tab = visit("#" + urlencode({"prompt": prompt}))
    tab.click("#run")
    finished(tab)
    with tab.expect_download() as download:
        tab.click("#save")
    saved = tmp_path / "report.html"
    download.value.save_as(saved)
    expected = report.payload(server.last, loading.load(None).tokenizer)
    reader = parse_page(saved.read_text(encoding="utf-8"))
    assert reader.data == json.loads(report.embed(expected)) and len(reader.scripts) == 2

    context = browser.new_context(offline=True)
    saved_tab, requests, wrong = context.new_page(), [], []
    saved_tab.on("request", lambda request: requests.append(request.url))
    saved_tab.on("console", lambda message: wrong.append(message.text))
    saved_tab.on("pageerror", lambda error: wrong.append(str(error)))
    saved_tab.goto(f"{saved.as_uri()}#step=1")
    saved_tab.keyboard.press("ArrowRight")
    assert saved_tab.inner_text("#position") == "step 2 of 4" and masked(saved_tab, 0) == 4
    assert saved_tab.text_content("#question") == prompt
    assert len(requests) == 1 and not wrong
    context.close()


@in_browser
def test_by_keyboard_alone(server, visit) -> None:
    tab = visit()

    def walk_to(name: str) -> None:
        for _ in range(40):
            tab.keyboard.press("Tab")
            if tab.evaluate("() => document.activeElement.id || document.activeElement.textContent") == name:
                return
        raise AssertionError(f"Tab never reaches {name}")

    walk_to("ask")
    tab.keyboard.type("a [b] c")
    walk_to("right")
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    walk_to("run")
    server.hold = 3
    tab.keyboard.press("Enter")
    tab.wait_for_selector('.panel[data-side="0"] .facts >> text=step 2 of 4')
    walk_to("Stop")
    tab.keyboard.press("Enter")
    tab.wait_for_selector('html[data-run="stopped"]', state="attached")
    server.hold = None
    assert tab.evaluate("() => document.activeElement.id") == "run"
    tab.keyboard.press("Enter")
    finished(tab)
    assert server.asked[-1]["prompt"] == "a [b] c" and server.asked[-1]["methods"] == ["none", "first_order"]
    assert server.asked[-1]["settings"]["max_new_tokens"] == ABOUT["defaults"]["max_new_tokens"] + 1
    walk_to("play")
    tab.keyboard.press("Home")
    assert tab.inner_text("#position") == "step 0 of 4"
    tab.focus("#ask")
    tab.keyboard.press("End")
    tab.keyboard.type(" [d]")  # keys of the replay are letters here
    assert tab.input_value("#ask") == "a [b] c [d]" and tab.inner_text("#position") == "step 0 of 4"


@in_browser
def test_fits_a_phone_in_the_dark(server, visit) -> None:
    tab = visit("#prompt=a", viewport={"width": 375, "height": 700}, color_scheme="dark")
    assert tab.get_attribute("html", "data-theme") == "dark"
    server.hold = 3

    def fits() -> bool:
        return tab.evaluate("() => document.documentElement.scrollWidth") == 375

    assert fits()
    tab.click("#run")
    tab.wait_for_selector('.panel[data-side="0"] .facts >> text=step 2 of 4')
    assert fits() and tab.locator(".meter button").bounding_box()["y"] < 700, "Stop is at hand"
    server.hold = None
    finished(tab)
    assert fits()
