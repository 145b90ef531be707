"""transformers' DiffusionGemma.generate, guided by one line: uniform noise, self-conditioning, canvas after canvas.

    python examples/integrations/diffusion_gemma.py
    python examples/integrations/diffusion_gemma.py --model google/diffusiongemma-26B-A4B-it --reward ...

Without --model the network is a tiny random one of the same architecture, so its texts mean nothing; rewards do rise.
"""

import common

import entrgi_kernels


def load(path: str | None):
    """(model, tokenizer)."""
    if path is None:
        from standins import diffusion_gemma

        from entrgi.tiny import load_diffusion

        _, tokenizer = load_diffusion()
        return diffusion_gemma(tokenizer, canvas_length=16), tokenizer
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    return DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)


def main() -> tuple[float, float]:
    args = common.arguments(__doc__)
    model, tokenizer = load(args.model)
    reward_model, reward_tokenizer = common.reward(args.reward)
    entrgi_kernels.guide(model, reward_model, tokenizer, reward_tokenizer, learning_rate=3.0, seed=args.seed)

    inputs = common.encode(tokenizer, common.PROMPTS)
    return common.compare(
        model,
        lambda: model.generate(**inputs, max_new_tokens=args.tokens, max_denoising_steps=6).sequences,
        inputs.input_ids.shape[1],
        args,
    )


if __name__ == "__main__":
    main()
