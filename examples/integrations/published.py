"""The published test-time script, sped up unedited by one line: its module's `optimize_logits` is replaced.

    python examples/integrations/published.py
    python examples/integrations/published.py --code entrgi/main_expts

Both run the script's own `generate`; the texts are the same but for their random draws, the time is not. Without
--code a module of the same interface stands in, which guides the plain way: every trajectory by itself.
"""

import sys
import time
from types import SimpleNamespace

import common
import torch
from standins import network

import entrgi_kernels


def main() -> tuple[float, float]:
    args = common.arguments(__doc__, code="the script's folder; a small stand-in unless given")
    if args.code:
        sys.path.insert(0, args.code)
        script = common.load_code(f"{args.code}/entrgi.py", "published_script")
    else:
        import standin_script as script

    model, tokenizer = network()
    reward_model, reward_tokenizer = common.reward(args.reward)
    reward_model.requires_grad_(False)
    mapping = torch.arange(model.config.vocab_size)  # the built-in models share a vocabulary
    table = reward_model.get_input_embeddings().weight.detach()
    settings = SimpleNamespace(
        K=1, T=args.tokens, M=3, eta=2.0, max_new_tokens=args.tokens, temperature=0.7, top_p=0.95, top_k=None,
        alg="entropy", alg_temp=None, deprioritize_eos=True, use_entrgi=True, use_aps=False, device=torch.device("cpu"),
    )  # fmt: skip
    ids = dict(mask_id=model.config.mask_token_id, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)

    means = []
    for name in ("as published", "guided here"):
        if name == "guided here":
            entrgi_kernels.guide(script)
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        results = script.generate(
            model, tokenizer, reward_model, reward_tokenizer, mapping, table, common.PROMPTS, settings, ids
        )
        means.append(sum(result["avgN_reward"] for result in results) / len(results))
        print(f"{name}: mean reward {means[-1]:+.3f}, {time.perf_counter() - start:.1f} s")
        for result in results:
            print(f"  {result['top1_reward']:+.3f}  {' '.join(result['best_response'].split())[:100]}")
    script.entrgi.remove()
    return means[0], means[1]


if __name__ == "__main__":
    main()
