"""Training steps on the built-in models, float64, against what they should be."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from train_cases import PROMPTS, losses, parameters

from entrgi.errors import UsageError
from entrgi.train import GuidedTrainingArguments, objectives, records
from entrgi.train.forward_process import derive_seed, mask_prompts
from entrgi.train.schedule import PromptSchedule


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().amax()) for name in a)


def _direct_log_probs(trainer, rollout, iteration):
    """The issue's one forward, written out."""
    network = trainer.accelerator.unwrap_model(trainer.model)
    masked = mask_prompts(
        rollout.tokens,
        rollout.attention,
        rollout.start,
        trainer.sampler.model.mask_token_id,
        trainer.args.p_mask_prompt,
        rollout.mask_seeds[iteration],
        rollout.keys,
    )
    assert (masked[:, rollout.start :] == trainer.sampler.model.mask_token_id).all()
    attention = rollout.attention
    keys = attention[:, None, None, :].expand(-1, 1, attention.shape[1], -1)
    positions = (attention.long().cumsum(1) - 1).masked_fill(~attention, 1)
    logits = network(masked, attention_mask=keys, position_ids=positions, use_cache=False).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[:, rollout.start :]
    return logits.log_softmax(-1).gather(-1, rollout.completions[..., None])[..., 0]


@pytest.mark.parametrize("method", ["rgrl-entrgi", "rgrl-aps"])
def test_a_step_of_rgrl_is_adamw_on_the_published_loss(trainer_of, method):
    trainer = trainer_of(method=method, max_steps=1, max_grad_norm=0.0, weight_decay=0.01)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    rollout, k = trainer.rollout, 2
    assert len(rollout) == 4 and rollout.completions.shape == (4, 6)
    end = parameters(trainer)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(start[name])
    trainer.model.eval().zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for row, found in enumerate(_direct_log_probs(trainer, rollout, 0)):
        inside = rollout.mask[row]
        loss = loss - (found * inside).sum() / max(1, int(inside.sum())) / k
    # Trainer sums the losses that it logs in float32.
    assert losses(trainer.args.output_dir) == [(1, pytest.approx(loss.item(), rel=1e-6))]
    loss.backward()
    for name, p in trainer.model.named_parameters():  # AdamW's first step: the sign of the gradient, and decay
        decay = 0.0 if "norm" in name else 0.01
        step = p.grad / (p.grad.abs() + trainer.args.adam_epsilon)
        torch.testing.assert_close(end[name], start[name] * (1 - 1e-3 * decay) - 1e-3 * step, rtol=1e-6, atol=1e-7)


def test_methods_differ_in_how_they_draw(trainer_of):
    drawn = {}
    for method in ("rgrl-entrgi", "rgrl-aps", "diffu-grpo"):
        trainer = trainer_of(method, method=method, max_steps=1, num_iterations=1)
        trainer.train()
        drawn[method] = trainer.rollout
        log = records.read(trainer.args.output_dir, records.LOG)[0]
        assert ("entropy_weight" in log) == method.startswith("rgrl")
        assert log["reward"] == pytest.approx(float(trainer.rollout.rewards.mean()), rel=1e-5)
    assert drawn["rgrl-aps"].entropy_weight == 1.0 and 0 < drawn["rgrl-entrgi"].entropy_weight < 1
    assert not torch.equal(drawn["rgrl-aps"].completions, drawn["diffu-grpo"].completions)


def test_the_sampler_draws_in_evaluation_mode(trainer_of, monkeypatch):
    pytest.importorskip("peft")
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    drawn = []
    for folder in ("a", "b"):
        torch.manual_seed(0)
        trainer = trainer_of(folder, max_steps=1, extra={"peft_config": lora})
        modes = []
        forward = trainer.sampler.model.masked_logits

        def watched(*args, _forward=forward, _trainer=trainer, _modes=modes, **kwargs):
            _modes.append(any(module.training for module in _trainer.sampler.model.module.modules()))
            return _forward(*args, **kwargs)

        monkeypatch.setattr(trainer.sampler.model, "masked_logits", watched)
        trainer.model.train()
        torch.manual_seed(1 if folder == "a" else 2)
        drawn.append(trainer.draw(PROMPTS[:2], 0).completions)
        assert modes and not any(modes)
        assert trainer.model.training  # and is back in its own mode
    assert torch.equal(*drawn)


def test_what_a_step_does_does_not_depend_on_accumulation(trainer_of):
    for method, iterations in (("rgrl-entrgi", 1), ("diffu-grpo", 2)):
        results = []
        for parts in (1, 2):
            trainer = trainer_of(
                f"{method}-{parts}",
                method=method,
                max_steps=3,
                per_device_train_batch_size=2 // parts,
                gradient_accumulation_steps=parts,
                num_iterations=iterations,
                ref_model_sync_steps=1,
            )
            trainer.train()
            results.append((losses(trainer.args.output_dir), parameters(trainer)))
        (one, p), (two, q) = results
        assert [step for step, _ in one] == [1, 2, 3]
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-6, abs=1e-9)
        same(p, q, 1e-7)


def test_diffu_grpo_uses_a_rollout_for_its_iterations_under_their_own_masks(trainer_of):
    trainer = trainer_of(method="diffu-grpo", max_steps=3, num_iterations=2, beta=0.5, ref_model_sync_steps=0)
    start = parameters(trainer)
    trainer.train()
    first, second = (derive_seed("mask", 42, 1, iteration) for iteration in range(2))
    assert trainer.rollout.index == 1 and trainer.rollout.mask_seeds == [first, second] and first != second
    log = records.read(trainer.args.output_dir, records.LOG)[:3]
    assert ["reward" in record for record in log] == [True, False, True]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-12) and log[1]["kl"] > 1e-8
    # The first iteration's ratio is 1: minus the mean advantage over tokens.
    end = parameters(trainer)
    rollout = trainer.rollout
    assert moved(start, end) > 1e-3
    advantage = objectives.advantages(rollout.rewards.double(), 2)
    tokens = rollout.mask.sum(1)
    expected = -(advantage * tokens).sum() / tokens.sum() + 0.5 * log[2]["kl"]
    assert log[2]["loss"] == pytest.approx(float(expected), rel=1e-6)
    # What was kept is what the policy that drew gives: the parameters are back where they were while the reference ran.
    same(trainer.reference.kept, start, 1e-12)


def test_old_and_reference_log_probs_are_a_direct_computation(trainer_of):
    trainer = trainer_of(method="diffu-grpo", num_iterations=2)
    trainer.reference.sync()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
        rollout = trainer.draw(PROMPTS[:2], 0)
        inside = rollout.mask
        for iteration in range(2):
            direct = _direct_log_probs(trainer, rollout, iteration)
            torch.testing.assert_close(rollout.old[:, iteration][inside], direct[inside], rtol=1e-9, atol=1e-9)
        assert not torch.equal(rollout.old[:, 0], rollout.old[:, 1])
        trainer.model.lm_head.weight.div_(1.1)
        direct = _direct_log_probs(trainer, rollout, 1)
    torch.testing.assert_close(rollout.reference[:, 1][inside], direct[inside], rtol=1e-8, atol=1e-8)


def test_the_reference_follows_every_so_many_steps(trainer_of):
    trainer = trainer_of(method="diffu-grpo", max_steps=3, ref_model_sync_steps=2, num_iterations=1)
    kept = []
    step = trainer.reference.sync
    trainer.reference.sync = lambda mix: (step(mix), kept.append((trainer.state.global_step, parameters(trainer))))
    trainer.train()
    assert [at for at, _ in kept] == [2]
    same(trainer.reference.kept, kept[0][1], 1e-14)
    half = {name: (a + kept[0][1][name]) / 2 for name, a in parameters(trainer).items()}
    step(0.5)
    same(trainer.reference.kept, half, 1e-12)


def test_weighted_rgrl_counts_completions_by_reward(trainer_of):
    found = {}
    for weighting in ("uniform", "softmax", "best"):
        trainer = trainer_of(weighting, weighting=weighting, max_steps=1)
        trainer.train()
        found[weighting] = losses(trainer.args.output_dir)[0][1]
        rollout = trainer.rollout
    assert len(set(found.values())) == 3 and all(math.isfinite(value) for value in found.values())
    assert objectives.row_weights(rollout.rewards, 2, "best").sum() == 2


@pytest.mark.parametrize(("method", "at"), [("rgrl-entrgi", 2), ("diffu-grpo", 2), ("diffu-grpo", 3)])
def test_a_resumed_run_takes_the_same_steps(trainer_of, method, at):
    settings = {"method": method, "max_steps": 4, "save_strategy": "steps", "save_steps": at, "ref_model_sync_steps": 2}
    if method == "diffu-grpo":
        settings |= {"num_iterations": 3, "beta": 0.3}
    whole = trainer_of("whole", **settings)
    whole.train()
    again = trainer_of("whole", **settings)
    before = losses(again.args.output_dir)
    last = records.last_complete_checkpoint(again.args.output_dir)
    assert last is not None
    assert (last / "entrgi_reference.safetensors").exists() == (method == "diffu-grpo")
    again.train(resume_from_checkpoint=str(last.parent / f"checkpoint-{at}"))
    assert [s for s, _ in losses(again.args.output_dir)] == [1, 2, 3, 4]  # cut back, then written again
    assert losses(again.args.output_dir) == before
    same(parameters(whole), parameters(again), 0.0)


def test_a_run_without_a_checkpoint_starts_anew(trainer_of):
    for _ in range(2):
        trainer = trainer_of(max_steps=1, eval_strategy="steps", eval_on_start=True)
        trainer.train(resume_from_checkpoint=True)
    assert [step for step, _ in losses(trainer.args.output_dir)] == [1]
    assert [r["step"] for r in records.read(trainer.args.output_dir, records.EVALUATIONS)] == [0, 1]


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step, whole in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if whole:
            (folder / records.COMPLETE).write_text("")
    assert records.last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    assert records.last_complete_checkpoint(tmp_path / "checkpoint-5") is None


def checkpoint_of(folder):
    """A whole checkpoint of three files."""
    (folder / "part").mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "part/weights"):
        (folder / name).write_text("content of " + name)
    records.complete(folder)
    return folder


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "part/weights", records.COMPLETE])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name, how):
    folder = checkpoint_of(tmp_path / "checkpoint-5")
    records.check_checkpoint(folder)
    path = folder / name
    content = path.read_bytes()
    if how == "changed" and name == records.COMPLETE:
        content = b'{"files": ["trainer_state.json"]}'
    if how == "gone":
        path.unlink()
        if name == records.COMPLETE:
            assert records.last_complete_checkpoint(tmp_path) is None
            return
    else:
        path.write_bytes(content[:9] if how == "cut" else content.replace(b"t", b"u"))
    with pytest.raises(UsageError, match=re.escape(str(path)) + ".* is (damaged|missing).*remove .*checkpoint-5"):
        records.check_checkpoint(folder)


def test_torn_checkpoints_are_swept_away(tmp_path):
    """One killed while it was written, one while it was removed; and nothing else."""
    for step in (1, 2, 3):
        checkpoint_of(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-3" / records.COMPLETE).unlink()
    (tmp_path / "merged").mkdir()
    records.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "merged"]
    records.check_checkpoint(tmp_path / "checkpoint-2")


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(trainer_of):
    """A byte of the optimiser's moments is another: torch reads it without a word."""
    trainer = trainer_of(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    path = records.last_complete_checkpoint(trainer.args.output_dir) / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(UsageError, match="optimizer.pt is damaged"):
        trainer_of(max_steps=2).train(resume_from_checkpoint=True)


def test_a_full_disk_is_named_while_saving(tmp_path, limited_files):
    from safetensors.torch import save_file

    tensors = {"x": torch.zeros(100_000)}
    for save in (save_file, torch.save):
        with limited_files(100_000), pytest.raises(UsageError, match=f"cannot write {tmp_path}: .*--resume"):
            with records.saving(tmp_path):
                save(tensors, tmp_path / "x")
    with pytest.raises(RuntimeError, match="size mismatch"), records.saving(tmp_path):
        raise RuntimeError("size mismatch")


@pytest.mark.parametrize("name", [records.LOG, records.EVALUATIONS, records.SAMPLES])
@pytest.mark.parametrize("line", ["{}", '{"step": "1"}', "[1]", '{"step": 1, "reward": NaN}'])
def test_a_damaged_record_is_named(tmp_path, name, line):
    (tmp_path / name).write_text(line + '\n{"step": 2}\n')
    with pytest.raises(UsageError, match=f"{name}, line 1: not a"):
        records.rewind(tmp_path, 2)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_records_of_a_resumed_run_are_those_of_an_unbroken_one(trainer_of, at):
    """Texts drawn after the checkpoint at which a run goes on, and the summary of a run that was at its end."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "sample_steps": 2, "save_total_limit": 9}
    trainer_of("whole", **settings).train()
    again = trainer_of("again", **settings)
    again.train()
    folder, whole = again.args.output_dir, again.args.output_dir.replace("again", "whole")
    for step in range(at + 1, 5):
        shutil.rmtree(f"{folder}/checkpoint-{step}")
    trainer_of("again", **settings).train(resume_from_checkpoint=True)
    assert records.read(folder, records.SAMPLES) == records.read(whole, records.SAMPLES)
    assert [sorted(r) for r in records.read(folder, records.LOG)] == [
        sorted(r) for r in records.read(whole, records.LOG)
    ]


def test_records_survive_a_torn_line_and_are_cut_back(tmp_path):
    for step in (1, 2, 3):
        records.append(tmp_path, records.LOG, {"step": step, "loss": 0.5})
    with open(tmp_path / records.LOG, "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert [record["step"] for record in records.read(tmp_path, records.LOG)] == [1, 2, 3]
    records.rewind(tmp_path, 2)
    records.append(tmp_path, records.LOG, {"step": 3, "loss": 0.25})
    assert records.read(tmp_path, records.LOG)[-1] == {"step": 3, "loss": 0.25}
    assert len(records.read(tmp_path, records.LOG)) == 3
    records.append(tmp_path, records.LOG, {"step": 4, "loss": float("nan"), "reward": [1.0, float("inf")]})
    assert records.read(tmp_path, records.LOG)[-1] == {"step": 4, "loss": None, "reward": [1.0, None]}


def test_evaluation_is_unguided_and_the_same_each_time(trainer_of):
    trainer = trainer_of(eval_samples=2)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"] and first["eval_reward_se"] > 0
    lines = records.read(trainer.args.output_dir, records.EVALUATIONS)
    assert len(lines) == 2 and len(lines[0]["reward"]) == 4
    assert first["eval_reward"] == pytest.approx(sum(lines[0]["reward"]) / 4)
    direct = trainer.sampler.generate(
        PROMPTS[8:], method="none", num_samples=2, seed=derive_seed("evaluate", 42), progress=False
    )
    assert [result.mean for result in direct] == pytest.approx(lines[0]["reward"], rel=1e-5)


def test_logs_reach_reporters_and_samples_are_kept(trainer_of):
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        seen: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer = trainer_of(max_steps=2, sample_steps=2, extra={"callbacks": [Reporter()]})
    trainer.train()
    wanted = {"loss", "reward", "reward_std", "reward_best", "entropy_weight", "completion_length"}
    wanted |= {"completion_terminated", "log_prob", "mask_seed", "learning_rate"}
    assert wanted <= Reporter.seen[0].keys()
    (sample,) = records.read(trainer.args.output_dir, records.SAMPLES)
    assert len(sample["samples"]) == 2 and sample["mask_seeds"] == [derive_seed("mask", 42, 0, 0)]
    assert sample["prompt"] in PROMPTS


def test_schedule_covers_all_prompts_each_pass_and_repeats_rollouts():
    schedule = PromptSchedule(list("abcdefgh"), batch=4, steps=12, num_iterations=3, seed=1)
    items = [[schedule[step * 4 + i] for i in range(4)] for step in range(12)]
    assert len(schedule) == 48
    for step, row in enumerate(items):
        assert {item["rollout"] for item in row} == {step // 3} and {item["iteration"] for item in row} == {step % 3}
        assert [item["prompt"] for item in row] == [item["prompt"] for item in items[step // 3 * 3]]
    passes = ["".join(item["prompt"] for item in items[step] + items[step + 3]) for step in (0, 6)]
    assert sorted(passes[0]) == sorted(passes[1]) == list("abcdefgh") and passes[0] != passes[1]
    with pytest.raises(ValueError, match="at least one"):
        PromptSchedule([], batch=4, steps=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "ppo"}, ["method='ppo'", "rgrl-entrgi"]),
        ({"weighting": "rank"}, ["weighting='rank'", "softmax"]),
        ({"method": "diffu-grpo", "weighting": "best"}, ["only RGRL"]),
        ({"num_iterations": 2}, ["num_iterations=2", "expected 1"]),
        ({"p_mask_prompt": 1.5}, ["p_mask_prompt=1.5", "probability"]),
        ({"beta": -1.0}, ["beta=-1.0", ">= 0"]),
        ({"ref_model_mixup_alpha": 0.0}, ["ref_model_mixup_alpha=0.0"]),
        ({"save_total_limit": 1}, ["save_total_limit=1", "at least 2"]),
        ({"train_sampling_strategy": "random"}, ["'sequential'"]),
    ],
    ids=str,
)
def test_settings_are_checked(changes, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        GuidedTrainingArguments(str(tmp_path), use_cpu=True, **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_batches_by_memory_are_refused(trainer_of):
    with pytest.raises(ValueError, match="'auto'.*expected an integer"):
        trainer_of(guidance={"batch_size": "auto"})
