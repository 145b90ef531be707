"""DiffusionGemma without a reward, its arithmetic over the vocabulary on the fused operators, by one line.

    python examples/integrations/accelerate.py
    python examples/integrations/accelerate.py --model google/diffusiongemma-26B-A4B-it

Without --model the network is a tiny random one of the same architecture, so its texts mean nothing. With torch's own
draws the tokens are those of the unchanged model; with the default's keyed draws no probabilities are formed.
"""

import time

import common
import torch
from diffusion_gemma import load

import entrgi_kernels


def main() -> tuple[float, float]:
    """Shares of the tokens that stay the same: with torch's own draws, and with the model given back."""
    args = common.arguments(__doc__)
    model, tokenizer = load(args.model)
    inputs = common.encode(tokenizer, common.PROMPTS).to(model.device)

    def call(name: str) -> torch.Tensor:
        torch.manual_seed(args.seed)
        began = time.perf_counter()
        sequences = model.generate(**inputs, max_new_tokens=args.tokens, max_denoising_steps=6).sequences
        print(f"{name}: {time.perf_counter() - began:.1f} s")
        return sequences[:, inputs.input_ids.shape[1] :]

    plain = call("as it was")
    with entrgi_kernels.accelerate(model, draws="torch").entrgi:
        same = call("accelerated, torch's draws")
    entrgi_kernels.accelerate(model)
    for row in call("accelerated").tolist():
        print("  ", " ".join(tokenizer.decode(row, skip_special_tokens=True).split())[:100])
    model.entrgi.remove()
    shares = [float((one == plain).float().mean()) for one in (same, call("given back"))]
    print(f"tokens as before: {shares[0]:.0%} with torch's draws, {shares[1]:.0%} when given back")
    return shares[0], shares[1]


if __name__ == "__main__":
    main()
