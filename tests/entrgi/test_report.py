"""The report: self-contained, safe against any text, and faithful to the traces."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from entrgi import report

ROOT = Path(__file__).resolve().parents[2]
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> {{ data }} \u2028 &amp; \"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(fake, entrgi, tmp_path) -> Path:
    out = tmp_path / "r.html"
    assert entrgi("compare", "a", NASTY, "c", "-L", 8, "-T", 4, "--report", out) == 0
    return out


def test_loads_nothing(page, parse_page) -> None:
    text = page.read_text(encoding="utf-8")
    reader = parse_page(text)
    assert all(link.startswith("#") for link in reader.links)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}


def test_text_stays_text(page, parse_page) -> None:
    reader = parse_page(page.read_text(encoding="utf-8"))
    assert len(reader.scripts) == 2, "the data and the program: nothing that a prompt brought along"
    assert "img" not in reader.tags
    data = reader.data
    assert data["prompts"][1] == NASTY
    assert any("</script>" in text for text in data["strings"].values())


def test_embedding_round_trips_and_holds_no_markup() -> None:
    value = {"text": NASTY, "list": [1, None, 2.5, "ünï"]}
    text = report.embed(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError):
        report.embed(float("nan"))


def test_traces_can_be_played_back(fake, page, parse_page) -> None:
    """Canvas, entropies, weights and rewards of every step, from the compact form alone."""
    data = parse_page(page.read_text(encoding="utf-8")).data
    for sampler in fake.samplers:
        method = sampler.config.method
        results = [result for _, result in sampler.stream(["a", NASTY, "c"], trace=True)]
        for index, result in enumerate(results):
            for k, sample in enumerate(result.samples):
                compact = data["traces"][method][index][k]
                assert data["samples"][method][index][k]["text"] == sample.text
                for i, step in enumerate(sample.trace):
                    tokens = [t if at <= i else 13 for t, at in zip(compact["tokens"], compact["at"], strict=True)]
                    assert tokens == step.tokens
                    assert compact["h"][i] == [round(100 * h) for h in step.entropy if h is not None]
                    assert compact["reward"][i] == pytest.approx(step.reward, abs=1e-3)
                    assert compact["before"][i] == step.reward_before
                    if method == "none":
                        assert compact["w"] == 0
                    else:
                        assert compact["w"][i] == [round(100 * w) for w in step.weight if w is not None]


def test_one_sample_of_each_prompt_is_the_best(page, parse_page) -> None:
    for per_prompt in parse_page(page.read_text(encoding="utf-8")).data["samples"].values():
        for samples in per_prompt:
            (best,) = [s for s in samples if s["best"]]
            assert best["reward"] == max(s["reward"] for s in samples)


def test_large_runs_keep_the_best_samples_only(fake, entrgi, parse_page, tmp_path, monkeypatch) -> None:
    # 4 steps of 8 slots: one prompt's best under four methods.
    monkeypatch.setattr(report, "REPLAY_BUDGET", 4 * 8 * 4 + 1)
    out = tmp_path / "r.html"
    assert entrgi("compare", "a", "b", "-L", 8, "-T", 4, "--report", out) == 0
    data = parse_page(out.read_text(encoding="utf-8")).data
    for method, traces in data["traces"].items():
        kept = [[k for k, trace in enumerate(row) if trace] for row in traces]
        best = next(k for k, s in enumerate(data["samples"][method][0]) if s["best"])
        assert kept[0] == [best] and len(data["samples"][method][1]) == 4
    assert sum(bool(t) for traces in data["traces"].values() for t in traces[1]) <= 1


@pytest.mark.parametrize(("room", "count"), [("report", 5), ("serve", 3)])
def test_the_installed_package_has_the_page(room: str, count: int) -> None:
    """Every file of a page is named in pyproject.toml, or an installed `entrgi compare --report` fails."""
    import fnmatch

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[tool.setuptools.package-data]")[1].split("\n[")[0]
    folder = Path(report.__file__).parents[1] / room
    assets = [path for path in folder.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(assets) == count
    owners = dict(re.findall(r'^"?([\w.]+)"?\s*=\s*(\[.*?\])', section, re.MULTILINE | re.DOTALL))
    for path in assets:
        names = {"entrgi": f"{room}/{path.name}", f"entrgi.{room}": path.name}
        patterns = [(names[o], p) for o in names for p in re.findall(r'"([^"]+)"', owners.get(o, ""))]
        assert any(
            fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for name, pattern in patterns
        )


def play(page: Path, state: str, script: str = "") -> str:
    """The page's document as Chromium has it after running `script`; fails on an error in the page's program."""
    copy = page.with_name("played.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000"]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{copy}#{state}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Uncaught" not in done.stderr and "Content Security Policy" not in done.stderr, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to run the page's program")
def test_the_page_runs(page, parse_page) -> None:
    """The right words are covered, the prompt is text, and nothing went wrong."""
    shown = play(page, "prompt=2&step=2&theme=dark")
    assert "img" not in parse_page(shown).tags
    masked = re.findall(r'class="tok[^"]*masked[^"]*"', shown)
    fresh = re.findall(r'class="tok[^"]*fresh[^"]*"', shown.split('class="legend"')[0])
    assert len(masked) == 2 * 4 and len(fresh) == 2 * 2  # two panels, 8 slots, two committed in each step
    assert 'data-theme="dark"' in shown and "step 2 of 4" in shown
    assert html.unescape(re.search(r'<blockquote id="question">(.*?)</blockquote>', shown, re.DOTALL)[1]) == NASTY


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to run the page's program")
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"], "step 3 of 4"),
        (["End", "ArrowRight"], "step 4 of 4"),
        (["End", "Home"], "step 0 of 4"),
        (["End", "]"], "step 0 of 4"),
        ([" "], "step 4 of 4"),  # plays to the end within the six virtual seconds
    ],
)
def test_keys(page, keys: list[str], expected: str) -> None:
    press = "".join(
        f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: {json.dumps(key)}, bubbles: true}}));"
        for key in keys
    )
    shown = play(page, "prompt=1&step=1", press)
    assert re.search(r'<output id="position"[^>]*>(.*?)</output>', shown)[1] == expected
    question = re.search(r'<blockquote id="question">(.*?)</blockquote>', shown, re.DOTALL)[1]
    assert (html.unescape(question) == NASTY) == ("]" in keys)
