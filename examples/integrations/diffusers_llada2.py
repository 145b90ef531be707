"""diffusers' LLaDA2Pipeline, guided by one line. Needs `pip install 'entrgi_kernels[diffusers]'`.

python examples/integrations/diffusers_llada2.py
python examples/integrations/diffusers_llada2.py --model inclusionAI/LLaDA2.1-mini --reward ...
"""

import common
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

import entrgi_kernels


def main() -> tuple[float, float]:
    args = common.arguments(__doc__)
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    else:
        from standins import network

        model, tokenizer = network(in_place=True)

    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    reward_model, reward_tokenizer = common.reward(args.reward)
    entrgi_kernels.guide(pipe, reward_model, reward_tokenizer=reward_tokenizer, learning_rate=2.0, seed=args.seed)

    texts = common.PROMPTS[:1] * 4
    prompts = common.encode(tokenizer, texts)
    call = dict(gen_length=args.tokens, block_length=8, num_inference_steps=8, temperature=0.7, output_type="seq")
    return common.compare(pipe, lambda: pipe(input_ids=prompts.input_ids, **call).sequences, 0, args, texts)


if __name__ == "__main__":
    main()
