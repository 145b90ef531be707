"""A sampler of dllm, guided by one line: `.sample(inputs, config)` as ever.

python examples/integrations/dllm.py
python examples/integrations/dllm.py --sampler dllm.core.samplers:MDLMSampler --model GSAI-ML/LLaDA-8B-Instruct
"""

import importlib

import common

import entrgi_kernels
from entrgi_kernels import models


def main() -> tuple[float, float]:
    args = common.arguments(__doc__, sampler="module:Class of an installed dllm; a small stand-in unless given")
    if args.sampler:
        module, name = args.sampler.split(":")
        Sampler = getattr(importlib.import_module(module), name)
    else:
        from standins import Sampler
    if args.model:
        wrapped, tokenizer = models.load(args.model, trust_remote_code=True)
        model = wrapped.module
    else:
        from standins import network

        model, tokenizer = network(in_place=True)

    sampler = Sampler(model=model, tokenizer=tokenizer)
    reward_model, reward_tokenizer = common.reward(args.reward)
    entrgi_kernels.guide(sampler, reward_model, reward_tokenizer=reward_tokenizer, learning_rate=2.0, seed=args.seed)

    texts = common.PROMPTS[:1] * 4
    inputs = common.encode(tokenizer, texts).input_ids.tolist()
    call = dict(max_new_tokens=args.tokens, steps=args.tokens, temperature=0.7)
    return common.compare(sampler, lambda: sampler.sample(inputs, **call), len(inputs[0]), args, texts)


if __name__ == "__main__":
    main()
