"""A block-diffusion loop on a key/value cache (SDAR, TraDo), guided by one line.

    python examples/integrations/block_diffusion.py
    python examples/integrations/block_diffusion.py --model JetLM/SDAR-4B-Chat --code SDAR/generate.py

The loop fills its cache with the prompt and with finished blocks, and hands the model one block at a time; which
canvas that block belongs to is followed from those calls.
"""

import common
import torch

import entrgi_kernels


def main() -> tuple[float, float]:
    args = common.arguments(__doc__, code="SDAR's generate.py; a small stand-in unless given")
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    else:
        from standins import CachedNetwork, network

        model, tokenizer = network(in_place=True, kind=CachedNetwork)
    mask = tokenizer.mask_token_id
    reward_model, reward_tokenizer = common.reward(args.reward)
    settings = dict(mask_token_id=mask, learning_rate=2.0, temperature=0.7, seed=args.seed)
    entrgi_kernels.guide(model, reward_model, tokenizer, reward_tokenizer, **settings)

    texts = common.PROMPTS[:1] * 8
    inputs = common.encode(tokenizer, texts).input_ids
    if args.code:
        generate = common.load_code(args.code, "sdar_generate").block_diffusion_generate

        def call() -> torch.Tensor:
            rows = [
                generate(model, {"input_ids": row[None]}, mask, gen_length=args.tokens, block_length=8, temperature=0.7)
                for row in inputs
            ]
            return torch.cat(rows)

    else:
        from standins import block_generate

        def call() -> torch.Tensor:
            return block_generate(model, inputs, mask, gen_length=args.tokens, temperature=0.7, block_length=8)

    return common.compare(model, call, inputs.shape[1], args, texts)


if __name__ == "__main__":
    main()
