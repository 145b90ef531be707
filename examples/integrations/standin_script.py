"""A stand-in for the published test-time script: its interface (`generate` calls `optimize_logits` by name), in small.

The loop is the plain one: every trajectory by itself, and one look at the device for every token.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


def optimize_logits(
    base_logits, mask_indices, trajectories, max_prompt_len, trajectory_pad_lens, B, K, reward_model, caches,
    token_mapping, mapped_embeds, reward_embed_layer, eos_token_id, pad_token_id, cfg,
):  # fmt: skip
    """(phi moved by M Adam steps, phi as it was), the rows of all trajectories one below the other."""
    masked = torch.stack(mask_indices)
    phi = base_logits[masked].detach().clone().requires_grad_()
    before, optimizer = phi.detach().clone(), torch.optim.Adam([phi], lr=cfg.eta)
    for _ in range(cfg.M):
        optimizer.zero_grad()
        log_q = phi.log_softmax(-1)
        weight = (-(log_q.exp() * log_q).sum(-1) / torch.tensor(float(phi.shape[1])).log()).detach()
        weight = weight if cfg.use_entrgi else torch.full_like(weight, float(cfg.use_aps))
        soft = (phi / cfg.temperature).softmax(-1) @ mapped_embeds
        hard = mapped_embeds[torch.multinomial(filtered(phi.detach(), cfg), 1)[:, 0]]
        blend = soft + weight[:, None] * (hard - soft).detach()
        tokens = trajectories.index_put(tuple(masked.nonzero(as_tuple=True)), phi.detach().argmax(-1))
        total = 0.0
        for row in range(B * K):
            cache, at, here = caches[row // K], int(masked[:row].sum()), masked[row, max_prompt_len:]
            response = mapped_embeds[trajectories[row, max_prompt_len:]]
            response = response.index_put((here.nonzero()[:, 0],), blend[at : at + int(here.sum())])
            ended, alive = False, []
            for token in tokens[row, max_prompt_len:].tolist():
                alive.append(not ended and token != pad_token_id)
                ended = ended or token == eos_token_id
            sequence = torch.cat([cache.prefix_embeds[0], response, cache.suffix_embeds[0]])[None]
            attention = torch.ones(1, sequence.shape[1], dtype=torch.long)
            start = cache.prefix_embeds.shape[1]
            attention[0, start : start + len(alive)] = torch.tensor(alive).long()
            total = total + reward_model(inputs_embeds=sequence, attention_mask=attention).logits[0, 0]
        (-total).backward()
        optimizer.step()
    return phi.detach(), before


def filtered(phi, cfg):
    """Probabilities under temperature, top-p and top-k."""
    p, order = (phi / cfg.temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p > cfg.top_p, 0)
    if cfg.top_k is not None:
        p[:, cfg.top_k :] = 0
    return torch.zeros_like(p).scatter(1, order, p)


def generate(model, tokenizer, reward, reward_tokenizer, mapping, mapped, prompts, cfg, ids):
    """A result a prompt; at each step the surest masked tokens are committed, T steps in all."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    width = max(map(len, encoded))
    rows = [[ids["pad_id"]] * (width - len(row)) + row for row in encoded for _ in range(cfg.K)]
    pads = torch.tensor([width - len(row) for row in encoded for _ in range(cfg.K)])
    x = torch.nn.functional.pad(torch.tensor(rows), (0, cfg.max_new_tokens), value=ids["mask_id"])
    real = torch.arange(x.shape[1]) >= pads[:, None]
    caches = [reward_cache(reward, reward_tokenizer, prompt) for prompt in prompts]
    for step in range(cfg.T):
        with torch.no_grad():
            logits = model(x, attention_mask=real.long()).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        masked = [row == ids["mask_id"] for row in x]
        phi, _ = optimize_logits(
            logits, masked, x, width, pads, len(prompts), cfg.K, reward, caches, mapping, mapped,
            reward.get_input_embeddings(), ids["eos_id"], ids["pad_id"], cfg,
        )  # fmt: skip
        if phi is None:
            break
        p, at = filtered(phi, cfg), 0
        drawn = torch.multinomial(p, 1)[:, 0]
        for row, mask in enumerate(masked):
            here = slice(at, at + int(mask.sum()))
            at = here.stop
            sure = p[here].gather(1, drawn[here, None])[:, 0]
            chosen = sure.topk(-(-len(sure) // (cfg.T - step))).indices
            x[row, mask.nonzero()[:, 0][chosen]] = drawn[here][chosen]
    texts = tokenizer.batch_decode([row[width:].tolist() for row in x], skip_special_tokens=True)
    values = [_value(reward, reward_tokenizer, prompts[i // cfg.K], text) for i, text in enumerate(texts)]
    results = []
    for i in range(0, len(texts), cfg.K):
        best = max(range(i, i + cfg.K), key=values.__getitem__)
        results.append(
            {
                "best_response": texts[best],
                "top1_reward": values[best],
                "all_responses": texts[i : i + cfg.K],
                "all_rewards": values[i : i + cfg.K],
                "avgN_reward": sum(values[i : i + cfg.K]) / cfg.K,
            }
        )
    return results


def _turns(tokenizer, prompt, response):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def reward_cache(reward, tokenizer, prompt):
    """Embeddings of the reward template before and after the response."""
    parts = _turns(tokenizer, prompt, "RESPONSE").split("RESPONSE")
    with torch.no_grad():
        prefix, suffix = (
            reward.get_input_embeddings()(tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids)
            for part in parts
        )
    return SimpleNamespace(prefix_embeds=prefix, suffix_embeds=suffix, user_content=prompt)


@torch.no_grad()
def _value(reward, tokenizer, prompt, response):
    ids = tokenizer(_turns(tokenizer, prompt, response), return_tensors="pt", add_special_tokens=False)
    return reward(**ids).logits[0, 0].item()
