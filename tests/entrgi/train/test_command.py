"""`entrgi train`, end to end on the built-in models, and what it refuses."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from entrgi import jsonl
from entrgi.errors import UsageError
from entrgi.train import METHODS, PUBLISHED_SAMPLING, GuidedTrainingArguments, command, records, trainer

QUICK = ("-L", 4, "-T", 2, "-K", 2, "--prompts", 1, "--max-steps", 2, "--eval-prompts", 2, "--max-prompts", 20)


def _train(entrgi, folder, *more) -> int:
    return entrgi("train", "-o", folder, *QUICK, *more)


def test_a_run_and_what_it_leaves(entrgi, tmp_path, tiny_weights, capsys):
    folder = tmp_path / "run"
    more = ("--lora-r", 2, "--save-merged", "--eval-steps", 1, "--save-steps", 1, "--sample-steps", 1)
    more += ("--sampling", "temperature=0.8", "--set", "weight_decay=0.1")
    assert _train(entrgi, folder, *more) == 0
    out, err = capsys.readouterr()
    assert "held-out reward, unguided:" in out and "95% interval" in out and "step 1/2" in err
    described = json.loads((folder / "run.json").read_text())
    assert described["method"] == "rgrl-entrgi" and described["sampling"]["temperature"] == 0.8
    assert described["sampling"]["top_k"] == 50 and described["arguments"]["weight_decay"] == 0.1
    assert [r["step"] for r in records.read(folder, records.EVALUATIONS)] == [0, 1, 2]
    assert len(records.read(folder, records.SAMPLES)) == 2
    assert {"adapter_config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    # What was merged can be sampled from, like any model.
    arguments = ("--reward", Path(importlib.import_module("entrgi.tiny").weights_path("reward")))
    assert entrgi("generate", "Tell me about the inn.", "--model", folder / "merged", *arguments, "-L", 4) == 0
    # A run that is over has nothing to resume, and says how it went again.
    assert _train(entrgi, folder, *more, "--resume", "--quiet") == 0
    assert [r["step"] for r in records.read(folder, records.EVALUATIONS)] == [0, 1, 2]
    assert _train(entrgi, folder) == 2
    assert "is not empty: --resume" in capsys.readouterr().err
    before = (folder / "run.json").read_bytes()
    other = ("--method", "rgrl-aps", "--learning-rate", 0.5, "--sampling", "temperature=0.9")
    assert _train(entrgi, folder, *more, "--resume", *other) == 2
    error = capsys.readouterr().err
    assert 'method: "rgrl-entrgi" there, "rgrl-aps" now' in error and "learning_rate: 0.0001 there, 0.5 now" in error
    assert "sampling.temperature: 0.8 there, 0.9 now" in error and (folder / "run.json").read_bytes() == before
    assert described["draws_revision"] == 1
    (folder / "run.json").write_text(json.dumps({**described, "draws_revision": 2}))
    assert _train(entrgi, folder, *more, "--resume") == 2
    assert "draws_revision: 2 there, 1 now" in capsys.readouterr().err
    (folder / "run.json").write_text(json.dumps({k: v for k, v in described.items() if k != "draws_revision"}))
    assert _train(entrgi, folder, *more, "--resume", "--quiet") == 0, "a run of before there were revisions"
    assert _train(entrgi, folder, *more, "--resume", "--max-prompts", 19, "--lora-r", 1) == 2
    error = capsys.readouterr().err
    assert "lora: [2, 32, 0.1] there" in error and "train_prompts_sha256" in error
    with jsonl.lock_folder(folder):
        assert _train(entrgi, folder, *more, "--resume") == 2
    assert f"another run is writing to {folder}" in capsys.readouterr().err
    for content, said in (("{}", "does not describe a training run"), ("{", "is not JSON"), ("[]", "not describe")):
        (folder / "run.json").write_text(content)
        assert _train(entrgi, folder, *more, "--resume") == 2
        assert f"{folder / 'run.json'}" in (error := capsys.readouterr().err) and said in error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupted", "no memory"])
def test_what_is_kept_is_said_once_and_truly(entrgi, tmp_path, tiny_weights, monkeypatch, capsys, error):
    written, first = [], [True]

    def train(self, resume_from_checkpoint=None):
        for number in written:
            folder = Path(self.args.output_dir) / f"checkpoint-{number}"
            folder.mkdir()
            (folder / records.COMPLETE).write_text("{}")
        raise error

    monkeypatch.setattr(trainer.GuidedTrainer, "train", train)
    monkeypatch.setattr(trainer.GuidedTrainer, "is_world_process_zero", lambda self: first[0])
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    assert _train(entrgi, tmp_path / "a", "--quiet") == code
    assert f"no checkpoint was finished in {tmp_path / 'a'}: --resume begins anew\n" in capsys.readouterr().err
    written += [2, 10]
    assert _train(entrgi, tmp_path / "b", "--quiet") == code
    said = f"checkpoints are kept in {tmp_path / 'b'}: --resume goes on from checkpoint-10\n"
    assert capsys.readouterr().err.count(said) == 1
    first[0] = False  # another process than the first
    assert _train(entrgi, tmp_path / "c", "--quiet") == code
    assert "checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize("end", [None, KeyboardInterrupt(), UsageError("no"), ValueError("ours")], ids=repr)
@pytest.mark.parametrize("place", ["make_trainer", "_train"])
def test_the_group_is_left_however_a_run_ends(tmp_path, monkeypatch, place, end):
    def stop(*args):
        if end is not None:
            raise end
        return 0

    def come_up(*args):
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    monkeypatch.setattr(command, "training_arguments", come_up)  # accelerate would remember the group for later tests
    monkeypatch.setattr(command, "make_trainer", lambda *args: None)
    monkeypatch.setattr(command, "_train", lambda *args: 0)
    monkeypatch.setattr(command, place, stop)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["-o", str(tmp_path / "run"), *map(str, QUICK)])
    for backend in ("gloo", "nccl"):
        store = torch.distributed.FileStore(str(tmp_path / backend), 1)
        try:
            # NCCL's end waits for the other processes, who may be waiting for one that failed.
            config = f"cpu:gloo,cuda:{backend}"
            monkeypatch.setattr(torch.distributed, "get_backend_config", lambda config=config: config)
            with contextlib.nullcontext() if end is None else pytest.raises(type(end)):
                command.run(args)
            assert torch.distributed.is_initialized() == (backend == "nccl" and end is not None)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def test_a_callers_group_stays(entrgi, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert _train(entrgi, tmp_path / "run", "--set", "nonsense=1") == 2
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_data_from_a_file(entrgi, tmp_path, tiny_weights):
    (tmp_path / "p.txt").write_text("".join(f"Tell me about the inn, part {i}.\n" for i in range(5)))
    (tmp_path / "held.txt").write_text("Tell me about the inn, part 1.\nTell me about the bar.\n")
    more = ("--data", tmp_path / "p.txt", "--eval-data", tmp_path / "held.txt", "--method", "diffu-grpo", "--quiet")
    assert _train(entrgi, tmp_path / "run", *more) == 0
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["train_prompts"] == 4 and described["sampling"]["method"] == "none"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--output-dir is needed"]),
        (("-o", "{}", "--model", "x"), ["--reward is missing"]),
        (("-o", "{}", "--set", "nonsense=1"), ["--set nonsense=1", "learning_rate", "beta"]),
        (("-o", "{}", "--set", "beta=-1"), ["beta=-1"]),
        (("-o", "{}", "--prompts", "0"), ["per_device_train_batch_size=0", ">= 1"]),
        (("-o", "{}", "--learning-rate", "nan"), ["learning_rate=nan", "finite number >= 0"]),
        (("-o", "{}", "--set", "learning_rate=fast"), ["learning_rate='fast'", "finite number >= 0"]),
        (("-o", "/dev/null"), ["--output-dir /dev/null is no folder"]),
        (("-o", "{}", "--device", "nonsense"), ["--device nonsense is not usable here", "auto, cpu"]),
        (("-o", "{}", "--sampling", "temperature=-1"), ["temperature=-1"]),
        (("-o", "{}", "--sampling", "heat"), ["--sampling heat", "NAME=VALUE"]),
        (("-o", "{}", "--method", "diffu-grpo", "--weighting", "best"), ["only RGRL"]),
        (("-o", "{}", "--data", "{}/none.txt"), ["cannot read"]),
        (("-o", "{}", "--max-prompts", "5000"), ["between 0 and 2304"]),
        (("-o", "{}", "--eval-prompts", "-1"), ["--eval-prompts -1", ">= 0"]),
        (("-o", "{}", "--report-to", "nobody"), ["nobody"]),
    ],
    ids=str,
)
def test_errors_are_one_line(entrgi, tmp_path, tiny_weights, capsys, arguments, words):
    assert entrgi("train", *(str(a).format(tmp_path / "run") for a in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("entrgi train: error:") and all(word in error for word in words), error


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_4_bit_without_bitsandbytes(entrgi, tmp_path, capsys):
    assert _train(entrgi, tmp_path / "run", "--load-in-4bit") == 2
    assert "--load-in-4bit needs bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.CONFIGS)
def test_configurations_are_what_accelerate_accepts(entrgi, name, capsys):
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file

    assert entrgi("train", "--show-config", name) == 0
    path = capsys.readouterr().out.strip()
    config = load_config_from_file(path)
    assert config.num_processes == 4 and config.mixed_precision == "bf16"
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}[name]
    assert str(config.distributed_type).endswith(kind)
    if name == "zero2":
        assert config.deepspeed_config["zero_stage"] == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


REAL = ("--model", "m", "--reward", "r", "--data", "wildchat", "--device", "cpu")


def _defaults(*arguments: str) -> tuple[argparse.Namespace, bool]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["-o", "out", *arguments])
    return args, command.fill_defaults(args)


@pytest.mark.parametrize("method", METHODS)
def test_real_models_are_trained_by_the_published_recipe(method):
    """What `entrgi train` does when nothing but models and prompts is given: every figure of the publication."""
    peft = pytest.importorskip("peft")
    args, tiny = _defaults("--method", method, *REAL)
    assert not tiny
    for settings in (command.training_arguments(args, tiny), GuidedTrainingArguments("out", method=method)):
        assert (settings.learning_rate, settings.lr_scheduler_type, settings.max_steps) == (5e-6, "linear", 500)
        assert settings.optim.startswith("adamw") and settings.weighting == "uniform"
        if method == "diffu-grpo":
            assert (settings.p_mask_prompt, settings.num_iterations) == (0.15, 12)
            assert (settings.epsilon, settings.beta, settings.ref_model_sync_steps) == (0.5, 0.04, 64)
            assert not settings.scale_rewards
        else:
            assert (settings.p_mask_prompt, settings.num_iterations) == (0.3, 1)
    for s in (command.sampling_settings(args), PUBLISHED_SAMPLING):
        assert (s.guidance_steps, s.learning_rate, s.temperature, s.top_p, s.top_k) == (1, 0.5, 0.9, 0.95, 50)
        assert (s.confidence, s.schedule, s.max_new_tokens, s.steps, s.num_samples) == ("guided", "even", 128, 128, 4)
    lora = command.lora_config(args)
    assert isinstance(lora, peft.LoraConfig) and (lora.r, lora.lora_alpha, lora.lora_dropout) == (32, 32, 0.1)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"}
    assert set(lora.target_modules) == names


def test_the_built_in_models_have_a_recipe_of_their_own():
    assert command.TINY.keys() == command.TINY_GRPO.keys() == command.PUBLISHED.keys()
    args, tiny = _defaults("--max-new-tokens", "20")
    assert tiny and (args.max_new_tokens, args.steps, args.guidance_steps, args.lora_r) == (20, 20, 3, 0)
    assert _defaults("--method", "diffu-grpo")[0].max_steps > args.max_steps
