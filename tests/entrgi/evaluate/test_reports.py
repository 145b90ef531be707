"""Reports of evaluations: a page that holds everything, and files for papers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from entrgi.evaluate.analysis import read_results
from entrgi.evaluate.render import tables_of

NASTY = "</script><img src=x onerror=alert(1)> {{ data }} & \"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(fake, entrgi, tmp_path, monkeypatch) -> Path:
    """Results with a recorded prompt that would like to be markup."""
    from entrgi.report import evaluation

    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (NASTY, "b", "c")), encoding="utf-8")
    monkeypatch.setattr(evaluation, "tokenizer_of", lambda results: fake.tokenizer)
    code = entrgi("evaluate", "tiny", "--datasets", prompts, "-L", 8, "-T", 4, "--best-of", 6, "--traces", 1,
                  "--set", "judges=null", "-o", tmp_path / "r", "--no-report")  # fmt: skip
    assert code == 0
    return tmp_path / "r"


def test_the_page_holds_tables_pictures_and_replays(folder, entrgi, parse_page) -> None:
    assert entrgi("report", folder, "--out", folder / "report.html") == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = parse_page(text)
    for _, tables in tables_of(read_results([folder])):
        for table in tables:
            assert all(cell in page.cells for row in table.rows for cell in row)
    assert page.tags.count("figure") == 3, "curves, histograms, and the replay's own"
    assert all(link.startswith("#") for link in page.links), "it loads nothing"
    assert "img" not in page.tags and "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}
    data = page.data
    assert data["prompts"] == [NASTY] and len(data["methods"]) == 4
    recorded = {key: [bool(t) for t in traces[0]] for key, traces in data["traces"].items()}
    assert all(sum(kept) == 1 for kept in recorded.values()), "the best sample of the recorded prompt"
    assert "var(--ink)" in text and "#1c1b22;" not in text.split("<body>")[1]


def test_files_for_papers(folder, entrgi, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert entrgi("report", folder, "--out", out / "r.tex", "--out", out / "r.md", "--reference", "APS") == 0
    assert "EntRGi − APS" in capsys.readouterr().out
    tex, markdown = (out / "r.tex").read_text(encoding="utf-8"), (out / "r.md").read_text(encoding="utf-8")
    named = re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", tex) + re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(named) == 4
    starts = {".pdf": b"%PDF", ".png": b"\x89PNG"}
    assert all((out / name).read_bytes().startswith(starts[Path(name).suffix]) for name in named)
    before = {path: path.read_bytes() for path in (out / "r_files").iterdir() if path.suffix == ".pdf"}
    assert entrgi("report", folder, "--out", out / "r.tex", "--reference", "APS") == 0
    assert before == {path: path.read_bytes() for path in before}, "the same results, the same files"


def test_without_recorded_prompts_texts_are_shown(folder, entrgi, parse_page, tmp_path) -> None:
    (folder / "traces.jsonl").unlink()
    assert entrgi("report", folder, "--out", tmp_path / "r.html") == 0
    data = parse_page((tmp_path / "r.html").read_text(encoding="utf-8")).data
    assert data["prompts"] == [NASTY, "b", "c"] and not any(any(r) for t in data["traces"].values() for r in t)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "r.docx"], "ends in one of .html, .md, .tex"),
        (["--out", "/no/such/r.md"], "there is no folder"),
        (["--reference", "Nobody"], "expected one of 'Best-of-N'"),
    ],
)
def test_what_is_refused(folder, entrgi, capsys, arguments, message) -> None:
    assert entrgi("report", folder, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to run the page's program")
def test_the_page_runs(folder, entrgi) -> None:
    assert entrgi("report", folder, "--out", folder / "report.html") == 0
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{folder / 'report.html'}#prompt=1&step=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Uncaught" not in done.stderr and "Content Security Policy" not in done.stderr, done.stderr[-2000:]
    assert "step 2 of 4" in done.stdout
    assert re.search(r'<section id="results"[^>]* hidden', done.stdout)
