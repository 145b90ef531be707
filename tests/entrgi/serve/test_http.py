"""The server over HTTP, in a process of its own: by the openai client and by hand."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import signal
import socket
import time
import urllib.parse

import pytest

PROMPT = [{"role": "user", "content": "What did you think of the soup?"}]


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server, path, body=None, method=None, headers=None):
    """(status, headers, content) of one request; a dict as body is sent as JSON."""
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    own = {"content-type": "application/json"} if data is not None else {}
    connection.request(method or ("GET" if data is None else "POST"), path, data, {**own, **(headers or {})})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    kind = answer.getheader("content-type", "")
    return answer.status, answer.headers, json.loads(content) if "json" in kind else content.decode()


def chat(server, **fields):
    return ask(server, "/v1/chat/completions", {"messages": PROMPT, "max_tokens": 8, **fields})


def test_the_openai_client_works_unedited(client, server):
    answer = client.chat.completions.create(model="tiny", messages=PROMPT, n=2, max_tokens=8, seed=3, temperature=0.7)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.model == "tiny"
    assert all(choice.message.role == "assistant" and choice.message.content for choice in answer.choices)
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    rewards = [choice.guidance["reward"] for choice in answer.choices]
    assert rewards == sorted(rewards, reverse=True) == sorted(answer.guidance["rewards"], reverse=True)
    assert answer.guidance["seed"] == 3 and answer.guidance["method"] == "entrgi"
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]


def test_the_openai_client_streams_unedited(client):
    settings = dict(model="tiny", messages=PROMPT, n=2, max_tokens=8, seed=3)
    whole = client.chat.completions.create(**settings)
    texts, canvases, reasons, usage = ["", ""], [], {}, None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        if "canvas" in (getattr(chunk, "guidance", None) or {}):
            canvases.append(chunk.guidance["canvas"])
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices} and usage == whole.usage
    assert len(canvases) == 8 and sorted(canvases[-1]) == sorted(texts)
    assert all("░" in text for text in canvases[0])


def test_guidance_goes_by_its_own_names(client):
    guidance = {"method": "aps", "guidance_steps": 2, "num_samples": 3, "steps": 5, "reward": "tiny", "trace": True}
    answer = client.chat.completions.create(
        model="tiny", messages=PROMPT, max_tokens=8, seed=1, extra_body={"guidance": guidance}
    )
    assert len(answer.choices) == 1 and len(answer.guidance["rewards"]) == 3
    assert answer.choices[0].guidance["reward"] == max(answer.guidance["rewards"])
    trace = answer.choices[0].guidance["trace"]
    assert [step["step"] for step in trace] == list(range(5)) and len(trace[0]["entropy"]) == 8
    assert {name: answer.guidance[name] for name in ("method", "guidance_steps", "steps")} == {
        "method": "aps", "guidance_steps": 2, "steps": 5,
    }  # fmt: skip


def test_a_stream_brings_the_traces_of_candidates_beside_the_text(client):
    guidance = {"search": "svdd", "candidates": 2, "trace": True}
    settings = dict(model="tiny", messages=PROMPT, n=2, max_tokens=8, seed=3, extra_body={"guidance": guidance})
    whole = [choice.guidance["trace"] for choice in client.chat.completions.create(**settings).choices]
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert [chunk.choices[0].guidance["trace"] for chunk in chunks if chunk.choices[0].delta.content] == whole


def test_a_text_depends_on_seed_prompt_and_settings_alone(server):
    def text(seed):
        status, _, answer = chat(server, seed=seed)
        assert status == 200
        return answer["choices"][0]["message"]["content"]

    alone = [text(seed) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        crowd = list(pool.map(text, [seed for _ in range(4) for seed in range(6)]))
    assert crowd == alone * 4 and len(set(alone)) > 1


def test_without_a_seed_each_request_has_its_own_and_tells_it(server):
    answers = [chat(server)[2] for _ in range(2)]
    seeds = [answer["guidance"]["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    again = chat(server, seed=seeds[0])[2]
    assert again["choices"][0]["message"] == answers[0]["choices"][0]["message"]


def test_messages_may_be_parts_and_several_turns(server):
    parts = [{"type": "text", "text": "What did you think "}, {"type": "text", "text": "of the soup?"}]
    split = chat(server, messages=[{"role": "user", "content": parts}], seed=1)[2]
    assert split["choices"][0]["message"] == chat(server, seed=1)[2]["choices"][0]["message"]
    turns = [*PROMPT, {"role": "assistant", "content": "It was good."}, {"role": "user", "content": "And the tea?"}]
    assert chat(server, messages=turns)[0] == 200


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "wizard"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "text"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "at most 200 (--max-prompt-tokens)"),
        ({"model": "gpt-4o"}, 404, "'tiny'"),
        ({"max_tokens": 65}, 400, "at most 64 (--max-tokens"),
        ({"max_tokens": 0}, 400, ">= 1"),
        ({"max_tokens": "8"}, 400, "max_tokens"),
        ({"max_completion_tokens": 9}, 400, "expected one"),
        ({"n": 5}, 400, "at most 4 (--max-samples"),
        ({"n": 0}, 400, "n=0"),
        ({"n": 2, "guidance": {"num_samples": 1}}, 400, "num_samples=1"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"seed": 1 << 70}, 400, "seed"),
        ({"seed": 1.5}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stop": ["."]}, 400, "stop"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"guidence": {}}, 400, "guidence"),
        ({"guidance": {"method": "magic"}}, 400, "expected one of 'none'"),
        ({"guidance": {"guidance_steps": 17}}, 400, "at most 16 (--max-guidance-steps"),
        ({"guidance": {"steps": 5000}}, 400, "at most 1024 (--max-steps"),
        ({"guidance": {"search": "svdd", "candidates": 5}}, 400, "--max-samples"),
        ({"guidance": {"temperature": 1}}, 400, "beside guidance"),
        ({"guidance": {"learning_rat": 1}}, 400, "no setting"),
        ({"guidance": {"backend": "eager"}}, 400, "operator"),
        ({"guidance": {"torch_compile": True}}, 400, "operator"),
        ({"guidance": {"reward": "other"}}, 400, "expected one of tiny"),
        ({"guidance": {"reward": "../../etc/passwd"}}, 400, "expected one of tiny"),
        ({"guidance": {"reward": {"tiny": "1"}}}, 400, "finite number"),
        ({"guidance": {"reward": {"tiny": 10**400}}}, 400, "at most 1e+12"),
        ({"guidance": {"reward": {"tiny": 1e300}}}, 400, "at most 1e+12"),
        ({"guidance": {"cfg_scale": 1e39}}, 400, "<= 1e+12"),
        ({"guidance": {"\ud800": 1}}, 400, "guidance.\\ud800 is no setting"),
        ({"guidance": {"weight": "__import__('os')"}}, 400, "weight"),
        ({"guidance": {"trace": 1}}, 400, "true or false"),
        ({"max_tokens": 64, "guidance": {"trace": True}}, 400, "expected at most 4000 (--max-trace"),
        ({"guidance": {"betas": [0.9, "x"]}}, 400, "betas"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_what_is_expected(server, fields, status, said):
    got, _, answer = chat(server, **fields)
    assert got == status and set(answer["error"]) == {"message", "type", "param", "code"}
    assert said in answer["error"]["message"]


def test_neutral_fields_of_other_clients_are_welcome(server):
    neutral = dict(stop=None, logprobs=False, tools=[], frequency_penalty=0, presence_penalty=0.0, logit_bias={})
    assert chat(server, **neutral, user="me", metadata={"a": "b"}, response_format={"type": "text"})[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"messages": [', 400, "no JSON"),
        (b"[" * 15000, 400, ""),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', 400, "temperature"),
        (b"\xff\xfe", 400, ""),
        (b"[]", 400, "dictionary"),
        (b'{"messages": "' + b"a" * 30000 + b'"}', 413, "20000 bytes (--max-body)"),
    ],
)
def test_bodies_that_are_no_request(server, body, status, said):
    got, headers, answer = ask(server, "/v1/chat/completions", body)
    assert got == status and said in answer["error"]["message"]
    assert chat(server)[0] == 200


def test_a_body_without_a_length_is_limited_too(server):
    address = urllib.parse.urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as wire:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        wire.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(30):
            wire.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/v1/other", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/docs", "GET", 404)],
)
def test_elsewhere_there_is_nothing(server, path, method, status):
    got, _, answer = ask(server, path, method=method)
    assert got == status and answer["error"]["message"]


def test_answers_cannot_be_embedded_or_guessed_at(server):
    for path in ("/", "/healthz", "/v1/models", "/nowhere"):
        headers = ask(server, path)[1]
        assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["server"] is None


def test_only_its_own_names_are_answered_without_a_key(server):
    port = urllib.parse.urlsplit(server.url).port
    for host, status in ((f"localhost:{port}", 200), (f"[::1]:{port}", 200), ("evil.example", 421), ("", 421)):
        assert ask(server, "/healthz", headers={"Host": host})[0] == status


def test_a_form_of_another_site_is_refused(server):
    """It may send text/plain without asking, or no type at all; JSON it may not."""
    body = json.dumps({"messages": PROMPT}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask(server, "/v1/chat/completions", body, headers={"content-type": kind})[0] == 415


def test_two_methods_step_by_step_and_the_report_at_the_end(server, sampler):
    """What the page asks for. Each step is the trace's, and texts are those of the same seed elsewhere."""
    settings = {"max_new_tokens": 8, "steps": 4, "num_samples": 2, "seed": 5}
    status, headers, content = ask(
        server, "/compare", {"prompt": "Was it good?", "methods": ["none", "entrgi"], "settings": settings}
    )
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [json.loads(line.removeprefix("data: ")) for line in content.splitlines() if line.startswith("data: ")]
    start, *steps, last = lines
    assert start["start"]["traces"]["none"][0][0]["tokens"] == [sampler.model.mask_token_id] * 8
    report = last["report"]
    for method in ("none", "entrgi"):
        mine = [line["step"] for line in steps if line["step"]["method"] == method]
        assert [step["step"] for step in mine] == list(range(4))
        trace = report["traces"][method][0][0]
        assert mine[-1]["tokens"] == trace["tokens"] and [step["h"] for step in mine] == trace["h"]
        ((_, alone),) = sampler.stream(
            ["Was it good?"], seeds=[5], method=method, **{k: settings[k] for k in settings if k != "seed"}
        )
        assert [sample["text"] for sample in report["samples"][method][0]] == [sample.text for sample in alone.samples]
    known = {token for line in steps for token in line["strings"]} | set(start["start"]["strings"])
    assert {str(token) for line in steps for token in line["step"]["tokens"]} <= known


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"methods": ["none"]}, "expected two out of"),
        ({"methods": ["none", "none"]}, "expected two out of"),
        ({"reward": "other"}, "expected one of tiny"),
        ({"prompt": " "}, "empty"),
        ({"prompt": ["a"]}, "prompt"),
        ({"settings": {"num_samples": 5}}, "--max-samples"),
        ({"settings": {"backend": "eager"}}, "operator"),
        ({"file": "/etc/passwd"}, "file"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(server, fields, said):
    status, _, answer = ask(server, "/compare", {"prompt": "a", "methods": ["none", "aps"], **fields})
    assert status == 400 and said in answer["error"]["message"]


@pytest.mark.slow
def test_a_person_watches_it_in_a_browser(server, browser):
    """The page and the server together; what the page does in detail is tried in test_page.py."""
    tab, wrong = browser.new_context().new_page(), []
    tab.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(server.url + "/")
    tab.fill("#ask", "What did you think of the soup?")
    tab.press("#ask", "Control+Enter")
    tab.wait_for_selector('html[data-run="done"]', state="attached", timeout=60_000)
    texts = tab.locator(".columns li .text").all_inner_texts()
    assert len(texts) == 8 and all(texts) and tab.locator(".tok.masked").count() == 0
    assert "best of 4" in tab.inner_text("#outcome") and not wrong
    tab.context.close()


def test_health_and_metrics(server):
    assert ask(server, "/healthz")[2] == {"status": "ok"}
    before = figures(server)
    chat(server, n=2)
    chat(server, n=9)
    after = figures(server)

    def grown(name):
        return after.get(name, 0) - before.get(name, 0)

    assert grown('entrgi_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert grown('entrgi_requests_total{path="/v1/chat/completions",status="400"}') == 1
    assert grown("entrgi_response_slots_total") == 16 and grown("entrgi_request_seconds_count") == 1
    assert grown('entrgi_rewards_count{reward="tiny"}') == 2 and after["entrgi_requests_open"] == 0


def figures(server):
    lines = [line for line in ask(server, "/metrics")[2].splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_client_that_goes_away_gives_its_place_back(server):
    address = urllib.parse.urlsplit(server.url)
    for stream in (False, True):
        body = json.dumps({"messages": PROMPT, "max_tokens": 64, "n": 4, "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        wires = [socket.create_connection((address.hostname, address.port), timeout=30) for _ in range(8)]
        for wire in wires:
            wire.sendall(head.encode() + body)
        time.sleep(0.2)
        for wire in wires:
            wire.close()
        deadline = time.monotonic() + 60
        while figures(server)["entrgi_requests_open"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert figures(server)["entrgi_requests_open"] == 0
    assert chat(server)[0] == 200


def test_keys_are_asked_for_everywhere_but_at_the_door(start, tiny_weights, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    server = start("-L", 8, "--api-key-file", keys, environment={"ENTRGI_API_KEY": "third-key"})
    for path in ("/v1/models", "/metrics", "/report.html"):
        assert ask(server, path)[0] == 401
        assert ask(server, path, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert ask(server, path, headers={"Authorization": "Basic first-key"})[0] == 401
    for key in ("first-key", "second-key", "third-key"):
        assert ask(server, "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
    assert chat(server)[0] == 401
    assert ask(server, "/healthz")[0] == ask(server, "/")[0] == 200
    # Behind a proxy it is called by the proxy's name.
    assert ask(server, "/healthz", headers={"Host": "texts.example"})[0] == 200

    # Told to stop it finishes what runs.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        headers = {"Authorization": "Bearer first-key"}
        body = {"messages": PROMPT, "max_tokens": 100, "n": 2}
        running = pool.submit(ask, server, "/v1/chat/completions", body, headers=headers)
        while not running.done() and "entrgi_requests_open 1.0" not in ask(server, "/metrics", headers=headers)[2]:
            time.sleep(0.02)
        code, said = server.stop()
        status, _, answer = running.result()
    assert (code, status) == (0, 200) and answer["choices"][0]["message"]["content"]
    assert "Traceback" not in said


def test_told_twice_it_stops_at_once(start, tiny_weights):
    server = start("-L", 8)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"messages": PROMPT, "max_tokens": 1000, "n": 16}
        running = pool.submit(ask, server, "/v1/chat/completions", body)
        while not running.done() and "entrgi_requests_open 1.0" not in ask(server, "/metrics")[2]:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) in (0, 130)
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert running.result()[0] >= 500
