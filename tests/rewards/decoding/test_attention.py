"""Attention as products against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from entrgi_kernels import rewards
from entrgi_kernels.rewards.decoding import attention
from entrgi_kernels.rewards.decoding.savings import ATTENTION


def tensors(rows=3, heads=6, shared=2, count=4, total=7, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, heads, count, width), (rows, shared, total, width), (rows, shared, total, width)
    made = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    mask = torch.rand(rows, 1, count, total, generator=generator) > 0.4
    mask[..., -1] = True
    return (*made, mask)


def own(query, key, value, mask, scale=None):
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_output_and_gradients(shared, scale):
    *inputs, mask = tensors(shared=shared)
    expected = own(*inputs, mask, scale)
    grad = torch.randn_like(expected)
    found, _ = attention.attend(torch.nn.Module(), *inputs, mask, scaling=scale)
    assert "Products" in found.grad_fn.next_functions[0][0].next_functions[0][0].name()
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad.transpose(1, 2)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_rounded_once():
    """Nearer to the float64 answer than torch's kernel, which rounds the probabilities as well."""
    *inputs, mask = tensors(count=32, total=64, dtype=torch.bfloat16)
    grad = torch.randn(3, 6, 32, 8).bfloat16()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = [own(*exact, mask), *torch.autograd.grad(own(*exact, mask), exact, grad.double())]
    theirs = [own(*inputs, mask), *torch.autograd.grad(own(*inputs, mask), inputs, grad)]
    ours = attention.attend(torch.nn.Module(), *inputs, mask)[0].transpose(1, 2)
    found = [ours, *torch.autograd.grad(ours, inputs, grad)]
    for mine, other, exactly in zip(found, theirs, wanted, strict=True):
        assert (mine - exactly).norm() <= (other - exactly).norm() and (mine - exactly).norm() < 3e-3 * exactly.norm()


@pytest.mark.parametrize("case", ["no gradient", "no mask", "float mask", "large", "dropout"])
def test_the_rest_is_left_to_torch(case, monkeypatch):
    *inputs, mask = tensors()
    settings = {}
    if case == "no gradient":
        inputs = [tensor.detach() for tensor in inputs]
    elif case == "no mask":
        mask, settings = None, {"is_causal": False}
    elif case == "float mask":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    elif case == "large":
        monkeypatch.setattr(attention, "MOST_SCORES", 3 * 6 * 4 * 7 - 1)
    else:
        settings = {"dropout": 1e-300}
    monkeypatch.setattr(attention.Products, "apply", None)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    found, _ = attention.attend(module, *inputs, mask, **settings)
    torch.testing.assert_close(found, own(*inputs, mask).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_in_use_for_as_long_as_a_reward_runs(tokenizer, classifier, monkeypatch):
    calls = []
    apply = attention.Products.apply
    monkeypatch.setattr(attention.Products, "apply", lambda *args: calls.append(len(args)) or apply(*args))
    reward = rewards.wrap(classifier(len(tokenizer), "Qwen3", attn_implementation="sdpa"), tokenizer)
    prepared = reward.prepare([[{"role": "user", "content": "Hello."}]])
    index, alive = torch.zeros(2, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)

    def run() -> int:
        calls.clear()
        response = torch.randn(2, 5, reward.embedding.weight.shape[1], requires_grad=True)
        reward.score_embeddings(prepared, index, response, alive).sum().backward()
        assert reward.module.config._attn_implementation == "sdpa"
        return len(calls)

    assert ATTENTION in reward.savings and run() == reward.module.config.num_hidden_layers
    reward.exact_savings = set(reward.savings) - {ATTENTION}
    assert run() == 0
    reward.exact_savings = "all"
    monkeypatch.setattr(type(reward.module.model.norm), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert reward.module.config._attn_implementation == "sdpa"
