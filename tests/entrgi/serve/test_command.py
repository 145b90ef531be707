"""The flags of ``entrgi serve``: what is served, and what is refused before anything is loaded."""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from entrgi.errors import UsageError
from entrgi.serve import command, offer
from entrgi.serve.schema import ChatRequest, understand
from entrgi_kernels.rewards.verifying import Verifier

ROOT = Path(__file__).resolve().parents[3]


def flags_of(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_the_tiny_models_on_loopback_by_default():
    args = flags_of()
    served = offer.describe(args)
    assert (args.host, served.model, served.rewards, served.tiny, served.keys) == (
        "127.0.0.1",
        "tiny",
        ("tiny",),
        True,
        (),
    )
    assert served.defaults.max_new_tokens == 32 and "127.0.0.1" in served.hosts


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "lets other machines in.*--api-key-file"),
        (["--host", "example.org"], "lets other machines in"),
        (["--port", 99999], "from 0 to 65535"),
        (["--max-queue", 0], "--max-queue 0: expected a finite number above 0"),
        (["--timeout", -1], "--timeout -1"),
        (["--timeout", "inf"], "--timeout inf: expected a finite number"),
        (["-L", 2000], r"at most 1024 \(--max-tokens"),
        (["--steps", 2000], r"at most 1024 \(--max-steps"),
        (["--max-samples", 2, "-K", 4], r"n=4: expected at most 2 \(--max-samples"),
        (["--max-guidance-steps", 2], r"guidance_steps=3: expected at most 2 \(--max-guidance-steps"),
        (["--replicas", 2], "with --ray"),
        (["--model", "m"], "--reward is missing"),
        (["--model", "m", "--reward", "a=x", "--reward", "a=y"], "there is a reward 'a' already"),
        (["--model", "m", "--reward", "x/r", "--reward", "y/r"], "there is a reward 'r' already"),
        (["--model", "m", "--reward", "a=x", "--reward", "b=y", "--reward-kind", "judge"], "expected NAME=VALUE"),
        (["--model", "m", "--reward", "a=x", "--reward-kind", "a=magic"], "expected one of classifier"),
        (["--model", "m", "--reward", "a=x", "--reward-kind", "a=judge"], "--question and --reward-kind judge"),
        (["--reward", "verifier:json"], "cannot guide"),
        (["--steps", 0], "steps=0"),
    ],
)
def test_what_does_not_go_together_is_one_line(entrgi, capsys, flags, said, monkeypatch):
    monkeypatch.setattr(command, "load", lambda args, served: pytest.fail("models were loaded"))
    assert entrgi("serve", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    import re

    assert re.search(said, line), line


def test_steps_that_nobody_named_stay_within_their_limit():
    from entrgi.serve.schema import config_of

    served = offer.describe(flags_of("--max-steps", 16))
    assert [config_of({"max_new_tokens": slots}, served).steps for slots in (8, 64)] == [8, 16]


def test_a_port_that_is_taken_is_named(entrgi, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert entrgi("serve", "--port", port) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_a_server_that_loads_has_its_port(tiny_weights):
    """The second is refused before it loads anything; a request to the first is answered once it has loaded."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "entrgi", "serve", "--port", str(port)]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    first = subprocess.Popen(command, **how)
    try:
        assert "loading" in first.stderr.readline()
        second = subprocess.run(command, **how, timeout=300)
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        client.request("GET", "/healthz")
        assert client.getresponse().status == 200
        assert second.returncode == 2 and second.stdout == ""
        (line,) = second.stderr.splitlines()
        assert f"cannot listen on 127.0.0.1, port {port}" in line and "another --port" in line
        first.terminate()
        assert first.wait(timeout=300) == 0
    finally:
        first.kill()
        first.communicate()


def test_a_connection_made_while_models_load_is_kept():
    with command._listening("127.0.0.1", 0) as listening:
        with socket.create_connection(listening.getsockname(), timeout=10) as client:
            client.sendall(b"hello")
            accepted, _ = listening.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"
        with pytest.raises(UsageError, match="another --port"):
            command._listening("127.0.0.1", listening.getsockname()[1])


@pytest.mark.parametrize(("content", "said"), [("\n\n", "holds no key"), ("two words\n", "one word a line")])
def test_a_file_of_keys_is_read_with_care(entrgi, capsys, tmp_path, content, said):
    path = tmp_path / "keys"
    path.write_text(content)
    assert entrgi("serve", "--api-key-file", path) == 2
    assert said in capsys.readouterr().err
    assert entrgi("serve", "--api-key-file", tmp_path / "none") == 2


def test_keys_open_other_addresses(monkeypatch):
    monkeypatch.setenv(offer.KEY_VARIABLE, "secret")
    served = offer.describe(flags_of("--host", "0.0.0.0"))
    assert served.keys == ("secret",) and served.hosts == ()


def test_without_the_extra_it_says_what_to_install(entrgi, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert entrgi("serve") == 2
    assert "pip install 'entrgi_kernels[serve]'" in capsys.readouterr().err


def test_rewards_have_names_and_their_own_flags():
    args = flags_of(
        "--model", "org/model", "--reward", "good=org/classifier", "--reward", "polite=org/lm", "--reward", "org/near",
        "--reward-kind", "polite=judge", "--question", "polite=Is it polite = kind?",
        "--reward-kind", "near=similarity", "--target", "near=soup",
    )  # fmt: skip
    found = {
        name: (own.reward, own.reward_kind, own.question, own.target) for name, own in offer.reward_flags(args).items()
    }
    assert found == {
        "good": ("org/classifier", "classifier", None, None),
        "polite": ("org/lm", "judge", "Is it polite = kind?", None),
        "near": ("org/near", "similarity", None, "soup"),
    }
    served = offer.describe(args)
    assert served.model == "model" and served.rewards == ("good", "polite", "near") and not served.tiny


def test_one_reward_needs_no_name_in_its_flags():
    args = flags_of("--model", "m", "--reward", "org/lm", "--reward-kind", "judge", "--question", "Polite?")
    (own,) = offer.reward_flags(args).values()
    assert (own.reward, own.reward_kind, own.question) == ("org/lm", "judge", "Polite?")


def test_several_rewards_share_one_diffusion_model(tiny_weights):
    args = flags_of("--method", "none", "--reward", "verifier:json", "--reward", "words=verifier:length=1-9")
    served = offer.describe(args)
    samplers = offer.load(args, served)
    assert list(samplers) == ["json", "words"] == list(served.rewards)
    assert samplers["json"].model is samplers["words"].model
    assert all(isinstance(sampler.reward, Verifier) for sampler in samplers.values())


@pytest.mark.parametrize(
    ("flags", "n", "expected"), [([], None, 1), ([], 3, 3), (["-K", 4], None, 4), (["-K", 4], 6, 6)]
)
def test_the_best_of_more_samples_where_the_operator_draws_more(flags, n, expected):
    served = offer.describe(flags_of(*flags))
    request = ChatRequest(messages=[{"role": "user", "content": "a"}], n=n)
    chat = understand(request, served)
    assert (chat.order.config.num_samples, chat.n) == (expected, n or 1)


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_a_memory_budget_is_bytes_or_a_share(text):
    if text == "x":
        with pytest.raises(SystemExit):
            flags_of("--memory-budget", text)
    else:
        with pytest.raises(UsageError, match="memory_budget"):
            offer.describe(flags_of(f"--memory-budget={text}"))
