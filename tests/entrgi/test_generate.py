"""`entrgi generate`: what it writes, that it goes on where it was stopped, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrgi import jsonl
from entrgi.cli import main
from entrgi_kernels.guidance import keys

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a", "b", "a", "c", "d"]
SIZE = ("-L", 8, "-T", 8)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_text_on_standard_output(fake, entrgi, capsys) -> None:
    assert entrgi("generate", "Hello", *SIZE) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "> Hello"
    assert len(out) == 6 and sum(line.startswith("*") for line in out) == 1  # 4 samples, one of them the best


def test_json_lines_hold_every_sample_and_setting(fake, entrgi, tmp_path) -> None:
    out = tmp_path / "o.jsonl"
    assert entrgi("generate", *PROMPTS, *SIZE, "-K", 3, "--top-k", 5, "-o", out) == 0
    entries = lines(out)
    assert [entry["prompt"] for entry in entries] == PROMPTS
    for entry in entries:
        rewards = [sample["reward"] for sample in entry["samples"]]
        assert len(rewards) == 3 and entry["top1"] == max(rewards)
        assert entry["best"] == entry["samples"][rewards.index(max(rewards))]["text"]
        assert entry["settings"]["top_k"] == 5 and entry["settings"]["method"] == "entrgi"
    assert entries[0]["samples"] != entries[2]["samples"], "a repeated prompt has draws of its own"
    assert len({entry["key"] for entry in entries}) == len(PROMPTS)


def test_best_only(fake, entrgi, tmp_path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    assert entrgi("generate", "a", *SIZE, "--best-only", "-o", out) == 0
    (entry,) = lines(out)
    assert len(entry["samples"]) == 1 and entry["samples"][0]["reward"] == entry["top1"] > entry["mean"]
    assert entrgi("generate", "a", *SIZE, "--best-only") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("torn", [b"", b'{"key": "3f', b'{"key": "abc", "prompt": "\xc3'])
@pytest.mark.parametrize("kept", range(len(PROMPTS)))
def test_resume_gives_the_file_of_an_uninterrupted_run(fake, entrgi, tmp_path, kept: int, torn: bytes) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    arguments = ["generate", *PROMPTS, *SIZE]
    assert entrgi(*arguments, "-o", whole) == 0
    expected = whole.read_bytes()
    stopped.write_bytes(b"".join(expected.splitlines(keepends=True)[:kept]) + torn)
    assert entrgi(*arguments, "-o", stopped, "--resume") == 0
    assert stopped.read_bytes() == expected


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError("2 GiB"), 1)], ids=str)
def test_what_ends_a_run_early_says_what_is_done(fake, entrgi, tmp_path, capsys, error, code) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    arguments = ["generate", *PROMPTS, *SIZE]
    assert entrgi(*arguments, "-o", whole) == 0

    def prepare(sampler) -> None:
        sampler.stop_after, sampler.stop_by = 2, error

    fake.prepare = prepare
    capsys.readouterr()
    assert entrgi(*arguments, "-o", stopped) == code
    said = capsys.readouterr().err
    assert f"2 of {len(PROMPTS)} prompts done; go on with --resume" in said and "Traceback" not in said
    assert lines(stopped) == lines(whole)[:2]
    fake.prepare = lambda sampler: None
    assert entrgi(*arguments, "-o", stopped, "--resume") == 0
    assert stopped.read_bytes() == whole.read_bytes()


def test_resume_keeps_a_last_line_that_only_lacks_its_end(fake, entrgi, tmp_path) -> None:
    out = tmp_path / "o.jsonl"
    arguments = ["generate", *PROMPTS, *SIZE, "-o", out]
    assert entrgi(*arguments) == 0
    expected = out.read_bytes()
    out.write_bytes(expected[:-1])
    loads = fake.loads
    assert entrgi(*arguments, "--resume") == 0
    assert out.read_bytes() == expected
    assert fake.loads == loads, "nothing was left to do, so no model was loaded"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--temperature", 0.5), "temperature: 0.7 there, 0.5 now"),
        (("--seed", 3), "seed: 0 there, 3 now"),
        (("--best-only",), 'samples: "all" there, "best" now'),
        (("--dtype", "bfloat16"), 'dtype: "auto" there, "bfloat16" now'),
    ],
)
def test_other_settings_are_refused_by_name(fake, entrgi, tmp_path, capsys, flags, said) -> None:
    out = tmp_path / "o.jsonl"
    assert entrgi("generate", "a", "b", *SIZE, "-o", out) == 0
    assert entrgi("generate", "a", "b", *SIZE, "-o", out, "--resume", "--backend", "eager", "--batch-size", 1) == 0
    expected = out.read_bytes()
    capsys.readouterr()
    assert entrgi("generate", "a", "b", "c", *SIZE, "-o", out, "--resume", *flags) == 2
    assert f"{out}, line 1: a result of other settings:\n  {said}" in capsys.readouterr().err
    assert out.read_bytes() == expected
    assert entrgi("generate", "a", "b", "c", *SIZE, "-o", out, "--resume") == 0
    assert out.read_bytes().startswith(expected) and len(lines(out)) == 3, "more prompts are welcome"


def test_lines_of_older_draws_are_not_gone_on_with(fake, entrgi, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(keys, "REVISION", 1)
    runs = [[*SIZE, "-o", tmp_path / "plain.jsonl"], [*SIZE, "-o", tmp_path / "smc.jsonl", "--search", "smc"]]
    for run in runs:
        assert entrgi("generate", "a", "b", *run) == 0
    monkeypatch.undo()
    assert entrgi("generate", "a", "b", "c", *runs[0], "--resume") == 0
    capsys.readouterr()
    assert entrgi("generate", "a", "b", "c", *runs[1], "--resume") == 2
    assert "draws_revision: null there, 2 now" in capsys.readouterr().err


def test_other_weights_question_or_kind_are_other_settings(fake, entrgi, tmp_path, capsys) -> None:
    """A path is not what a model is: its files are."""
    for name in ("m", "r"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
    out = tmp_path / "o.jsonl"
    arguments = ["generate", *SIZE, "--model", tmp_path / "m", "--reward", tmp_path / "r", "--reward-kind", "judge",
                 "-o", out]  # fmt: skip
    assert entrgi(*arguments, "a", "--question", "Is it kind?") == 0
    for change in ("question", "r", "m"):
        question = "Is it short?" if change == "question" else "Is it kind?"
        if change != "question":
            (tmp_path / change / "model.safetensors").write_bytes(b"2")
        capsys.readouterr()
        assert entrgi(*arguments, "a", "b", "--resume", "--question", question) == 2
        name = {"question": "question", "r": "reward_files", "m": "model_files"}[change]
        assert f"\n  {name}: " in capsys.readouterr().err


def test_one_run_at_a_time_writes_to_a_file(fake, entrgi, tmp_path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    for flags in ((), ("--resume",), ("--overwrite",)):
        with out.open("ab") as file:
            jsonl.lock(file, out)
            assert entrgi("generate", "a", *SIZE, "-o", out, *flags) == 2
        assert f"another run is writing to {out}" in capsys.readouterr().err
    assert fake.loads == 0 and entrgi("generate", "a", *SIZE, "-o", out) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"key": "a"}', "not a result of `entrgi generate`"),
        (b'{"key": "a", "settings": {}, "prompt": "a", "best": "", "samples": []}', "a result of other settings"),
        (b"\x93\xfe", "not a JSON object"),
        (b"\0\0", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"again", "its key is in line 1 too"),
    ],
)
def test_a_damaged_line_is_named_and_left_alone(fake, entrgi, tmp_path, capsys, line: bytes, message: str) -> None:
    out = tmp_path / "o.jsonl"
    assert entrgi("generate", *PROMPTS, *SIZE, "-o", out) == 0
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([whole[0], whole[0] if line == b"again" else line + b"\n", *whole[2:]]))
    spoilt = out.read_bytes()
    assert entrgi("generate", *PROMPTS, *SIZE, "-o", out, "--resume") == 2
    err = capsys.readouterr().err.strip()
    assert f"entrgi generate: error: {out}, line 2: " in err and message in err
    assert out.read_bytes() == spoilt


def test_a_full_disk_loses_nothing(fake, entrgi, tmp_path, limited_files, capsys) -> None:
    """The third line fits in part; when there is room again the file ends as an undisturbed run's."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    assert entrgi("generate", *PROMPTS, *SIZE, "-o", whole) == 0
    room = len(b"".join(whole.read_bytes().splitlines(keepends=True)[:2])) + 40
    with limited_files(room):
        assert entrgi("generate", *PROMPTS, *SIZE, "-o", out) == 2
    err = capsys.readouterr().err
    assert f"cannot write {out}: File too large; 2 of 5 prompts done; go on with --resume" in err
    assert out.stat().st_size == room
    assert entrgi("generate", *PROMPTS, *SIZE, "-o", out, "--resume") == 0
    assert out.read_bytes() == whole.read_bytes()


def test_resume_leaves_foreign_files_alone(fake, entrgi, tmp_path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    for content in ('{"text": "mine"}\n', "notes\n", '["key"]\n'):
        out.write_text(content)
        assert entrgi("generate", "a", *SIZE, "-o", out, "--resume") == 2
        assert f"{out}, line 1: not a" in capsys.readouterr().err
        assert out.read_text() == content


def test_interrupt_leaves_a_valid_file(fake, entrgi, tmp_path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    fake.prepare = lambda sampler: setattr(sampler, "stop_after", 2)
    assert entrgi("generate", *PROMPTS, *SIZE, "-o", out) == 130
    assert [entry["prompt"] for entry in lines(out)] == PROMPTS[:2]
    assert "2 of 5 prompts done; go on with --resume" in capsys.readouterr().err


def test_results_are_written_as_they_come(fake, entrgi, tmp_path) -> None:
    out = tmp_path / "o.jsonl"
    sizes = []

    class Watched(list):
        def append(self, item) -> None:  # called by the sampler as it begins a prompt
            sizes.append(len(lines(out)) if out.exists() else 0)

    fake.prepare = lambda sampler: setattr(sampler, "prompts_seen", Watched())
    assert entrgi("generate", *PROMPTS, *SIZE, "-o", out) == 0
    assert sizes == [0, 1, 2, 3, 4]


def test_existing_files_are_not_lost(fake, entrgi, tmp_path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("precious")
    assert entrgi("generate", "a", *SIZE, "-o", out) == 2
    assert "--resume continues it" in capsys.readouterr().err and out.read_text() == "precious"
    assert entrgi("generate", "a", *SIZE, "-o", out, "--overwrite") == 0
    assert len(lines(out)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--resume"], "--resume needs JSON lines"),
        (["a", "--resume", "-o", "x.txt"], "--resume needs JSON lines"),
        (["a", "--resume", "--overwrite", "-o", "x.jsonl"], "exclude each other"),
        (["a", "--top-p", "0"], "top_p=0"),
        (["a", "--top-p", "1.5"], "top_p=1.5"),
        (["a", "-K", "0"], "num_samples=0"),
        (["a", "-L", "-3"], "max_new_tokens=-3"),
        (["a", "--batch-size", "0"], "batch_size=0"),
        (["a", "--weight", "threshold(a)"], "expected numbers in parentheses"),
        (["a", "--learning-rate", "nan"], "learning_rate=nan"),
        (["a", "--model", "somewhere"], "--reward is missing"),
        (["a", "-o", "/no/such/folder/x.jsonl"], "there is no folder"),
        (["a", "-o", "/"], "it is a folder"),
        ([""], "prompt 1: the prompt is empty"),
        (["-f", "/no/such/file"], "cannot read /no/such/file"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_loaded(fake, entrgi, capsys, arguments, message) -> None:
    assert entrgi("generate", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("entrgi generate: error: ") and err.count("\n") == 1
    assert fake.loads == 0


def test_missing_models_are_one_line(entrgi, capsys, tmp_path) -> None:
    assert entrgi("generate", "a", "--model", tmp_path / "m", "--reward", tmp_path / "r") == 2
    err = capsys.readouterr().err
    assert f"cannot load --model {tmp_path}/m: there is no folder" in err and err.count("\n") == 1


def test_reward_models_that_are_none_are_one_line(tiny_weights, entrgi, capsys, tmp_path) -> None:
    """A folder without a checkpoint, and a classifier of two labels."""
    import transformers

    from entrgi import tiny

    model = tiny.weights_path("diffusion")
    assert entrgi("generate", "a", "--model", model, "--reward", tmp_path) == 2
    assert "has no config.json" in capsys.readouterr().err
    reward, tokenizer = tiny.load_reward()
    two = transformers.AutoConfig.from_pretrained(tiny.weights_path("reward"), num_labels=2)
    transformers.AutoModelForSequenceClassification.from_config(two).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert entrgi("generate", "a", "--model", model, "--reward", tmp_path) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has 2 labels; a reward model has one" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "nonsense"], ["--device nonsense", "expected one of auto, cpu"]),
        (["--device", "meta"], ["--device meta", "expected one of auto, cpu"]),
        (["--batch-size", "many"], ["expected an integer or auto, got 'many'"]),
    ],
)
def test_values_say_what_is_accepted(entrgi, capsys, arguments, words) -> None:
    try:
        code = entrgi("generate", "a", *arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in err for word in words), err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(fake, entrgi, capsys, tmp_path) -> None:
    assert entrgi("generate", "a", *SIZE, "-o", "/dev/full", "--format", "jsonl") == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write /dev/full: No space left on device; 0 of 1 prompts done; go on with --resume" in err
    assert entrgi("compare", "a", *SIZE, "--json", "/dev/full", "--no-check") == 2
    assert "cannot write /dev/full: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [2, 4])
def test_resume_is_the_unbroken_run_byte_for_byte(tiny_weights, entrgi, tmp_path, kept: int, whole_run) -> None:
    """The built-in models, a repeated prompt, and stops inside of batches: the company of a prompt is what it was."""
    arguments, expected = whole_run
    stopped = tmp_path / "stopped.jsonl"
    stopped.write_bytes(b"".join(expected.splitlines(keepends=True)[:kept]) + b'{"key')
    assert entrgi(*arguments, "-o", stopped, "--resume") == 0
    assert stopped.read_bytes() == expected


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[list, bytes]:
    """(arguments, file) of a run on seven prompts in batches of three."""
    soup = "What did you think of the soup?"
    prompts = [soup, "What did you think of the room?", soup, "Tell me of the hotel.", soup, "How was it?", "The film?"]
    arguments = ["generate", *prompts, "-L", "12", "-T", "3", "-K", "2", "--batch-size", "3", "--quiet"]
    path = tmp_path_factory.mktemp("whole") / "o.jsonl"
    assert main([*arguments, "-o", str(path)]) == 0
    return arguments, path.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_real_thing_stopped_and_resumed(tiny_weights, answers_ctrl_c, tmp_path) -> None:
    """The built-in models, a real Ctrl-C from outside, and the same file in the end."""
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    prompts = ["What did you think of the soup?", "What did you think of the room?"]
    command = [sys.executable, "-m", "entrgi", "generate", *prompts, "-K", "2", "-T", "8", "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "2"}
    subprocess.run([*command, "-o", whole], env=environment, check=True, timeout=300)
    process = subprocess.Popen([*command, "-o", stopped], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (stopped.exists() and stopped.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "no result appeared"
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    done = lines(stopped)
    # 0: it was quicker than the signal. Otherwise one line says what was done, without a traceback.
    assert process.returncode in (0, 130) and "Traceback" not in err
    assert len(done) == (2 if process.returncode == 0 else 1)
    subprocess.run([*command, "-o", stopped, "--resume"], env=environment, check=True, timeout=300)
    assert stopped.read_bytes() == whole.read_bytes()
    assert all(len(entry["samples"]) == 2 for entry in lines(whole))
