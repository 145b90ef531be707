"""Judges: what they are asked, what is made of their answers, and endpoints that fail for a while."""

from __future__ import annotations

import http.server
import json
import math
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from entrgi.errors import UsageError
from entrgi.evaluate.config import from_dict
from entrgi.evaluate.endpoint import Endpoint
from entrgi.evaluate.judges import Candidate, EndpointJudge, grade_of, make_judge
from entrgi.evaluate.specs import JudgeSpec, check_judges

CANDIDATES = [Candidate("k1", "How was it?", "It was good.", []), Candidate("k2", "And now?", "no", [])]


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that answers as told and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.answer: Any = lambda request: completion("4")
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.requests.append((self.path, dict(self.headers), request))
            code, headers = self.server.failures.pop(0) if self.server.failures else (200, {})
        body = json.dumps(self.server.answer(request)) if code == 200 else "try again"
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def completion(text: str, shares: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if shares:
        top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": top[0]["logprob"], "top_logprobs": top}]}
    return {"choices": [choice]}


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        (completion("4", {"4": 0.6, "5": 0.2, " 5": 0.1, "Four": 0.1}), (4 * 0.6 + 5 * 0.3) / 0.9),
        (completion("2", {"2": 1.0}), 2.0),
        (completion("Score: 3"), 3.0),
        (completion("3.5 of 5"), 3.5),
        (completion("**5**"), 5.0),
        (completion("10"), None),
        (completion("excellent"), None),
        (completion(""), None),
        ({"choices": []}, None),
        ({"choices": [{"message": {"content": None}}]}, None),
    ],
)
def test_grades(answer, grade) -> None:
    assert grade_of(answer) == (None if grade is None else pytest.approx(grade))


def test_unit_tests_at_an_endpoint(server, monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    tests = ("Is it short?", "Is it kind?")
    server.answer = lambda request: completion("5" if "short" in request["messages"][0]["content"] else "2")
    spec = JudgeSpec("j", "openai", model="org/LMUnit", url=server.url, tests=tests, api_key_env="SOME_KEY")
    judgements = EndpointJudge(spec).judge(CANDIDATES)
    assert [(j.score, j.tests) for j in judgements] == [(3.5, [5.0, 2.0])] * 2
    assert len(server.requests) == 4
    path, headers, request = next(r for r in server.requests if "How was it?" in str(r[2]) and "short" in str(r[2]))
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert request["messages"] == [
        {"role": "user", "content": "Query: How was it?\n\nResponse: It was good.\n\nUnit Test: Is it short?"}
    ]
    assert request["model"] == "org/LMUnit" and request["temperature"] == 0 and request["top_logprobs"] == 20
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UsageError, match="SOME_KEY is not set"):
        EndpointJudge(spec)


def test_a_general_model_is_told_what_to_do(server) -> None:
    EndpointJudge(JudgeSpec("j", "openai", model="llama", url=server.url, logprobs=False)).judge(CANDIDATES[:1])
    asked = server.requests[0][2]
    assert "from 1 (strongly fails) to 5" in asked["messages"][0]["content"] and "logprobs" not in asked


def test_failures_that_pass_are_waited_out(server) -> None:
    waits: list[float] = []
    server.failures = [(503, {}), (429, {"Retry-After": "7"}), (500, {})]
    endpoint = Endpoint(server.url, retries=3, sleep=waits.append)
    assert endpoint.post("/chat/completions", {"x": 1}) == completion("4")
    assert len(server.requests) == 4 and waits[1] == 7
    assert 0.5 <= waits[0] <= 1 and 2 <= waits[2] <= 4


def test_failures_that_stay_are_said(server) -> None:
    server.failures = [(503, {})] * 3
    with pytest.raises(UsageError, match=r"did not answer in 3 tries \(HTTP 503 .*try again.*the same command goes on"):
        Endpoint(server.url, retries=2, sleep=lambda seconds: None).post("/chat/completions", {})
    server.requests.clear()
    server.failures = [(401, {})]
    with pytest.raises(UsageError, match="refused the request: HTTP 401"):
        Endpoint(server.url, retries=2, sleep=lambda seconds: None).post("/chat/completions", {})
    assert len(server.requests) == 1, "a refusal is not tried again"
    url = server.url
    server.answer = lambda request: ["no", "object"]
    with pytest.raises(UsageError, match="list, not a JSON object"):
        Endpoint(url, retries=0).post("/x", {})
    with pytest.raises(UsageError, match="expected http"):
        Endpoint("localhost:8000")


def test_nobody_there() -> None:
    with pytest.raises(UsageError, match="did not answer in 2 tries"):
        Endpoint("http://127.0.0.1:9/v1", retries=1, timeout=1, sleep=lambda seconds: None).post("/x", {})


def test_an_endpoint_within_an_evaluation(fake, entrgi, server, tmp_path, capsys) -> None:
    """Judged once each, resumed where the endpoint gave up, and judged anew when the question changes."""
    judge = f"{{name: unit, kind: openai, model: m, url: '{server.url}', retries: 0, concurrency: 1, tests: [a]}}"
    arguments = ("evaluate", "tiny", "-n", 4, "--batch-size", 2, "-L", 8, "-T", 8, "--methods", "none,entrgi",
                 "--best-of", 4, "--traces", 0, "-o", tmp_path, "--no-report", "--set")  # fmt: skip
    server.failures = [(200, {})] * 5 + [(503, {})]
    assert entrgi(*arguments, f"judges=[{judge}]") == 2
    assert "what was judged is kept" in capsys.readouterr().err and len(server.requests) == 6
    assert entrgi(*arguments, f"judges=[{judge}]") == 0
    assert len(server.requests) == 6 + 4, "two finished batches of two are not asked for again"
    assert " unit " in capsys.readouterr().out
    assert entrgi(*arguments, f"judges=[{judge.replace('[a]', '[b]')}]") == 0
    assert len(server.requests) == 10 + 8
    lines = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and all(line["score"] == 4 and line["tests"] == [4] for line in lines)


@pytest.mark.slow
def test_judges_of_the_tiny_models(tiny_weights, tmp_path) -> None:
    import transformers

    from entrgi import tiny

    model = str(tiny.weights_path("diffusion"))
    config = from_dict(
        {"judges": [{"kind": "reward"}, {"kind": "lm", "model": model, "dtype": "float32", "batch_size": 3}]}
    )
    reward, unit = (make_judge(spec, "cpu", None) for spec in check_judges(config.judges, config.model))
    good, bad = (
        Candidate("k", "What did you think of the soup?", f"The soup was {w}.", []) for w in ("superb", "awful")
    )
    high, low = reward.judge([good, bad])
    assert high.score > low.score + 1
    together = unit.judge([good, bad, *CANDIDATES])
    for one, judgement in zip([good, bad, *CANDIDATES], together, strict=True):
        assert len(judgement.tests) == 5 and all(1 <= score <= 5 for score in judgement.tests)
        assert judgement.score == pytest.approx(sum(judgement.tests) / 5)
        alone = unit.judge([one])[0]
        assert judgement.tests == pytest.approx(alone.tests, abs=1e-4), "padding must not be read"
    with pytest.raises(UsageError, match="cannot load"):
        make_judge(JudgeSpec("j", "lm", model="/nowhere"), "cpu", None)
    copy = str(shutil.copytree(model, tmp_path / "copy"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<|marker|>"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(UsageError, match=r"judge j: .*token '<\|marker\|>' has id 2048.* has 2048 rows"):
        make_judge(JudgeSpec("j", "lm", model=copy), "cpu", None)
