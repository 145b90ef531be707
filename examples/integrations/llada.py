"""LLaDA's `generate(model, prompt, ...)`, guided by one line.

    python examples/integrations/llada.py
    python examples/integrations/llada.py --model GSAI-ML/LLaDA-8B-Instruct --code LLaDA/generate.py

The function is used as it is: it calls `model(x).logits`, and the logits of the masked positions are what is guided.
"""

import common

import entrgi_kernels
from entrgi_kernels import models


def main() -> tuple[float, float]:
    args = common.arguments(__doc__, code="LLaDA's generate.py; a small stand-in unless given")
    if args.model:
        wrapped, tokenizer = models.load(args.model, trust_remote_code=True)
        model = wrapped.module
    else:
        from standins import network

        model, tokenizer = network(in_place=True)
    if args.code:
        generate = common.load_code(args.code, "llada_generate").generate
    else:
        from standins import llada_generate as generate

    reward_model, reward_tokenizer = common.reward(args.reward)
    entrgi_kernels.guide(model, reward_model, tokenizer, reward_tokenizer, learning_rate=2.0, seed=args.seed)

    inputs = common.encode(tokenizer, common.PROMPTS)
    call = dict(steps=args.tokens, gen_length=args.tokens, block_length=args.tokens // 2, temperature=0.7)
    return common.compare(
        model,
        lambda: generate(model, inputs.input_ids, inputs.attention_mask, mask_id=model.config.mask_token_id, **call),
        inputs.input_ids.shape[1],
        args,
    )


if __name__ == "__main__":
    main()
