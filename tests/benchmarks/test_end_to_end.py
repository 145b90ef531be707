"""Whole generations measured: floor, phases, FLOPs, gate."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.harness import measure
from benchmarks.harness.models import Network
from benchmarks.harness.phases import REST, FlopCounter, PhaseTimer
from benchmarks.suites import end_to_end, generation
from benchmarks.suites.end_to_end import PLAIN, measure_end_to_end
from benchmarks.suites.generation import FLOOR, KEPT, UNKEPT, WHOLE, Recording, Size, check_same_blocks, sampler
from benchmarks.tools.profile import OneStep
from entrgi_kernels import ops
from entrgi_kernels.backends.ranges import listening, scope
from entrgi_kernels.guidance.phases import EMBED, MODEL, PHASES, REWARD, REWARD_BACKWARD, UPDATE
from entrgi_kernels.rewards.decoding import savings

SIZE = Size(
    v=401,
    d=16,
    max_new_tokens=4,
    steps=2,
    guidance_steps=2,
    diffusion=Network.plain(16, 2),
    reward=Network(16, 2, 24, 2, 1, 8),
)


@pytest.fixture(scope="module")
def found():
    return measure_end_to_end("quick", torch.float32, backend="eager", size=SIZE, budget=0.0)


def test_all_candidates_are_timed_and_inside_is_looked_at(found, tmp_path):
    assert found.group.refused == {}
    assert set(found.group.timings) == {"published", "eager", PLAIN, FLOOR}
    for name in ("eager", PLAIN):
        assert all(found.phases[name][phase] > 0 for phase in PHASES) and set(found.phases[name]) == {*PHASES, REST}
        assert all(found.flops[name][phase] > 0 for phase in (MODEL, EMBED, REWARD, REWARD_BACKWARD, UPDATE))
    assert sum(found.flops["eager"].values()) < sum(found.flops[PLAIN].values())
    assert found.same == 1.0
    path = tmp_path / "rows.json"
    measure.save(found.rows("cpu"), path)
    rows = {row["backend"]: row for row in json.loads(path.read_text())}
    assert rows["eager"]["shape"] == {"N": 16, "V": 401, "D": 16, "preset": "quick"}
    assert rows["eager"]["TFLOP"] < rows[PLAIN]["TFLOP"] and rows["eager"]["phases ms"][REST] > 0
    assert "reward backward" in found.table() and "tokens that are the same" in found.table()


def test_the_floor_replays_the_runs_own_calls():
    world = SIZE.world(torch.float64)
    ours = sampler(world, SIZE, "eager")
    recording = Recording(ours, SIZE.texts)
    names = [name for name, _, _ in recording.calls]
    assert names.count("masked_logits") == 2 and names.count("score_embeddings") == 4 and names.count("prepare") == 1
    counted = []
    for run in (recording.replay, lambda: ours.generate(SIZE.texts, progress=False)):
        with (counter := FlopCounter()), listening(counter):
            run()
        counted.append(counter)
    alone, whole = counted
    of_models = sum(whole.by_phase[phase] for phase in (MODEL, REWARD, REWARD_BACKWARD))
    of_models += whole.total - sum(whole.by_phase.values())  # the final scores, which no phase covers
    assert alone.total == pytest.approx(of_models, rel=1e-6) and names.count("score_texts") == 1
    assert "masked_logits" not in vars(ours.model)


def test_the_floor_is_the_least_work_or_none(monkeypatch):
    """Were the floor replayed without the reward's savings, a run without them would be near it."""
    refused = {"reward_prefix": "not exact for this network"}
    monkeypatch.setattr(savings.ExactSavings, "probe", lambda self, measure: self.refused.update(refused))
    monkeypatch.setattr(savings.ExactSavings, "warn", lambda self: None)
    found = measure_end_to_end("quick", torch.float32, backend="eager", size=SIZE, budget=0.0)
    assert found.group.floor is None and set(found.group.refused) == {FLOOR}
    assert "reward_prefix is not in use: not exact" in found.group.refused[FLOOR]


def test_a_red_check_gives_no_time(monkeypatch):
    original = generation.sampler

    def other(world, size, backend="auto", **settings):
        return original(world, size, backend, **{**settings, "method": "none"})

    monkeypatch.setattr(generation, "sampler", other)
    refused = measure_end_to_end("quick", torch.float32, backend="eager", size=SIZE, budget=0.0)
    assert {"eager", PLAIN} <= set(refused.group.refused) and refused.phases == {}
    assert "equal the published loop's" in refused.group.refused["eager"]


def test_a_preset_by_blocks(tmp_path):
    size = dataclasses.replace(SIZE, max_new_tokens=16, steps=8, block_length=4, prompt_words=9, prompts=1)
    found = measure_end_to_end("blocks", torch.float64, backend="eager", size=size, budget=0.0)
    assert found.group.refused == {} and set(found.group.timings) == {"published", KEPT, UNKEPT, WHOLE}
    assert found.same == 1.0 and all(0 < found.share_of_models(name) < 1 for name in (KEPT, UNKEPT, WHOLE))
    model = {name: found.flops[name][MODEL] for name in (KEPT, UNKEPT, WHOLE)}
    assert 2 * model[KEPT] < model[UNKEPT] < model[WHOLE] < found.flops["published"][REST]
    rows = {row["backend"]: row for row in found.rows("cpu")}
    assert rows[KEPT]["share of models"] > 0 and rows[KEPT]["tokens equal with and without kept blocks"] == 1.0
    assert rows["published"]["TFLOP"] > rows[WHOLE]["TFLOP"] > rows[KEPT]["TFLOP"]
    assert "vs whole canvas" in found.table() and "own forwards and backwards: kept blocks" in found.table()


def test_blocks_that_are_not_kept_have_no_time(monkeypatch):
    assert check_same_blocks(True).passed and not check_same_blocks(False).passed
    monkeypatch.setattr(generation, "tokens_of", lambda sampler, prompts, **settings: sampler)  # all different
    size = dataclasses.replace(SIZE, max_new_tokens=8, block_length=4)
    refused = measure_end_to_end("blocks", torch.float32, backend="eager", size=size, budget=0.0)
    assert "with and without kept blocks" in refused.group.refused[KEPT] and not refused.phases


def test_flops_are_counted_by_phase():
    phi, table = torch.randn(3, 50), torch.randn(50, 8)
    with (counter := FlopCounter()), listening(counter):
        with scope(EMBED):
            ops.soft_embedding(phi, table, temperature=1.0, backend="eager")
        a = torch.randn(2, 3, 4) @ torch.randn(4, 5)
    assert counter.by_phase[EMBED] == 2 * 3 * 50 * 8
    assert counter.total - counter.by_phase[EMBED] == 2 * a.numel() * 4


def test_attention_is_counted():
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 7, 8)
    with FlopCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        forward = counter.total
        out.sum().backward()
    assert forward == 2 * 2 * 5 * 7 * (8 + 8)
    assert counter.total - forward >= 2 * forward


def test_the_timer_leaves_the_rest():
    timer = PhaseTimer()
    with listening(timer), scope(MODEL):
        sum(range(1000))
    seconds = timer.seconds(1.0)
    assert 0 < seconds[MODEL] < 1 and sum(seconds.values()) == pytest.approx(1.0)


def test_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(end_to_end.PRESETS, "quick", SIZE)
    path = tmp_path / "rows.json"
    command = ["--preset", "quick", "--dtype", "float32", "--backend", "eager", "--baselines", "", "--budget", "0"]
    assert end_to_end.main([*command, "--json", str(path)]) == 0
    assert "models alone" in capsys.readouterr().out and len(json.loads(path.read_text())) == 3


def test_a_profiler_sees_one_denoising_step():
    told = []
    step = OneStep(1, lambda: told.append("start"), lambda: told.append("stop"))

    class Phases:
        begin = staticmethod(lambda name: told.append(name))
        end = staticmethod(lambda name: None)

    ours = sampler(SIZE.world(torch.float32), SIZE, "eager", steps=4)
    with listening(step), listening(Phases):
        ours.generate(SIZE.texts, progress=False)
    step.close()
    inside = told[told.index("start") + 1 : told.index("stop")]
    assert inside[0] == MODEL and inside.count(MODEL) == 1 and set(inside) == set(PHASES) and told.count("start") == 1
    last = OneStep(told.count(MODEL) - 1, lambda: told.append("start"), lambda: told.append("end"))
    with listening(last):
        ours.generate(SIZE.texts, progress=False)
    assert last.running
    last.close()
    assert told[-1] == "end" and not last.running
