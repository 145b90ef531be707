"""DiffusionGemma without a reward: a denoising step, a canvas, a pipeline's canvas; as they are and accelerated.

    python -m benchmarks.suites.accelerate [--shapes 64,256,32768 ...] [--device cuda] [--json FILE]

The network is random and has two thin layers of the real architecture, so that what is left is the work over the
vocabulary: N slots of a canvas, V tokens, embeddings of width D. transformers' own configuration has V = 262,144,
D = 2,304 and a canvas of 256: `--shapes 256,2304,262144 --device cuda`.

`step`: one denoising step of transformers' loop on given logits, peaked as a trained model's, with the
self-conditioning of the next and without the head. `canvas` and `pipeline`: transformers' `generate` and diffusers'
pipeline (with its EntropyBoundScheduler) on one canvas, head included. The floor of a step is its one product, softmax
times embeddings. `pipeline` needs `entrgi_kernels[diffusers]`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import entrgi_kernels
from benchmarks.harness import measure
from benchmarks.harness.inputs import Shape, peaked_logits
from benchmarks.harness.measure import Candidate, Group
from benchmarks.harness.oracle import Check, chosen_rows, combine, compare, relative_error, soft_products
from entrgi_kernels import ops

CASES = ("step", "canvas", "pipeline")
BASELINE = "as it is"
STEPS = 4  # of a canvas
PROMPT = 16
Settings = dict[str, str] | None


def network(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A random DiffusionGemma: two thin layers, an embedding table [V, D]."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    thin = dict(intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=16)
    experts = dict(num_experts=2, top_k_experts=1, moe_intermediate_size=16)
    layers = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], pad_token_id=0)
    text = dict(vocab_size=shape.v, hidden_size=shape.d, eos_token_id=1, **thin, **experts, **layers)
    vision = {**thin, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=shape.n, image_token_id=shape.v + 9
    )
    torch.manual_seed(0)
    with torch.device(device):
        return DiffusionGemmaForBlockDiffusion._from_config(config, dtype=dtype).eval()


class Encoded:
    """As much of a processor as the pipeline uses, of one prompt that is encoded already."""

    eos_token_id = 1

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def apply_chat_template(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}


class Problem:
    """One network and what is run on it, as it is or accelerated.

    Args:
        case: one of CASES.
    """

    def __init__(self, case: str, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.model = network(shape, dtype, device)
        self.table = self.model.model.decoder.embed_tokens.weight.detach()
        self.prompt = torch.randint(2, shape.v, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
        self.target = self.model
        if case == "pipeline":
            self.target = self._pipeline()
        elif case == "step":
            self.logits = peaked_logits(shape.n, shape.v, device=device)[None]
            self.previous = peaked_logits(shape.n, shape.v, dtype=dtype, device=device, seed=5)[None]
            self.context = self.model.model.encoder(input_ids=self.prompt)

    def _pipeline(self) -> Any:
        import diffusers

        pipe = diffusers.DiffusionGemmaPipeline(self.model, diffusers.EntropyBoundScheduler(), Encoded(self.prompt))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def become(self, settings: Settings) -> None:
        """Accelerated with these settings; None is as it was."""
        if hasattr(self.target, "entrgi"):
            self.target.entrgi.remove()
        if settings is not None:
            entrgi_kernels.accelerate(self.target, **settings)
        torch.manual_seed(0)

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """[2, N] or [1, N] tokens."""
        if self.case == "step":
            return torch.cat(self._step()[:2])
        return self._canvas(STEPS)

    def _canvas(self, steps: int) -> torch.Tensor:
        if self.case == "canvas":
            output = self.model.generate(self.prompt, max_new_tokens=self.shape.n, max_denoising_steps=steps)
            return output.sequences[:, PROMPT:]
        output = self.target(prompt="", gen_length=self.shape.n, num_inference_steps=steps, output_type="seq")
        return output.sequences

    def _step(self) -> Any:
        model = self.model
        config, _ = model._prepare_generation_config(None, max_denoising_steps=STEPS)
        sampler = model._prepare_sampler(config)
        canvas = sampler.initialize_canvas(1, self.prompt.device)
        names = inspect.signature(type(model)._denoising_step).parameters
        cache = "cache" if "cache" in names else "past_key_values"  # its name since transformers 5.24, and before

        def forward(**inputs: Any) -> Any:
            model.model(**inputs)
            return SimpleNamespace(logits=self.logits)

        return model._denoising_step(
            decoder_forward=forward,
            current_canvas=canvas,
            argmax_canvas=canvas,
            input_ids=self.prompt,
            decoder_position_ids=torch.arange(PROMPT, PROMPT + self.shape.n, device=canvas.device)[None],
            self_conditioning_logits=self.previous,
            mask_mapping={"full_attention": None, "sliding_attention": None},
            finished_denoising=torch.zeros(1, dtype=torch.bool, device=canvas.device),
            cur_step=2,
            sampler=sampler,
            logits_processor=model._prepare_logits_processor(config),
            diffusion_stopping_criteria=model._prepare_diffusion_stopping_criteria(config),
            **{cache: getattr(self.context, cache)},
        )

    # ---- the gate

    def check(self, settings: Settings) -> Callable[[], Check]:
        """The tokens are those of the model's own arithmetic with the same draws; so is the expected embedding."""

        def compared() -> Check:
            self.become(settings)
            checks = [self._conditioned()] if self.case == "step" else []
            self.become(settings)
            tokens = self._tokens()
            self.become(None)
            draws = torch.multinomial if settings is None or settings["draws"] == "torch" else keyed
            with mock.patch.object(torch, "multinomial", draws):
                own = self._tokens()
            # Two of a hundred may fall the other way of a rounding: sampled scores and thresholds, no sum over rows.
            checks.append(compare("tokens that differ", float((tokens != own).float().mean()), 0.02))
            return combine(checks)

        return compared

    @torch.no_grad()
    def _tokens(self) -> torch.Tensor:
        # Of one step: a token that differs in it may change all the next ones.
        return self.run() if self.case == "step" else self._canvas(1)

    @torch.no_grad()
    def _conditioned(self) -> Check:
        """What the decoder is conditioned on, before the scale, against float64 on some rows."""
        seen: list[torch.Tensor] = []
        module = self.model.model.decoder.self_conditioning
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        try:
            self._step()
        finally:
            hook.remove()
        rows = chosen_rows(self.shape.n, 6).to(self.device)
        logits = self.previous[0][rows]
        exact = soft_products(logits, self.table, 1.0)[1]
        scale = self.model.model.decoder.embed_tokens.embed_scale.to(self.dtype)
        plain = (logits.softmax(-1, dtype=torch.float32).to(self.dtype) @ self.table) * scale
        bound = 3 * relative_error(plain, exact * scale.double()) + 4 * torch.finfo(self.dtype).eps
        return compare("expected embedding", relative_error(seen[0][0][rows], exact * scale.double()), bound)

    def product(self) -> Callable[[], Any]:
        """The step's one product."""
        p = self.previous[0].softmax(-1)
        out = torch.empty(self.shape.n, self.shape.d, dtype=self.dtype, device=self.device)
        return lambda: torch.mm(p, self.table, out=out)


def keyed(probs: torch.Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None) -> torch.Tensor:
    """torch.multinomial with the package's own draws, on eager torch."""
    where = "cpu" if generator is None else generator.device
    seed = int(torch.randint(1 << 62, (), generator=generator, device=where))
    return ops.sample_tokens(probs.log(), seed=seed, backend="eager")[:, None]


def measure_case(
    case: str, shape: Shape, dtype: torch.dtype, backends: Sequence[str], device: str = "cpu", budget: float = 10.0
) -> Group:
    """Gate and time a case: as it is, and accelerated by backend and kind of draws."""
    problem = Problem(case, shape, dtype, device)
    every: dict[str, Settings] = {BASELINE: None}
    every |= {name: dict(draws="keyed", backend=name) for name in backends}
    every |= {f"{backends[0]}, torch's draws": dict(draws="torch", backend=backends[0])}
    made = [
        Candidate(name, problem.run, problem.check(settings), lambda settings=settings: problem.become(settings))
        for name, settings in every.items()
    ]
    if case == "step":
        made.append(Candidate("product", problem.product(), floor=True))
    flop = 2.0 * shape.n * shape.v * shape.d
    return measure.measure(
        f"accelerate, {case}", dtype, shape, made, flop=flop if case == "step" else 0.0, budget=budget, device=device
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and add the rows to the device's results.

    Returns:
        0, or 1 when a candidate failed its check.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.accelerate", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape(64, 256, 262_144)], help="N,D,V")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="of this project (default: auto)")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timed runs a case")
    parser.add_argument("--json", type=Path, help="where to write rows (default: benchmarks/results/<device>.json)")
    chosen = parser.parse_args(argv)
    groups = []
    for dtype in chosen.dtypes:
        for shape in chosen.shapes:
            for case in chosen.cases:
                options = {"device": chosen.device, "budget": chosen.budget}
                groups.append(measure_case(case, shape, getattr(torch, dtype), chosen.backends, **options))
                print(measure.table(groups[-1:], [BASELINE]), end="\n\n", flush=True)
    measure.save(
        [row for group in groups for row in measure.rows(group, chosen.device)],
        chosen.json or measure.result_path(chosen.device),
    )
    return 1 if any(group.refused for group in groups) else 0


if __name__ == "__main__":
    sys.exit(main())
