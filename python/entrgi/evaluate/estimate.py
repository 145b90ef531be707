"""``entrgi evaluate --dry-run``: what would be run, with which models, in how much memory and time."""

from __future__ import annotations

import collections
import math
from pathlib import Path

from ..tables import text_table
from .config import Cell
from .flops import Shape, open_slots, sample_flops, total
from .plan import Plan, prompt_length
from .render import quantity
from .specs import TINY, check_judges
from .store import Store

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# Dense bfloat16 TFLOP/s of data sheets, by a part of the device's name. The first that fits counts.
_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
    "3090": 71,
    "T4": 65,
}
_SUSTAINED = 0.4  # share of the peak that forwards of some thousand tokens reach
_UNKNOWN_GPU = 300.0
_ASSUMED = "an 80 GB H100"
# The tiny models are all overhead: measured with `entrgi evaluate tiny` on two AVX-512 cores.
_TINY_TFLOPS = 0.05


def describe(plan: Plan, folder: Path, *, tflops: float | None = None) -> str:
    """The plan for a reader.

    Args:
        plan: of the evaluation.
        folder: where results would go; what is there already is counted.
        tflops: TFLOP/s that the device sustains; None guesses.
    """
    config = plan.config
    store = Store(folder)
    todo = set(plan.todo(store))
    out = [f"evaluation {config.name}: {len(plan.cells)} cells, {len(plan.batches)} batches", ""]
    out += _axes(plan)
    out += [f"note: {reason}; stand-ins take its place here" for reason in plan.unreachable]
    out += ["", *_models(plan)]
    out += ["", *_work(plan, todo)]
    out += ["", *_memory(plan)]
    out += ["", *_time(plan, todo, tflops)]
    if store.read_header():
        out += ["", f"{folder}: {len(plan.batches) - len(todo)} of {len(plan.batches)} batches are done"]
    return "\n".join(out)


def _axes(plan: Plan) -> list[str]:
    config = plan.config
    lines = [f"methods       {', '.join(dict.fromkeys(cell.label for cell in plan.cells))}"]
    lines += [f"temperatures  {', '.join(f'{t:g}' for t in sorted({c.config.temperature for c in plan.cells}))}"]
    lines += [f"seeds         {', '.join(map(str, config.seeds))}"]
    for dataset in config.datasets:
        count = len(plan.prompts[dataset.name, config.seeds[0]])
        order = {None: "in order", "seed": "shuffled by each seed"}.get(dataset.shuffle, f"shuffled, {dataset.shuffle}")
        lines.append(f"dataset       {dataset.name}: {count} prompts of {dataset.path} ({dataset.split}), {order}")
    lines += [
        f"judge         {spec.name}: {spec.kind} {spec.model}" for spec in check_judges(config.judges, config.model)
    ]
    return lines


def _models(plan: Plan) -> list[str]:
    rows = []
    for key, shape in _shapes(plan).items():
        role, name = key.split(":", 1)
        count = None if shape is None else shape.parameters(head=role == "model")
        size = None if count is None else count * _width(plan)
        rows.append([f"{role} {name}", quantity(count), "–" if size is None else f"{size / 2**30:.1f}"])
    return text_table(["model", "parameters", "GiB"], rows)


def _work(plan: Plan, todo: set[int]) -> list[str]:
    groups: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    flops = collections.defaultdict(float)
    for place, batch in enumerate(plan.batches):
        key = (batch.cell.label, batch.cell.config.num_samples)
        groups[key].append(len(batch.items))
        if place in todo:
            flops[key] += _batch_flops(plan, batch.cell, len(batch.items)) or math.nan
    rows = []
    for (label, samples), prompts in groups.items():
        cost = flops[label, samples]
        rows.append([label, str(samples), str(sum(prompts) * samples), "?" if math.isnan(cost) else quantity(cost)])
    return text_table(["method", "K", "samples", "FLOPs to do"], rows)


def _memory(plan: Plan) -> list[str]:
    """Weights; what comes on top is dominated by the logits under optimisation, Adam's two moments and kept keys."""
    shapes = _shapes(plan)
    if None in shapes.values():
        return ["memory: the models' configurations are not to be found here"]
    known = {key: shape for key, shape in shapes.items() if shape is not None}
    width = _width(plan)
    model = known[f"model:{plan.config.model}"]
    rewards = [shape for key, shape in known.items() if key.startswith("reward:")]
    weights = (model.parameters(head=True) + max(r.parameters(head=False) for r in rewards)) * width
    # The reward's embedding seen through the vocabulary map.
    table = model.vocabulary * max(r.hidden for r in rewards) * width
    extra = 0.0
    for cell in plan.cells:
        c = cell.config
        rows = c.batch_size * c.num_samples * c.copies
        entries = rows * open_slots(model, c) * model.vocabulary
        # Adam's moments have the logits' dtype unless another is set, float32 for float16.
        moment = _BYTES[c.state_dtype] if c.state_dtype else 4 if plan.config.dtype == "float16" else width
        kept = 2 * moment if c.guided and c.inner_steps > 1 else 0
        held = entries * (width * (2 if c.guided else 1.25) + kept)
        if model.block_length is not None or c.model_cache is not None:
            positions = prompt_length(plan.prompts) + c.max_new_tokens
            held += rows * positions * model.layers * 2 * model.key_value * width * (2 if c.cfg_scale else 1)
        extra = max(extra, held)
    gib = [f"{value / 2**30:.1f} GiB" for value in (weights, table, extra, weights + table + extra)]
    return [
        f"memory of a process: about {gib[3]}: weights {gib[0]}, embedding table {gib[1]}, logits with Adam's moments "
        f"and kept keys {gib[2]} (the largest batch; --batch-size lowers it)"
    ]


def _time(plan: Plan, todo: set[int], tflops: float | None) -> list[str]:
    costs = [_batch_flops(plan, plan.batches[place].cell, len(plan.batches[place].items)) for place in todo]
    if any(cost is None for cost in costs):
        return ["time: the models' configurations are not to be found here"]
    whole = math.fsum(cost for cost in costs if cost is not None)
    rate, source = (tflops, "given") if tflops else _rate(plan)
    seconds = whole / (rate * 1e12)
    return [
        f"time: about {_duration(seconds)} on one process for {quantity(whole)}FLOP at {rate:g} TFLOP/s sustained "
        f"({source}); n processes take an n-th of it. Judges come on top."
    ]


def _rate(plan: Plan) -> tuple[float, str]:
    """(TFLOP/s, where the figure is from)."""
    if plan.config.model == TINY:
        return _TINY_TFLOPS, "the tiny models on two cores"
    import torch

    if not torch.cuda.is_available():
        return _PEAKS["H100"] * _SUSTAINED, f"there is no GPU here: {_ASSUMED}, {_SUSTAINED:.0%} of its peak"
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in _PEAKS.items() if part in name), None)
    if peak is None:
        return _UNKNOWN_GPU * _SUSTAINED, f"{name} is not known: --tflops says better"
    return peak * _SUSTAINED, f"{name}, {_SUSTAINED:.0%} of its peak"


def _batch_flops(plan: Plan, cell: Cell, prompts: int) -> float | None:
    shapes = _shapes(plan)
    model, reward = shapes[f"model:{plan.config.model}"], shapes[f"reward:{cell.reward}"]
    if model is None or reward is None:
        return None
    one = total(sample_flops(model, reward, cell.config, prompt_length(plan.prompts)))
    return one * prompts * cell.config.num_samples


def _shapes(plan: Plan) -> dict[str, Shape | None]:
    names = [f"model:{plan.config.model}", *(f"reward:{name}" for name in plan.config.rewards)]
    return {name: Shape(**plan.shapes[name]) if name in plan.shapes else None for name in names}


def _width(plan: Plan) -> int:
    """Bytes a number: published models are stored in bfloat16."""
    return _BYTES.get(plan.config.dtype, 4 if plan.config.model == TINY else 2)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
