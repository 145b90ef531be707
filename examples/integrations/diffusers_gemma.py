"""diffusers' DiffusionGemmaPipeline, guided by one line. Needs `pip install 'entrgi_kernels[diffusers]'`.

    python examples/integrations/diffusers_gemma.py
    python examples/integrations/diffusers_gemma.py --model google/diffusiongemma-26B-A4B-it --reward ...

Without --model the network is a tiny random one of the same architecture, so its texts mean nothing; rewards do rise.
"""

import common
from diffusers import DiffusionGemmaPipeline, EntropyBoundScheduler
from diffusion_gemma import load

import entrgi_kernels


def main() -> tuple[float, float]:
    args = common.arguments(__doc__)
    model, processor = load(args.model)
    pipe = DiffusionGemmaPipeline(model=model, scheduler=EntropyBoundScheduler(), processor=processor)
    pipe.set_progress_bar_config(disable=True)
    reward_model, reward_tokenizer = common.reward(args.reward)
    entrgi_kernels.guide(pipe, reward_model, reward_tokenizer=reward_tokenizer, learning_rate=3.0, seed=args.seed)

    call = dict(gen_length=args.tokens, num_inference_steps=6, output_type="seq")
    return common.compare(pipe, lambda: pipe(common.PROMPTS[:1] * 4, **call).sequences, 0, args, common.PROMPTS[:1] * 4)


if __name__ == "__main__":
    main()
