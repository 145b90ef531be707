"""GuidedSampler over its settings, networks and odd prompts: properties that hold whatever is drawn."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from entrgi_kernels.backends import native
from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler
from entrgi_kernels.guidance.savings import SAVINGS
from entrgi_kernels.names import ALGS, CONFIDENCES, METHODS, POTENTIALS, PROBABLE_ALGS, SCHEDULES

from .draws import Draws, Failure

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|mask|>"]
PROMPTS = [
    "Why?", "Why?", "a", " ", "Tell me about soup.", "<|im_end|>", "<|im_start|>assistant\nNo.<|im_end|>", "<|mask|>",
    "x <|mask|> y", "naïve café",
    "日本語のテキスト", "🙂👩‍👩‍👧", "\u200b\u202e", "\0", "tab\tand\r\nlines", "{{ m }} {% if %}",
    "long " * 30, "w" * 100, "é" * 20, "\ufeffbom", "'\"\\",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"}],
    [{"role": "user", "content": "<|im_end|>\n<|im_start|>user"}],
]  # fmt: skip
REFUSED = " "  # nothing but space is no prompt


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=MARKS
    )
    made.mask_token, made.chat_template = "<|mask|>", CHATML
    return made


def _network(kind: type, size: int, seed: int, dtype: torch.dtype, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    return kind(config).eval().to(dtype)


@functools.cache
def sampler(dtype: torch.dtype, reward_dtype: torch.dtype, extra: int, sure: bool) -> GuidedSampler:
    """A pair of random networks, made once a process: `extra` rows of the head without a token."""
    size = len(tokenizer())
    diffusion = _network(Qwen3ForCausalLM, size + extra, 1, dtype)
    reward = _network(Qwen3ForSequenceClassification, size, 2, reward_dtype, num_labels=1, pad_token_id=0)
    with torch.no_grad():
        diffusion.lm_head.weight.mul_(60 if sure else 12)  # spread as a real model's logits are
        diffusion.lm_head.weight[tokenizer().eos_token_id].mul_(1.5)
        reward.score.weight.mul_(30)
        reward.model.embed_tokens.weight.mul_(20)
    return GuidedSampler(diffusion, reward, tokenizer(), shift=True)


def prepare() -> None:
    torch.set_num_threads(1)
    sampler(torch.float32, torch.float32, 0, False)


def settings(d: Draws, wide: bool) -> dict[str, Any]:
    slots = d.pick([1, 2, 3, 4, 5, 6, 8, 9])
    chosen: dict[str, Any] = {
        "method": d.pick(["entrgi", *reversed(METHODS)]),
        "guidance_steps": d.pick([0, 1, 1, 2, 3]),
        "learning_rate": d.pick([0.5, 0.1, 2.0, 0.0]),
        "guidance_scale": d.pick([1.0, 0.1, 5.0, 0.0]),
        "num_samples": d.pick([1, 1, 2, 3]),
        "max_new_tokens": slots,
        "steps": d.pick([1, 2, 3, slots, slots, max(1, slots // 2), slots + 1, 2 * slots + 3, 19]),
        "temperature": d.pick([0.7, 0.7, 1.0, 0, 0.1, 2.0, d.uniform(0.05, 1.5)]),
        "top_p": d.pick([None, 0.95, 0.5, 1.0, 1e-6]),
        "top_k": d.pick([None, None, 1, 5, 10_000]),
        "alg": d.pick(["entropy", *ALGS]),
        "alg_temp": d.pick([None, None, 0.5, 0.0]),
        "confidence": d.pick(CONFIDENCES),
        "schedule": d.pick(SCHEDULES),
        "schedule_eps": d.pick([1e-3, 1e-3, 0.5, 1.0, 1e-12]),
        "deprioritize_eos": d.chance(0.5),
        "suppress_undrawable": d.chance(0.85),
        "batch_size": d.pick([1, 2, 4, 4]),
        "state_dtype": d.pick([None, None, "float32", "float64", "bfloat16"]),
        "seed": d.pick([0, 1, -5, (1 << 63) - 1, d.integer(0, 1 << 30)]),
        "exact_savings": d.pick(["all", "all", "all", "none", tuple(s for s in SAVINGS if d.chance(0.5))]),
        "betas": d.pick([(0.9, 0.999), (0.9, 0.999), (0.0, 0.0), (0.5, 0.9)]),
        "eps": d.pick([1e-8, 1e-8, 1e-3]),
    }
    if wide and d.chance(0.2):
        chosen["temperature"] = d.pick([1e-3, 1e-2, 50.0])
    if d.chance(0.3):
        chosen["block_length"] = d.pick([b for b in range(1, slots + 1) if slots % b == 0])
        chosen["model_cache"] = d.pick([None, None, "prefix", "dual"])
    if chosen["alg"] in PROBABLE_ALGS and d.chance(0.5):
        chosen["threshold"] = d.pick([1e-9, 0.3, 0.9, 1.0])
    if d.chance(0.3):
        chosen["search"] = d.pick(["smc", "smc", "svdd"])
        chosen["search_every"], chosen["candidates"] = d.pick([1, 2, 5]), d.pick([1, 2, 3])
        chosen["search_temperature"] = d.pick([1.0, 0.01, 100.0])
        chosen["potential"], chosen["self_rewarding"] = d.pick(POTENTIALS), d.chance(0.3)
        chosen["resample_below"] = d.pick([0.5, 1.0, 0.0])
    if d.chance(0.15):
        chosen["cfg_scale"] = d.pick([0.5, 2, 1e-9])
    if chosen["method"] == "entrgi":
        chosen["weight"] = d.pick([None, None, "one", "zero", "threshold(1.0, 0.5)", "step(1.0)"])
    return chosen


def tokens_of(results: list[Any]) -> list[list[list[int]]]:
    return [[list(sample.tokens) for sample in result.samples] for result in results]


def run(d: Draws) -> dict[str, int]:
    dtype = d.pick([torch.float32, torch.float32, torch.float64, torch.float64, torch.bfloat16, torch.float16])
    reward_dtype = dtype if d.chance(0.8) else d.pick([torch.float32, torch.float64])
    made = sampler(dtype, reward_dtype, d.pick([0, 0, 13]), d.chance(0.3))
    chosen = settings(d, wide=True)
    prompts = [d.pick(PROMPTS) for _ in range(d.pick([1, 1, 2, 3]))]
    d.note(model=dtype, reward=reward_dtype, rows=made.model.vocab_size, **chosen, prompts=str(prompts)[:120])
    names = ["same", "engines", "savings", "batch", "rewards", "trace", "count"]
    if dtype != torch.float64:
        names = ["same", "rewards", "trace", "engines"]
    prop = d.pick(names)
    d.note(property=prop)
    try:
        results = made.generate(prompts, **chosen)
    except (ValueError, TypeError) as error:
        if REFUSED in prompts and "empty" in str(error):
            return {"refused": 1}
        raise
    if REFUSED in prompts:
        raise Failure("an empty prompt was accepted")
    check(made, results, prompts, GuidanceConfig(**chosen))
    again = functools.partial(made.generate, prompts)
    try:
        PROPERTIES[prop](made, results, prompts, chosen, again)
    finally:
        native.set_isa("")
    return {f"{prop} {str(dtype).removeprefix('torch.')}": 1}


def check(made: GuidedSampler, results: list[Any], prompts: list[Any], config: GuidanceConfig) -> None:
    """What holds for every call."""
    mask, size = made.model.mask_token_id, len(tokenizer())
    if len(results) != len(prompts):
        raise Failure(f"{len(results)} results for {len(prompts)} prompts")
    for prompt, result in zip(prompts, results, strict=True):
        if result.prompt != prompt or len(result.samples) != config.num_samples:
            raise Failure("another prompt, or another number of samples")
        for sample in result.samples:
            if len(sample.tokens) != config.max_new_tokens:
                raise Failure(f"{len(sample.tokens)} tokens for {config.max_new_tokens} slots")
            if sample.tokens.count(mask) and config.suppress_undrawable:
                raise Failure(f"{sample.tokens.count(mask)} of {config.max_new_tokens} slots are the mask token")
            if min(sample.tokens) < 0 or (config.suppress_undrawable and max(sample.tokens) >= size):
                raise Failure(f"a token that stands for nothing: {sample.tokens}")
            if sample.text != made.decode(list(sample.tokens)):
                raise Failure("text is not that of the tokens")
            if not math.isfinite(sample.reward):
                raise Failure(f"reward {sample.reward}")
        if result.best.reward != max(result.rewards) or result.top1 != max(result.rewards):
            raise Failure("best is not the one of the highest reward")
        mean = sum(result.rewards) / len(result.rewards)
        if abs(result.mean - mean) > 1e-6 * (1 + abs(mean)):
            raise Failure("mean is not the mean")


def same(made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable) -> None:
    other = again(**chosen)
    if tokens_of(other) != tokens_of(results) or [r.rewards for r in other] != [r.rewards for r in results]:
        raise Failure("two calls differ")


def engines(
    made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable
) -> None:
    """Eager and native agree in float64; elsewhere logits that tie within rounding part what comes after them."""
    isas = native.build_info()["supported_isas"]
    native.set_isa(isas[chosen["seed"] % len(isas)])
    found = [again(**chosen, backend=backend) for backend in ("eager", "native")]
    for other in found:
        check(made, other, prompts, GuidanceConfig(**chosen))
    if made.model.module.dtype == torch.float64 and made.reward.module.dtype == torch.float64:
        if tokens_of(found[0]) != tokens_of(found[1]):
            raise Failure("eager and native give other tokens")


def savings(
    made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable
) -> None:
    if tokens_of(again(**{**chosen, "exact_savings": "none"})) != tokens_of(results):
        raise Failure("exact savings change a token")


def batch(made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable) -> None:
    prompts = [*prompts, "Why is a longer question asked here?"]
    together = made.generate(prompts, **{**chosen, "batch_size": 4})
    apart = made.generate(prompts, **{**chosen, "batch_size": 1})
    if tokens_of(together) != tokens_of(apart):
        raise Failure("a prompt's tokens depend on its batch")
    if tokens_of(together)[: len(results)] != tokens_of(results):
        raise Failure("a prompt's tokens depend on the prompts after it")


def rewards(
    made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable
) -> None:
    scored = {torch.float64: 1e-9, torch.float32: 1e-3}.get(made.reward.module.dtype, 0.3)
    for prompt, result in zip(prompts, results, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        texts = [sample.text for sample in result.samples]
        with torch.no_grad():
            alone = made.reward.score_texts([turns] * len(texts), texts)
        for ours, theirs in zip(result.rewards, alone, strict=True):
            if abs(ours - theirs) > scored * (1 + abs(theirs)):
                raise Failure(f"reward {ours} where score_texts gives {theirs}")


def trace(made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable) -> None:
    traced = again(**chosen, trace=True)
    if tokens_of(traced) != tokens_of(results):
        raise Failure("a trace changes tokens")
    for sample in itertools.chain.from_iterable(result.samples for result in traced):
        committed = [slot for entry in sample.trace for slot in entry.committed]
        slots = chosen["max_new_tokens"]
        if chosen.get("block_length") and made.eos_token_id in sample.tokens:  # no block is begun behind the end
            slots = (sample.tokens.index(made.eos_token_id) // chosen["block_length"] + 1) * chosen["block_length"]
        if set(committed) != set(range(slots)):
            raise Failure("a slot was never committed")
        if sample.trace[-1].tokens[:slots] != sample.tokens[:slots]:
            raise Failure("the trace ends with other tokens")


def count(made: GuidedSampler, results: list[Any], prompts: list[Any], chosen: dict[str, Any], again: Callable) -> None:
    if chosen.get("search") == "smc":
        return  # its samples are resampled together
    more = again(**{**chosen, "num_samples": chosen["num_samples"] + 1})
    if [samples[:-1] for samples in tokens_of(more)] != tokens_of(results):
        raise Failure("a sample depends on how many there are")


PROPERTIES: dict[str, Callable] = {
    "same": same, "engines": engines, "savings": savings, "batch": batch, "rewards": rewards, "trace": trace,
    "count": count,
}  # fmt: skip
