"""``entrgi train``: RGRL and diffu-GRPO from the command line, on one process or under ``accelerate launch``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import flags, jsonl, loading
from ..digests import fingerprint
from ..errors import UsageError, differences, read_text, telling
from . import data, records
from .methods import METHODS, WEIGHTINGS

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

    from .arguments import GuidedTrainingArguments
    from .trainer import GuidedTrainer

CONFIGS = ("ddp", "fsdp2", "zero2")

# The recipe for the built-in models, where the published settings would take days to show anything: all weights are
# trained, with a larger step, on texts of fewer slots (docs/training.md has why, and what it gives).
TINY = {
    "learning_rate": 1e-4,
    "max_steps": 60,
    "prompts": 8,
    "max_new_tokens": 12,
    "steps": None,
    "guidance_steps": 3,
    "lora_r": 0,
    "eval_steps": 15,
    "save_steps": 15,
    "max_prompts": 1500,
}
# diffu-GRPO takes 12 steps on each rollout: more of them, cheaper ones.
TINY_GRPO = TINY | {"max_steps": 120, "eval_steps": 40, "save_steps": 40}
PUBLISHED = {
    "learning_rate": 5e-6,
    "max_steps": 500,
    "prompts": 1,
    "max_new_tokens": 128,
    "steps": None,  # one a token
    "guidance_steps": 1,
    "lora_r": 32,
    "eval_steps": 50,
    "save_steps": 50,
    "max_prompts": data.COUNT,
}


# Training arguments that a run keeps when it goes on.
_KEPT = (
    "weighting",
    "p_mask_prompt",
    "num_iterations",
    "epsilon",
    "beta",
    "scale_rewards",
    "ref_model_sync_steps",
    "ref_model_mixup_alpha",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi train``."""
    parser.description = (
        "Post-train a diffusion language model on reward-guided samples (rgrl-*), or by diffu-GRPO. Without --model "
        "the built-in tiny models are trained, in minutes. Several processes: accelerate launch --config_file "
        '"$(entrgi train --show-config ddp)" -m entrgi train ...'
    )
    parser.add_argument("--method", default="rgrl-entrgi", choices=tuple(METHODS), help="default: rgrl-entrgi")
    parser.add_argument("-o", "--output-dir", metavar="DIR", help="where checkpoints, records and the model go")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --output-dir")
    parser.add_argument(
        "--show-config", choices=CONFIGS, help="print where the accelerate configuration of that name is, and end"
    )
    group = parser.add_argument_group("prompts (the tiny models' own unless given)")
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="wildchat, magpie or lmsys; a file (.jsonl, .txt); a dataset's folder or its name on the Hub; "
        "PRESET=FOLDER for a preset's rows from a local copy",
    )
    group.add_argument("--eval-data", metavar="SOURCE", help="held-out prompts (default: the last ones of --data)")
    group.add_argument("--prompt-field", default="prompt", metavar="NAME", help="column or field (default: prompt)")
    group.add_argument("--split", default="train", help="split of a dataset (default: train)")
    group.add_argument("--max-prompts", type=int, metavar="N", help="default: 20000; 1500 with the tiny models")
    group.add_argument("--max-prompt-tokens", type=int, default=512, metavar="N", help="leave longer ones out (512)")
    group.add_argument("--eval-prompts", type=int, default=48, metavar="N", help="held-out prompts; 0: none (48)")
    group = parser.add_argument_group("training (defaults: the published ones; in brackets, with the tiny models)")
    group.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps: 500 [60; diffu-grpo 120]")
    group.add_argument("--learning-rate", type=float, metavar="LR", help="AdamW's, decayed linearly: 5e-6 [1e-4]")
    group.add_argument("--prompts", type=int, metavar="N", help="prompts a step and process: 1 [8]")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, metavar="N", help="default: 1")
    group.add_argument("--weighting", default="uniform", choices=WEIGHTINGS, help="rgrl-*: uniform")
    group.add_argument("--lora-r", type=int, metavar="R", help="rank; 0 trains all weights: 32 [0]")
    group.add_argument("--lora-alpha", type=float, default=32, help="default: 32")
    group.add_argument("--lora-dropout", type=float, default=0.1, help="default: 0.1")
    group.add_argument("--load-in-4bit", action="store_true", help="quantise the frozen weights (needs bitsandbytes)")
    group.add_argument("--seed", type=int, default=42, help="default: 42")
    group.add_argument(
        "--eval-steps", type=int, metavar="N", help="unguided held-out rewards every N steps: 50 [15; 40]"
    )
    group.add_argument("--save-steps", type=int, metavar="N", help="a checkpoint every N steps: 50 [15; 40]")
    group.add_argument("--sample-steps", type=int, default=20, metavar="N", help="show texts every N steps (20)")
    group.add_argument("--report-to", default="none", help="a Trainer reporter: tensorboard, wandb, ... (none)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of transformers' TrainingArguments or of GuidedTrainingArguments (beta=0.1, bf16=true)",
    )
    group.add_argument("--save-merged", action="store_true", help="with LoRA: also save the model with it merged in")
    group.add_argument("--quiet", action="store_true", help="no texts, no line a step")
    group.add_argument("--traceback", action="store_true", help="show where an error came from")
    group = parser.add_argument_group("drawing completions")
    group.add_argument("-K", "--num-samples", type=int, default=4, metavar="K", help="completions a prompt (4)")
    group.add_argument("-L", "--max-new-tokens", type=int, metavar="L", help="slots of a completion: 128 [12]")
    group.add_argument("-T", "--steps", type=int, metavar="T", help="denoising steps (one a slot)")
    group.add_argument(
        "-M", "--guidance-steps", type=int, metavar="M", help="rgrl-*: gradient steps at each denoising step: 1 [3]"
    )
    group.add_argument(
        "--sampling",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of GuidanceConfig (temperature=0.9, learning_rate=0.5, top_k=50)",
    )
    flags.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train as asked.

    Returns:
        0 when done.

    Raises:
        UsageError: for bad input; the command line turns it into one line and exit code 2.
    """
    if args.show_config:
        print(Path(__file__).parent / "configs" / f"{args.show_config}.yaml")
        return 0
    if not args.output_dir:
        raise UsageError("--output-dir is needed: expected a folder for checkpoints, records and the model")
    tiny = fill_defaults(args)
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output-dir {output} is no folder: expected one, or a name for a new one")
    if not args.resume and output.is_dir() and any(path.name != jsonl.LOCK for path in output.iterdir()):
        raise UsageError(f"{output} is not empty: --resume goes on with the run in it, or choose another folder")
    if args.device != "auto":
        loading.device_of(args.device, tiny)  # refuses what is not here, where Trainer would take the CPU instead
    logging.getLogger("entrgi.train").setLevel(logging.WARNING if args.quiet else logging.INFO)

    with _leaving_the_group():
        settings = training_arguments(args, tiny)
        guidance = sampling_settings(args)
        first = int(os.environ.get("RANK", "0")) == 0
        with jsonl.lock_folder(output) if first else contextlib.nullcontext():
            return _train(args, make_trainer(args, settings, guidance, tiny), output)


@contextlib.contextmanager
def _leaving_the_group() -> Iterator[None]:
    """Leave the group of processes that came up meanwhile, if one did, however what is run in it ends.

    Left to the interpreter's end, the group's threads can abort one of its processes (seen once, gloo).
    """
    import torch.distributed as group

    done, callers = False, group.is_available() and group.is_initialized()
    try:
        yield
        done = True
    finally:
        if group.is_available() and group.is_initialized() and not callers:
            # NCCL and its kind wait until all leave, and after an error the others may be waiting for this process.
            backends = {one.rpartition(":")[2] for one in group.get_backend_config().split(",")}
            if done or backends == {"gloo"}:
                group.destroy_process_group()


def _train(args: argparse.Namespace, trainer: GuidedTrainer, output: Path) -> int:
    if trainer.is_world_process_zero():
        described = _describe(args, trainer)
        if args.resume:
            _check_same_run(output, described)
        jsonl.write_atomically(output / "run.json", [json.dumps(described, indent=2) + "\n"])

    def kept() -> str:
        newest = records.last_complete_checkpoint(output)
        if newest is None:
            return f"no checkpoint was finished in {output}: --resume begins anew"
        return f"checkpoints are kept in {output}: --resume goes on from {newest.name}"

    try:
        with telling(kept) if trainer.is_world_process_zero() else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=args.resume)
    except ArithmeticError as error:  # what is not finite; the message says what and where
        raise UsageError(str(error)) from error
    with records.saving(output):
        trainer.save_model()
        trainer.save_state()
    if args.save_merged and args.lora_r and trainer.is_world_process_zero():
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        with records.saving(output / "merged"):
            merged.save_pretrained(output / "merged")
            trainer.processing_class.save_pretrained(output / "merged")
    if trainer.is_world_process_zero():
        for line in outcome(output):
            print(line)
    return 0


def _describe(args: argparse.Namespace, trainer: GuidedTrainer) -> dict[str, Any]:
    """What run.json holds, JSON values only."""
    from entrgi_kernels.guidance.keys import revision

    settings, prompts = trainer.args, trainer.train_dataset.prompts
    described = {
        "method": args.method,
        "model": args.model or loading.TINY,
        "model_files": fingerprint("diffusion", args.model),
        "reward": args.reward or loading.TINY,
        "reward_files": fingerprint("reward", args.reward),
        "reward_kind": [args.reward_kind, args.question, args.target],
        "dtype": args.dtype,
        "lora": [args.lora_r, args.lora_alpha, args.lora_dropout] if args.lora_r else None,
        "load_in_4bit": args.load_in_4bit,
        "arguments": settings.to_dict(),
        "sampling": trainer.sampler.config.to_dict(),
        "draws_revision": revision(trainer.sampler.config),
        "train_prompts": len(prompts),
        "train_prompts_sha256": hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest(),
        "prompts_a_step": settings.per_device_train_batch_size
        * settings.world_size
        * settings.gradient_accumulation_steps,
    }
    return json.loads(json.dumps(described, default=str))


def fill_defaults(args: argparse.Namespace) -> bool:
    """Give flags that were left out the published values, or the built-in models' own; whether it is those."""
    tiny = loading.uses_tiny(args)
    recipe = PUBLISHED if not tiny else TINY_GRPO if args.method == "diffu-grpo" else TINY
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.steps = args.steps or args.max_new_tokens
    return tiny


def training_arguments(args: argparse.Namespace, tiny: bool) -> GuidedTrainingArguments:
    """The run's settings from flags; ``--set`` comes last.

    Raises:
        UsageError: a value that is not accepted.
    """
    try:
        from .arguments import GuidedTrainingArguments
    except ImportError as error:
        raise _missing(error) from error

    settings = {
        "output_dir": args.output_dir,
        "method": args.method,
        "weighting": args.weighting,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.prompts,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "sample_steps": args.sample_steps,
        "save_steps": args.save_steps,
        "eval_strategy": "steps" if args.eval_prompts else "no",
        "eval_steps": args.eval_steps,
        "eval_on_start": bool(args.eval_prompts) and records.last_complete_checkpoint(args.output_dir) is None,
        "report_to": args.report_to,
        "use_cpu": args.device == "cpu" or (tiny and args.device == "auto"),
    }
    settings |= _assignments("--set", args.set, [field.name for field in dataclasses.fields(GuidedTrainingArguments)])
    try:
        return GuidedTrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    except ImportError as error:
        raise _missing(error) from error


def sampling_settings(args: argparse.Namespace) -> GuidanceConfig:
    """How completions are drawn: the published settings, changed by flags.

    Raises:
        UsageError: a value that is not accepted.
    """
    from .arguments import PUBLISHED_SAMPLING

    settings: dict[str, Any] = {
        "num_samples": args.num_samples,
        "max_new_tokens": args.max_new_tokens,
        "steps": args.steps,
        "guidance_steps": args.guidance_steps,
        "batch_size": 16,
    }
    names = [field.name for field in dataclasses.fields(PUBLISHED_SAMPLING)]
    settings |= _assignments("--sampling", args.sampling, names)
    try:
        return PUBLISHED_SAMPLING.replace(**settings)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def make_trainer(
    args: argparse.Namespace, settings: GuidedTrainingArguments, guidance: GuidanceConfig, tiny: bool
) -> GuidedTrainer:
    """Models, prompts and the trainer of the run.

    Raises:
        UsageError: models, prompts or packages that are missing or do not fit.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from entrgi_kernels import rewards

    from .progress import Progress
    from .trainer import GuidedTrainer

    args.device = str(settings.device)  # each process its own
    args.quantization = _four_bit() if args.load_in_4bit else None
    peft_config = lora_config(args) if args.lora_r else None
    loaded = loading.load(args, judge=True)
    train, held_out = _prompts(args, tiny, loaded)
    judges = {}
    if loaded.judge is not None:
        judges["judge"] = rewards.wrap(loaded.judge, loaded.judge_tokenizer)
    try:
        trainer = GuidedTrainer(
            loaded.model,
            loaded.reward,
            loaded.tokenizer,
            loaded.reward_tokenizer,
            args=settings,
            guidance=guidance,
            train_prompts=train,
            eval_prompts=held_out,
            judges=judges,
            peft_config=peft_config,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from error
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not args.quiet:
        trainer.add_callback(Progress())
    return trainer


def _check_same_run(output: Path, described: dict[str, Any]) -> None:
    """Refuse to go on with a run under settings that it was not begun with; its length may change, and what is shown.

    Raises:
        UsageError: the message names the settings.
    """
    path = output / "run.json"
    if not path.exists():
        return
    advice = "restore it, or choose another folder"
    try:
        stored = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): {advice}") from None
    parts = [stored.get(name) for name in ("arguments", "sampling")] if isinstance(stored, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UsageError(f"{path} does not describe a training run: {advice}")

    def identity(run: dict[str, Any]) -> dict[str, Any]:
        kept = {name: run["arguments"].get(name) for name in _KEPT}
        drawn = {
            f"sampling.{name}": run["sampling"][name] for name in run["sampling"] if name not in loading.SPEED_ONLY
        }
        other = {name: value for name, value in run.items() if not isinstance(value, dict)}
        return {"draws_revision": 1, **kept, **drawn, **other}

    before, now = identity(stored), identity(described)
    lines = differences(before, {name: now.get(name) for name in before})
    if lines:
        raise UsageError(
            "\n".join([f"{output} holds a run of other settings:", *lines, "give those, or another folder"])
        )


def outcome(folder: Path) -> list[str]:
    """What a run did to the rewards of unguided completions of held-out prompts, a line a scorer; may be empty."""
    from ..statistics import estimate, paired_difference

    found = records.read(folder, records.EVALUATIONS)
    if len(found) < 2:
        return []
    first, last = found[0], found[-1]
    lines = []
    for name in (name for name in last if name not in ("step", "length", "terminated")):
        change = paired_difference(last[name], first[name])
        error = math.nan if change.error is None else change.error
        some = f"{change.n}" if change.n == len(last[name]) else f"{change.n} of {len(last[name])}"
        lines.append(
            f"held-out {name}, unguided: {estimate(first[name])} at step {first['step']}, {estimate(last[name])} at "
            f"step {last['step']}; change {change.signed()} (95% interval {change.mean - 1.96 * error:+.2f} to "
            f"{change.mean + 1.96 * error:+.2f}, {some} prompts)"
        )
    return lines


def _prompts(args: argparse.Namespace, tiny: bool, loaded: loading.Loaded) -> tuple[list[Any], list[Any]]:
    for name, least in (("max_prompts", 1), ("max_prompt_tokens", 1), ("eval_prompts", 0)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: expected an integer >= {least}")
    if args.data is None:
        if not tiny:
            raise UsageError("--data is needed: wildchat, magpie, lmsys, a file, a folder or a dataset's name")
        train, held_out = data.tiny_prompts(args.max_prompts, args.eval_prompts)
    else:
        options = {"field": args.prompt_field, "split": args.split}
        try:
            found = data.load_prompts(args.data, count=args.max_prompts, **options)
            other = None
            if args.eval_data and args.eval_prompts:
                other = data.load_prompts(args.eval_data, count=args.eval_prompts, **options)
        except ImportError as error:
            raise UsageError(str(error)) from error
        for source, prompts in ((args.data, found), (args.eval_data, other or [])):
            loading.check_prompts(prompts, loaded, functools.partial(data.place, source, args.prompt_field, prompts))
        found = data.within(found, loaded.tokenizer, args.max_prompt_tokens)
        if other is None:
            train, held_out = data.hold_out(found, args.eval_prompts)
        else:
            held_out = data.within(other, loaded.tokenizer, args.max_prompt_tokens)
            known = {str(prompt) for prompt in held_out}
            train = [prompt for prompt in found if str(prompt) not in known]
            if not train:
                raise UsageError(f"every prompt of {args.data} is in {args.eval_data}: none is left to train on")
    return train, held_out


def lora_config(args: argparse.Namespace) -> Any:
    """The adapter that flags ask for.

    Raises:
        UsageError: without peft.
    """
    from .arguments import LORA_TARGETS

    try:
        from peft import LoraConfig
    except ImportError as error:
        raise _missing(error) from error
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(LORA_TARGETS),
    )


def _four_bit() -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes (a GPU with CUDA or ROCm)")
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _assignments(flag: str, given: list[str], names: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it can be read as such, else text."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise UsageError(f"{flag} {text}: expected NAME=VALUE, with one of {', '.join(sorted(names))}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def _missing(error: ImportError) -> UsageError:
    return UsageError(f"training needs more packages ({error}): pip install 'entrgi_kernels[train]'")
