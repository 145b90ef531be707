"""The trainer: transformers.Trainer whose batches are completions that it draws itself."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from entrgi_kernels import GuidedSampler
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.scoring import check_guides
from entrgi_kernels.models import BackboneModel
from entrgi_kernels.models.modules import evaluating
from entrgi_kernels.rewards import Reward

from ..statistics import estimate, finite
from . import objectives, records
from .arguments import PUBLISHED_SAMPLING, GuidedTrainingArguments
from .forward_process import CompletionLogProbs, derive_seed, mask_prompts
from .methods import METHODS
from .reference import ReferencePolicy
from .rollout import Rollout, sample_rollout
from .schedule import PromptSchedule

logger = logging.getLogger(__name__)


class GuidedTrainer(Trainer):
    """Post-trains a diffusion language model on completions it draws: RGRL on guided ones, diffu-GRPO on its own.

    A step takes `per_device_train_batch_size` prompts from each process and accumulation step, draws K completions of
    each, and takes one optimiser step on the objective's sum over all of them. How the prompts are split over
    processes and accumulation steps changes neither the completions nor the loss. ::

        args = GuidedTrainingArguments("runs/a", method="rgrl-entrgi")
        trainer = GuidedTrainer(model, reward_model, tokenizer, args=args, train_prompts=[...], eval_prompts=[...])
        trainer.train()

    Args:
        model, reward_model, tokenizer, reward_tokenizer: as :class:`entrgi_kernels.GuidedSampler` takes them.
        args: settings of the run.
        guidance: settings of the sampler; `method`, `seed` and what they need are set by the run. None: the published.
        train_prompts: strings, or conversations that end with a user's turn.
        eval_prompts: held-out prompts: `evaluate()` scores unguided completions of them.
        judges: further rewards by name, to score held-out completions with.
        peft_config: trains an adapter instead of the model, as in ``peft.LoraConfig(...)``.
        **trainer: further arguments of transformers' Trainer (callbacks, optimizers, ...).

    Attributes:
        rollout: the completions in use; None before the first step.
        reference: the policy that the KL term is against; None where there is none.

    Raises:
        ValueError, TypeError: models, tokenizers, prompts or settings that cannot serve.
    """

    args: GuidedTrainingArguments

    def __init__(
        self,
        model: Any,
        reward_model: Any,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        args: GuidedTrainingArguments,
        guidance: GuidanceConfig | None = None,
        train_prompts: Sequence[Any],
        eval_prompts: Sequence[Any] = (),
        judges: Mapping[str, Reward] | None = None,
        peft_config: Any = None,
        **trainer: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"this process sees {args.n_gpu} GPUs: expected one a process; start with `accelerate launch`, or "
                "choose one with CUDA_VISIBLE_DEVICES"
            )
        guidance = (guidance or PUBLISHED_SAMPLING).replace(method=METHODS[args.method].guidance)
        if isinstance(guidance.batch_size, str):
            # Its probes would run between optimiser steps, in memory that training gives back only in part.
            raise ValueError(f"batch_size={guidance.batch_size!r} of the sampler: expected an integer in training")
        settings = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)}
        self.sampler = GuidedSampler(model, reward_model, tokenizer, reward_tokenizer, **settings)
        check_guides(self.sampler.reward, guidance)
        adapter = self.sampler.model
        if not isinstance(adapter, BackboneModel):
            raise TypeError(f"model is a {type(adapter).__name__}: training needs a network wrapped by models.wrap()")
        self.log_probs = CompletionLogProbs(adapter, guidance.backend)
        network = adapter.module
        if peft_config is not None:
            network = _with_adapter(network, peft_config)
        self.eval_prompts = list(eval_prompts)
        self.judges = dict(judges or {})
        batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        super().__init__(
            model=network,
            args=args,
            data_collator=list,
            train_dataset=PromptSchedule(train_prompts, batch, args.max_steps, args.num_iterations, args.seed),
            eval_dataset=self.eval_prompts or None,
            processing_class=tokenizer,
            **trainer,
        )
        # The loss is a sum over the whole step: Trainer's own scaling is undone in compute_loss, once and for all.
        self.model_accepts_loss_kwargs = False
        self._needs_reference = args.objective == "grpo" and args.beta > 0
        self.reference: ReferencePolicy | None = None
        if self._needs_reference and not self.is_fsdp_enabled:
            self.reference = ReferencePolicy(self.model)
        self.rollout: Rollout | None = None
        self._resumed_from: str | None = None
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self.add_callback(_Course(self))

    # -- a step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The next optimiser step's prompts, and completions of them: drawn anew, or kept for an inner iteration.

        Returns:
            (a {"rollout", "iteration"} for each accumulation step, completion tokens of the step over all processes).
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        prompts = [item["prompt"] for batch in batches for item in batch]
        index, iteration = batches[0][0]["rollout"], batches[0][0]["iteration"]
        if self.rollout is None or self.rollout.index != index:
            self.rollout = self.draw(prompts, index)
        rollout, parts, first = self.rollout, [], 0
        for batch in batches:
            last = first + len(batch) * self.sampler.config.num_samples
            parts.append({"rollout": rollout.rows(slice(first, last)), "iteration": iteration})
            first = last
        tokens = self.accelerator.reduce(rollout.trained.sum(), reduction="sum").clamp(min=1)
        return parts, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This part's share of the step's loss.

        Scaled so that what Trainer averages over processes and accumulation steps is the sum over the step.

        Raises:
            ArithmeticError: it is NaN or infinite, on any process; raised on all.
        """
        rollout, iteration = inputs["rollout"], inputs["iteration"]
        args, k = self.args, self.sampler.config.num_samples
        log_probs = self._log_probs_of(model, rollout, iteration)
        if args.objective == "rgrl":
            weights = objectives.row_weights(rollout.rewards, k, args.weighting)
            loss = objectives.rgrl_loss(log_probs, rollout.trained, weights)
            shares = {}
        else:
            old = log_probs.detach() if rollout.old is None else rollout.old[:, iteration]
            tokens = rollout.trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss, shares = objectives.grpo_loss(
                log_probs,
                old,
                None if rollout.reference is None else rollout.reference[:, iteration],
                rollout.trained,
                objectives.advantages(rollout.rewards, k, args.scale_rewards),
                epsilon=args.epsilon,
                beta=args.beta,
                tokens=tokens,
            )
        mean = (log_probs.detach() * rollout.mask).sum() / rollout.mask.sum().clamp(min=1)
        parts = self.current_gradient_accumulation_steps
        told = torch.stack([mean, loss.detach().to(mean.dtype)])
        mean, whole = self.accelerator.reduce(told, reduction="mean").tolist()
        if not math.isfinite(whole):
            raise ArithmeticError(self._blamed(rollout, iteration, log_probs))
        for name, value in shares.items():
            self._metrics[name].append(self.accelerator.reduce(value, reduction="sum").item() * parts)
        self._metrics["log_prob"].append(mean)
        self._metrics["mask_seed"] = [rollout.mask_seeds[iteration]]
        loss = loss * self.accelerator.num_processes * parts
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    def _blamed(self, rollout: Rollout, iteration: int, log_probs: torch.Tensor) -> str:
        """What to say of a loss that is not finite."""
        said = f"the loss of step {self.state.global_step + 1} is NaN or infinite"
        terms = {"policy's": log_probs, "drawing policy's": rollout.old, "reference's": rollout.reference}
        for name, term in terms.items():
            term = term[:, iteration] if term is not None and term.dim() == 3 else term
            bad = [] if term is None else (rollout.mask & ~term.isfinite()).any(dim=1).nonzero().flatten().tolist()
            if bad:
                ids = rollout.tokens[bad[0], : rollout.start][rollout.attention[bad[0], : rollout.start]]
                prompt = self.sampler.tokenizer.decode(ids, skip_special_tokens=True)
                said += f": the {name} log-probabilities of a completion of {prompt!r:.80} are not finite"
                break
        return f"{said}; this step changed no parameter. Check the model's weights and dtype, and the learning rate"

    def check_gradients(self) -> None:
        """Refuse the optimiser's step on gradients that are not finite, before it is taken.

        Raises:
            ArithmeticError: they are not on some process; raised on all.
        """
        if self.accelerator.scaler is not None:  # it skips such steps and lowers its scale: they are expected
            return
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not found:  # DeepSpeed keeps them to itself
            return
        size = nn.utils.get_total_norm([g.to_local() if isinstance(g, DTensor) else g for g in found], torch.inf)
        bad = self.accelerator.reduce((~size.isfinite()).float(), reduction="sum").item()
        if bad:
            raise ArithmeticError(
                f"the gradient of step {self.state.global_step + 1} is NaN or infinite, its loss is finite; this step "
                "changed no parameter. Check the model's dtype, and the learning rate"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Forward and backward on the completions; drawing them is not counted."""
        tokens = int(inputs["rollout"].attention.sum())
        return 6 * tokens * sum(parameter.numel() for parameter in self.model.parameters())

    def _log_probs_of(self, model: nn.Module, rollout: Rollout, iteration: int) -> torch.Tensor:
        assert self.args.p_mask_prompt is not None
        canvas = mask_prompts(
            rollout.tokens,
            rollout.attention,
            rollout.start,
            self.sampler.model.mask_token_id,
            self.args.p_mask_prompt,
            rollout.mask_seeds[iteration],
            rollout.keys,
        )
        return self.log_probs(model, canvas, rollout.attention, rollout.start, rollout.completions, rollout.mask)

    def draw(self, prompts: list[Any], index: int) -> Rollout:
        """Completions of the step's prompts of this process, with the log-probabilities they start from."""
        args, begin = self.args, time.perf_counter()
        seeds = [derive_seed("mask", args.seed, index, iteration) for iteration in range(args.num_iterations)]
        config = self.sampler.config.replace(seed=derive_seed("draw", args.seed, index))
        rollout = sample_rollout(self.sampler, prompts, config, index=index, mask_seeds=seeds)
        if args.objective == "grpo":
            if len(seeds) > 1:
                rollout.old = self._frozen_log_probs(rollout)
            if self.reference is not None:
                with self.reference.in_place():
                    rollout.reference = self._frozen_log_probs(rollout)
        self._note(rollout, time.perf_counter() - begin)
        steps = args.sample_steps
        if steps and self.state.global_step % steps < args.num_iterations:
            self._show(prompts[0], rollout)
        return rollout

    @torch.no_grad()
    def _frozen_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """[R, I, L] without gradient and dropout, as many rows at a time as a step's forward takes."""
        rows = self.args.per_device_train_batch_size * self.sampler.config.num_samples
        with evaluating(self.model), self.compute_loss_context_manager():
            columns = [
                torch.cat(
                    [
                        self._log_probs_of(self.model_wrapped, rollout.rows(slice(first, first + rows)), iteration)
                        for first in range(0, len(rollout), rows)
                    ]
                )
                for iteration in range(len(rollout.mask_seeds))
            ]
        return torch.stack(columns, dim=1)

    # -- what is told of it ------------------------------------------------------------------------------------------

    def _note(self, rollout: Rollout, seconds: float) -> None:
        """Metrics of a rollout over all processes."""
        k = self.sampler.config.num_samples
        lengths = rollout.mask.sum(dim=1).float()
        weight = math.nan if rollout.entropy_weight is None else rollout.entropy_weight
        mean, deviation, best = objectives.group_statistics(rollout.rewards, k)
        scored = best.isfinite()
        sums = torch.stack(
            [
                mean.sum(),
                deviation.sum(),
                best[scored].sum(),
                lengths.view(-1, k).mean(dim=1).sum(),
                rollout.terminated.float().view(-1, k).mean(dim=1).sum(),
                torch.tensor(weight * len(mean), device=mean.device),
                scored.sum().float(),
                rollout.rewards.isfinite().logical_not().sum().float(),
                torch.tensor(float(len(mean)), device=mean.device),
            ]
        )
        *values, rewarded, missing, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if not rewarded:
            raise ArithmeticError(
                f"step {self.state.global_step + 1}: no completion has a finite reward (the last of this process's are "
                f"{rollout.rewards[-k:].tolist()}); this step changed no parameter. Check the reward model"
            )
        if missing:
            self._metrics["reward_missing"].append(missing)
            if self.is_world_process_zero():
                said = "step %d leaves out %d of %d completions: their rewards are not finite"
                logger.warning(said, self.state.global_step + 1, missing, count * k)
        names = (
            "reward",
            "reward_std",
            "reward_best",
            "completion_length",
            "completion_terminated",
            "entropy_weight",
        )
        for name, value in zip(names, values, strict=True):
            if not math.isnan(value):
                self._metrics[name].append(value / (rewarded if name.startswith("reward") else count))
        self._metrics["rollout_seconds"].append(seconds)

    def _show(self, prompt: Any, rollout: Rollout) -> None:
        """The first prompt's completions, as text, to the log and to samples.jsonl."""
        if not self.is_world_process_zero():
            return
        k = self.sampler.config.num_samples
        texts = [self.sampler.decode(row) for row in rollout.completions[:k].tolist()]
        rewards = rollout.rewards[:k].tolist()
        record = {
            "step": self.state.global_step,
            "prompt": prompt,
            "samples": [{"text": t, "reward": r} for t, r in zip(texts, rewards, strict=True)],
            "seed": rollout.seed,
            "mask_seeds": rollout.mask_seeds,
        }
        records.append(self.args.output_dir, records.SAMPLES, record)
        lines = [f"step {self.state.global_step}: {prompt!s:.200}"]
        lines += [f"  {r:+8.3f}  {t.strip()[:300]!r}" for t, r in zip(texts, rewards, strict=True)]
        logger.info("%s", "\n".join(lines))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was gathered since the last log, for whichever reporters are on."""
        if self._metrics and "loss" in logs:
            logs |= {name: math.fsum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            records.append(self.args.output_dir, records.LOG, {"step": self.state.global_step, **logs})

    # -- held-out prompts --------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rewards of unguided completions of the held-out prompts, drawn with the same random numbers each time.

        Args:
            eval_dataset: other prompts than the trainer's.

        Returns:
            {"eval_reward", "eval_reward_se", ...}: means over prompts and their standard errors, also logged; what each
            prompt earned goes to evaluations.jsonl. Where completions have no finite reward, "eval_reward_missing"
            says how many; they are left out.
        """
        prompts = list(self.eval_prompts if eval_dataset is None else eval_dataset)
        if not prompts:
            raise ValueError("no held-out prompts: give eval_prompts, or eval_dataset")
        begin, args = time.perf_counter(), self.args
        config = self.sampler.config.replace(
            method="none", num_samples=args.eval_samples, seed=derive_seed("evaluate", args.seed)
        )
        # Every process takes equally many, the last ones again if need be: under FSDP forwards are made together.
        size, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = math.ceil(len(prompts) / size)
        mine = [min(rank + i * size, len(prompts) - 1) for i in range(share)]
        rollout = sample_rollout(self.sampler, [prompts[i] for i in mine], config, index=-1, mask_seeds=[])
        columns = {
            "reward": rollout.rewards,
            "length": rollout.mask.sum(dim=1).float(),
            "terminated": rollout.terminated.float(),
        }
        if self.judges:
            texts = [self.sampler.decode(row) for row in rollout.completions.tolist()]
            asked = [_conversation(prompts[i]) for i in mine for _ in range(args.eval_samples)]
            for name, judge in self.judges.items():
                with torch.no_grad():
                    columns[name] = torch.tensor(judge.score_texts(asked, texts))
        per_prompt = {name: column.view(share, -1).tolist() for name, column in columns.items()}
        found = [{"prompt": i, **{name: per_prompt[name][j] for name in columns}} for j, i in enumerate(mine)]
        by_prompt = {entry["prompt"]: entry for entry in gather_object(found)}
        metrics: dict[str, float] = {}
        drawn = {name: [by_prompt[i][name] for i in range(len(prompts))] for name in columns}
        values = {name: [estimate(group).mean for group in groups] for name, groups in drawn.items()}
        for name, column in values.items():
            mean = estimate(column)
            if mean.n:
                metrics[f"{metric_key_prefix}_{name}"] = mean.mean
            missing = sum(len(group) - len(finite(group)) for group in drawn[name])
            if missing:
                metrics[f"{metric_key_prefix}_{name}_missing"] = missing
            if mean.error is not None and name not in ("length", "terminated"):
                metrics[f"{metric_key_prefix}_{name}_se"] = mean.error
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - begin
        if self.is_world_process_zero():
            records.append(args.output_dir, records.EVALUATIONS, {"step": self.state.global_step, **values})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _state_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"entrgi_state_{self.accelerator.process_index}.pt"

    def _reference_file(self, checkpoint: Path, sharded: bool) -> Path:
        part = f"_{self.accelerator.process_index}" if sharded else ""
        return checkpoint / f"entrgi_reference{part}.safetensors"

    def save_course(self, checkpoint: Path) -> None:
        """Add to a checkpoint what Trainer does not know of: the rollout in use and the reference policy.

        Ends with a mark that the checkpoint is whole: a run killed while it saves resumes from the one before.
        """
        state = {
            "processes": self.accelerator.num_processes,
            "rollout": None if self.rollout is None else self.rollout.state_dict(),
        }
        with records.saving(checkpoint):
            torch.save(state, self._state_file(checkpoint))
            if self.reference is not None and (self.reference.sharded or self.args.should_save):
                self.reference.save(self._reference_file(checkpoint, self.reference.sharded))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            records.complete(checkpoint)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        with records.saving(self.args.output_dir):
            super()._save_checkpoint(*args, **options)

    def begin_course(self) -> None:
        """Make what a run needs before its first step, and take up what :meth:`save_course` added to a checkpoint.

        Raises:
            ValueError: the checkpoint is of another trainer, of other trained parameters, or of another number of
                processes in the midst of a rollout's iterations.
        """
        if self._needs_reference and self.reference is None:  # FSDP has sharded the network in place by now
            self.reference = ReferencePolicy(self.model)
        if self._resumed_from is None:
            return
        checkpoint, processes = Path(self._resumed_from), self.accelerator.num_processes
        path = self._state_file(checkpoint)
        if not path.exists():
            raise ValueError(f"{checkpoint} has no {path.name}: expected a checkpoint of this trainer")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["processes"] == processes:
            if state["rollout"] is not None:
                self.rollout = Rollout.from_state(state["rollout"], self.args.device)
        elif self.args.num_iterations > 1:
            raise ValueError(
                f"{checkpoint} was written by {state['processes']} processes, this run has {processes}: expected as "
                "many, its rollout is shared out among them"
            )
        if self.reference is not None:
            self.reference.load(self._reference_file(checkpoint, self.reference.sharded))

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As Trainer's; True resumes from the newest checkpoint that was written to its end (or starts anew).

        Raises:
            UsageError: a file of that checkpoint is not what was saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(records.last_complete_checkpoint(self.args.output_dir) or "")
            if resume_from_checkpoint and self.is_world_process_zero():
                records.check_checkpoint(Path(resume_from_checkpoint))
            if self.is_world_process_zero():
                records.sweep(self.args.output_dir)
        self._resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint=self._resumed_from, **options)


class _Course(TrainerCallback):
    """What happens between steps: the reference follows, checkpoints are completed, records are cut back."""

    def __init__(self, trainer: GuidedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero:
            # A run that starts anew forgets one that was killed before its first checkpoint.
            records.rewind(args.output_dir, state.global_step or -1)
        self.trainer.begin_course()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer.check_gradients()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        reference, every = self.trainer.reference, args.ref_model_sync_steps
        if reference is not None and every and state.global_step % every == 0:
            reference.sync(args.ref_model_mixup_alpha)

    def on_save(self, args, state, control, **kwargs) -> None:
        self.trainer.save_course(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _with_adapter(network: nn.Module, peft_config: Any) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ImportError("training an adapter needs peft: pip install 'entrgi_kernels[train]'") from error
    if getattr(network, "is_quantized", False):
        network = peft.prepare_model_for_kbit_training(network)
    return peft.get_peft_model(network, peft_config)


def _conversation(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
