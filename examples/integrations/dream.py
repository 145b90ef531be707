"""Dream's `diffusion_generate`, guided by one line: the fused loop behind the same signature.

    python examples/integrations/dream.py
    python examples/integrations/dream.py --model Dream-org/Dream-v0-Instruct-7B --hooks yes

With --hooks the call is left unpatched and handed the pair of hooks instead: Dream's own loop, our logits.
"""

import common

import entrgi_kernels
from entrgi_kernels import models
from entrgi_kernels.integrations import DreamHooks


def main() -> tuple[float, float]:
    args = common.arguments(__doc__, hooks="anything: guide by the pair of hooks")
    if args.model:
        wrapped, tokenizer = models.load(args.model, trust_remote_code=True)
        model = wrapped.module
    else:
        from standins import dream

        model, tokenizer = dream()
    reward_model, reward_tokenizer = common.reward(args.reward)
    inputs = common.encode(tokenizer, common.PROMPTS)

    def call(**hooks):
        return model.diffusion_generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=args.tokens,
            steps=args.tokens,
            temperature=0.7,
            alg="entropy",
            **hooks,
        )

    parts = (model, reward_model, tokenizer, reward_tokenizer)
    if args.hooks:
        hooks = DreamHooks(*parts, learning_rate=2.0, seed=args.seed, temperature=0.7, top_p=None)
        return common.report(call, lambda: call(**hooks), hooks.sampler, inputs.input_ids.shape[1], args)
    entrgi_kernels.guide(*parts, learning_rate=2.0, seed=args.seed)
    return common.compare(model, call, inputs.input_ids.shape[1], args)


if __name__ == "__main__":
    main()
