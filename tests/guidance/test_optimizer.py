"""LogitOptimizer against autograd and torch.optim.Adam on the method as DESIGN states it."""

import math

import pytest
import torch

from entrgi_kernels.guidance import LogitOptimizer, StepWeight

TAU, LR, STEPS = 0.7, 0.5, 3


def problem(n=6, v=41, d=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(n, v, generator=generator, dtype=dtype) * 2
    table = torch.randn(v, d, generator=generator, dtype=dtype)
    tokens = torch.randint(v, (STEPS, n), generator=generator)
    probe = torch.randn(n, d, generator=generator, dtype=dtype)
    return phi, table, tokens, probe


def reward(embedding, probe):
    """Something curved, so that the gradient depends on the value of the blend."""
    return (torch.tanh(embedding) * probe).sum(-1) - 0.1 * (embedding**2).sum(-1)


def reference(phi, table, tokens, probe, weight, lr=LR):
    """The method with autograd through a materialised softmax and torch's own Adam."""
    phi = phi.clone().requires_grad_()
    adam = torch.optim.Adam([phi], lr=lr)
    for hard_tokens in tokens:
        q = torch.softmax(phi, -1)
        entropy = -(q * q.log()).sum(-1)
        w = weight(entropy.detach())[:, None]
        soft = torch.softmax(phi / TAU, -1) @ table
        blend = soft + (w * (table[hard_tokens] - soft)).detach()
        adam.zero_grad()
        (-reward(blend, probe).sum()).backward()
        adam.step()
    return phi.detach()


WEIGHTS = {
    "entropy": lambda h: h / math.log(41),
    "linear": lambda h: h / math.log(41),
    "one": torch.ones_like,
    "zero": torch.zeros_like,
    "step(2.5)": lambda h: (h >= 2.5).to(h.dtype),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_three_steps_equal_autograd_and_adam(weight):
    phi, table, tokens, probe = problem()
    expected = reference(phi, table, tokens, probe, WEIGHTS[weight])
    optimizer = LogitOptimizer(phi.clone(), table, lr=LR, temperature=TAU, weight=weight, backend="eager")
    for hard_tokens in tokens:
        blend = optimizer.embed(tokens=hard_tokens)
        (-reward(blend.embedding, probe).sum()).backward()
        optimizer.step(blend.embedding.grad)
    torch.testing.assert_close(optimizer.phi, expected, rtol=1e-12, atol=1e-12)


def test_auto_backend_agrees_in_float32():
    phi, table, tokens, probe = problem(dtype=torch.float64)
    expected = reference(phi, table, tokens, probe, WEIGHTS["entropy"])
    optimizer = LogitOptimizer(phi.float(), table.float(), lr=LR, temperature=TAU)
    for hard_tokens in tokens:
        blend = optimizer.embed(tokens=hard_tokens)
        (-reward(blend.embedding, probe.float()).sum()).backward()
        optimizer.step(blend.embedding.grad)
    torch.testing.assert_close(optimizer.phi.double(), expected, rtol=2e-4, atol=2e-4)


def test_phi_is_moved_in_place_and_without_state_the_first_step_is_the_same():
    phi, table, tokens, probe = problem()
    results = []
    for keep in (True, False):
        moved = phi.clone()
        optimizer = LogitOptimizer(moved, table, lr=LR, temperature=TAU, keep_state=keep)
        blend = optimizer.embed(tokens=tokens[0])
        optimizer.step(torch.autograd.grad(-reward(blend.embedding, probe).sum(), blend.embedding)[0])
        assert optimizer.phi.data_ptr() == moved.data_ptr() and not torch.equal(moved, phi)
        results.append(moved)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_blend_written_into_a_rewards_input_is_the_blend():
    phi, table, tokens, probe = problem()
    results = []
    for index in (None, torch.tensor([3, 9, 0, 7, 4, 5])):
        optimizer = LogitOptimizer(phi.clone(), table, lr=LR, temperature=TAU)
        inputs = torch.zeros(10, 5, dtype=torch.float64)
        for hard_tokens in tokens:
            if index is None:
                blend = optimizer.embed(hard_tokens)
                rows = blend.embedding
            else:
                blend = optimizer.embed(hard_tokens, out=inputs, index=index)
                assert blend.embedding.data_ptr() == inputs.data_ptr() and not inputs.requires_grad
                rows = blend.embedding[index]
            (-reward(rows, probe).sum()).backward()
            optimizer.step(blend.embedding.grad if index is None else blend.embedding.grad[index])
        results.append(optimizer.phi)
    assert torch.equal(*results)


def test_draws_advance_and_are_reproducible():
    phi, table, _, probe = problem(v=400)
    draws = []
    for _ in range(2):
        optimizer = LogitOptimizer(phi.clone(), table.new_zeros(400, 5), temperature=TAU, top_p=0.99, seed=5, counter=7)
        draws.append([optimizer.embed().tokens.tolist() for _ in range(3)])
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


def test_callable_weight_and_argmax():
    phi, table, tokens, _ = problem()
    optimizer = LogitOptimizer(phi, table, weight=StepWeight(0.0))
    with pytest.raises(RuntimeError, match="embed"):
        optimizer.argmax  # noqa: B018
    blend = optimizer.embed(tokens=tokens[0])
    torch.testing.assert_close(blend.embedding.detach(), table[tokens[0]])
    assert torch.equal(optimizer.argmax, phi.argmax(-1))


def test_misuse_is_refused():
    phi, table, tokens, probe = problem()
    with pytest.raises(ValueError, match="requires grad"):
        LogitOptimizer(phi.clone().requires_grad_(), table)
    with pytest.raises(TypeError, match="float16: expected float64, float32 or bfloat16"):
        LogitOptimizer(phi, table, state_dtype=torch.float16)
    optimizer = LogitOptimizer(phi, table, keep_state=False)
    with pytest.raises(RuntimeError, match="embed"):
        optimizer.step(probe)
    optimizer.embed(tokens[0])
    optimizer.step(probe)
    with pytest.raises(RuntimeError, match="embed"):
        optimizer.step(probe)
    optimizer.embed(tokens[1])
    with pytest.raises(RuntimeError, match="keep_state=False"):
        optimizer.step(probe)
    optimizer = LogitOptimizer(phi, table)
    for number in range(2):
        optimizer.embed(tokens[number])
        optimizer.step(probe, last=number == 1)
    optimizer.embed(tokens[2])
    with pytest.raises(RuntimeError, match="last=True"):
        optimizer.step(probe)


PHI, TABLE = torch.zeros(3, 7), torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"phi": None}, TypeError, "phi is NoneType: expected a torch.Tensor"),
        ({"phi": PHI.long()}, TypeError, "phi is torch.int64"),
        ({"phi": PHI[:1].expand(3, 7)}, ValueError, "phi of shape .* has strides"),
        ({"table": None}, TypeError, "table is NoneType"),
        ({"table": TABLE[:6]}, ValueError, "table has 6 rows but phi has 7 columns"),
        ({"lr": -1}, ValueError, "lr=-1.0: expected"),
        ({"lr": "fast"}, TypeError, "lr='fast'"),
        ({"betas": 0.9}, TypeError, "betas=0.9"),
        ({"eps": 0}, ValueError, "eps=0"),
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"top_k": 0}, ValueError, "top_k=0"),
        ({"top_p": 2}, ValueError, "top_p=2"),
        ({"weight": 0.5}, TypeError, "weight is float"),
        ({"seed": 1 << 64}, ValueError, f"seed={1 << 64}"),
        ({"seed": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"seed is a torch.int64 tensor of shape \[2, 3\]"),
        ({"counter": None}, ValueError, "counter=None"),
        ({"keys": torch.zeros(2, dtype=torch.int64)}, ValueError, r"keys has shape \[2\]"),
        ({"state_dtype": "float8"}, TypeError, "moments in 'float8'"),
        ({"keep_state": 1}, TypeError, "keep_state=1"),
        ({"memory": {}}, TypeError, "memory is dict"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
    ],
)
def test_bad_arguments_are_refused_before_a_reward_runs(changes, error, words):
    with pytest.raises(error, match=words):
        LogitOptimizer(**({"phi": PHI.clone(), "table": TABLE} | changes))


def test_bad_gradients_rows_and_ends():
    optimizer = LogitOptimizer(PHI.clone(), TABLE, seed=torch.zeros(1, 2, dtype=torch.int64))
    grad = torch.zeros_like(optimizer.embed().embedding)
    with pytest.raises(TypeError, match="grad is NoneType"):
        optimizer.step(None)
    with pytest.raises(TypeError, match="last=1"):
        optimizer.step(grad, last=1)
    with pytest.raises(ValueError, match=r"grad has shape \[2, 4\]: expected \[3, 4\]"):
        optimizer.moved_rows(grad[:2], torch.tensor([0]))
    with pytest.raises(TypeError, match="rows="):
        optimizer.moved_rows(grad, [0])
    optimizer.step(grad)
    with pytest.raises(ValueError, match="seed has 1 rows"):
        optimizer.embed()


def test_numbers_in_tensors():
    moved = []
    for make in (float, torch.tensor):
        numbers = {"lr": make(0.25), "temperature": make(0.75), "top_p": make(0.5)}
        optimizer = LogitOptimizer(torch.arange(21.0).view(3, 7) % 5, torch.arange(28.0).view(7, 4) % 3, **numbers)
        optimizer.step(optimizer.embed().embedding.detach())
        moved.append(optimizer.phi)
    assert torch.equal(*moved)
