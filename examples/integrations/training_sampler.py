"""The published training sampler, sped up by one line: the trainer goes on calling `.sample(inputs, config)`.

    python examples/integrations/training_sampler.py
    python examples/integrations/training_sampler.py --sampler dllm.pipelines.rl.rgrl.sampler:RgrlDreamSampler

Both calls are guided, the first by the sampler's own loop: the texts are the same but for their random draws, the time
is not. In the published trainer it is `entrgi_kernels.guide(trainer.sampler)`.
"""

import importlib

import common
import torch
from standins import network

import entrgi_kernels


def main() -> tuple[float, float]:
    args = common.arguments(__doc__, sampler="module:Class of an installed dllm; a small stand-in unless given")
    module, name = (args.sampler or "standin_training:Sampler").split(":")
    module = importlib.import_module(module)
    Sampler, Settings = getattr(module, name), getattr(module, f"{name}Config")

    model, tokenizer = network()
    reward_model, reward_tokenizer = common.reward(args.reward)
    reward_model.requires_grad_(False)
    sampler = Sampler(
        model=model,
        tokenizer=tokenizer,
        reward_model=reward_model,
        reward_tokenizer=reward_tokenizer,
        token_mapping=torch.arange(model.config.vocab_size),  # the built-in models share a vocabulary
        mapped_embeds=reward_model.get_input_embeddings().weight.detach(),
    )
    entrgi_kernels.guide(sampler, seed=args.seed)

    texts = [text for text in common.PROMPTS[:2] for _ in range(2)]  # num_generations of each, side by side
    inputs = common.encode(tokenizer, texts)
    prompts = [ids[real.bool()] for ids, real in zip(inputs.input_ids, inputs.attention_mask, strict=True)]
    config = Settings(
        M=3, eta=2.0, num_generations=2, max_new_tokens=args.tokens, steps=args.tokens, temperature=0.7, top_p=0.95,
        top_k=None, alg="entropy",
    )  # fmt: skip
    # Only there to score what both calls return.
    judge = entrgi_kernels.GuidedSampler(model, reward_model, tokenizer, reward_tokenizer)

    def own() -> torch.Tensor:
        with sampler.entrgi.paused():
            return sampler.sample(prompts, config)

    width = inputs.input_ids.shape[1]
    return common.report(own, lambda: sampler.sample(prompts, config), judge, width, args, texts)


if __name__ == "__main__":
    main()
