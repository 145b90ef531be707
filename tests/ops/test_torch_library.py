"""The operators as torch knows them: opcheck, torch.compile, inference mode, autocast, second derivatives."""

from __future__ import annotations

import os
import shutil

import ops_reference as ref
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import OPDEFS

from entrgi_kernels import ops

OPS = torch.ops.entrgi
D = 4
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None


def _case(name: str, x: torch.Tensor, backend: str) -> tuple:
    """(operator, arguments) for opcheck."""
    n, v = x.shape
    acc = ref.accumulation(x)
    e, g = ref.table(v, D, x.dtype), ref.table(n, D, x.dtype, seed=3)
    rng, rows, tokens = torch.tensor([3, 4]), torch.arange(n), torch.zeros(n, dtype=torch.int64)
    vector, soft = ref.table(n, 1, acc, seed=4)[:, 0].contiguous(), ref.table(n, D, acc, seed=5)
    lse = torch.logsumexp(x.to(acc) / 0.7, dim=-1)
    grad_x, grad_e = x.detach().requires_grad_(), e.clone().requires_grad_()
    head = ref.table(6, v, x.dtype, seed=6).requires_grad_()
    bias = ref.table(6, 1, x.dtype, seed=7)[:, 0].contiguous().requires_grad_()
    own = x.clone()
    moments = torch.zeros_like(own), torch.zeros_like(own)
    placed = torch.zeros(n + 2, D, dtype=x.dtype), rows + 1
    adam = (0.7, 0.5, 0.9, 0.999, 1e-3)
    return {
        "softmax_entropy": (OPS.softmax_entropy, (grad_x, 0.7, backend)),
        "softmax_entropy_backward": (
            OPS.softmax_entropy_backward,
            (x, lse, vector.abs(), vector, vector.clone(), 0.7, backend),
        ),
        "sample_tokens": (OPS.sample_tokens, (x, rng, rows, 0.7, 0, 0.9, backend)),
        "soft_embedding": (OPS.soft_embedding, (grad_x, grad_e, 0.7, backend)),
        "soft_embedding_backward": (OPS.soft_embedding_backward, (x, e, g, soft, lse, 0.7, backend)),
        "soft_embedding_grad_table": (OPS.soft_embedding_grad_table, (x, e, g, lse, 0.7, backend)),
        "entrgi_embedding": (
            OPS.entrgi_embedding,
            (grad_x, e, rng, rows, None, None, "entropy", 0.7, 2, 0.9, backend),
        ),
        "entrgi_embedding given": (
            OPS.entrgi_embedding,
            (grad_x, e, rng, rows, tokens, vector, "given", 0.7, 0, 1.0, backend),
        ),
        "entrgi_embedding zero": (
            OPS.entrgi_embedding,
            (grad_x, e, rng, rows, None, None, "zero", 0.7, 0, 1.0, backend),
        ),
        "entrgi_embedding_out": (
            OPS.entrgi_embedding_out,
            (x, e, rng, rows, None, None, "entropy", 0.7, 2, 0.9, *placed, backend),
        ),
        "guidance_update_": (OPS.guidance_update_, (own, g, e, soft, lse, *moments, 2, *adam, True, backend)),
        "guidance_update_ without state": (
            OPS.guidance_update_,
            (own, g, e, soft, lse, None, None, 1, *adam, False, backend),
        ),
        "first_order_update_": (OPS.first_order_update_, (own, g, e, tokens, 0.7, backend)),
        "unmask_confidence": (OPS.unmask_confidence, (x, tokens, "topk_margin", 0.7, 2, 0.9, backend)),
        "token_log_prob": (OPS.token_log_prob, (grad_x, head, bias, tokens, False, backend)),
        "token_log_prob without bias": (OPS.token_log_prob, (grad_x, head.detach(), None, tokens, True, backend)),
        "token_log_prob_backward": (
            OPS.token_log_prob_backward,
            (x, head.detach(), bias.detach(), tokens, lse, vector, backend),
        ),
        "token_log_prob_backward without bias": (
            OPS.token_log_prob_backward,
            (x, head.detach(), None, tokens, lse, vector, backend),
        ),
    }[name]


NAMES = [
    "softmax_entropy", "softmax_entropy_backward", "sample_tokens", "soft_embedding", "soft_embedding_backward",
    "soft_embedding_grad_table", "entrgi_embedding", "entrgi_embedding given", "entrgi_embedding zero",
    "entrgi_embedding_out",
    "guidance_update_", "guidance_update_ without state", "first_order_update_", "unmask_confidence",
    "token_log_prob", "token_log_prob without bias", "token_log_prob_backward", "token_log_prob_backward without bias",
]  # fmt: skip
INPUTS = {
    "3x7": lambda: ref.peaked(3, 7, torch.float32),
    "empty": lambda: ref.peaked(0, 7, torch.float32),
    "transposed": lambda: ref.peaked(7, 5, torch.float32).T,
    "bfloat16": lambda: ref.peaked(2, 9, torch.bfloat16),
}


def test_every_operator_is_checked():
    registered = {name.removeprefix("entrgi::") for name in OPDEFS if name.startswith("entrgi::")}
    assert {name.removesuffix("_of_tensors") for name in registered} == {name.split()[0] for name in NAMES}
    numbers = {name for name in registered if not name.endswith("_of_tensors") and _numbers(name)}
    assert {f"{name}_of_tensors" for name in numbers} == {n for n in registered if n.endswith("_of_tensors")}


def _numbers(name: str) -> list[int]:
    """Places of the numbers that the operator takes as tensors too."""
    arguments = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    return [arguments.index(number) for number in ("temperature", "top_p", "lr", "scale") if number in arguments]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, name):
    """Schema, fake and autograd formula are an operator's, whatever the backend: one input each beyond eager."""
    for kind, make in INPUTS.items():
        if backend != "eager" and kind != "3x7":
            continue
        x = make()
        ref.served(backend, x)
        operator, arguments = _case(name, x, backend)
        result = torch.library.opcheck(operator.default, arguments)
        assert set(result.values()) == {"SUCCESS"} and len(result) == 4, kind


@pytest.mark.parametrize("name", [name for name in NAMES if _numbers(name.split()[0])])
def test_opcheck_of_numbers_in_tensors(name):
    operator, arguments = _case(name, INPUTS["3x7"](), "eager")
    places = _numbers(name.split()[0])
    tensors = [torch.tensor(arguments[place]) for place in places]
    arguments = [0.0 if place in places else argument for place, argument in enumerate(arguments)]
    twin = getattr(OPS, f"{name.split()[0]}_of_tensors")
    result = torch.library.opcheck(twin.default, (*arguments, *tensors))
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def one_step(phi: torch.Tensor, e: torch.Tensor, seed: int, adam: ops.AdamState | None, backend: str):
    """A guidance step as a user would write it, with a draw and a confidence at its end."""
    inputs, index = phi.new_zeros(2 * len(phi), D), 2 * torch.arange(len(phi))
    blend = ops.entrgi_embedding(
        phi, e, temperature=0.7, top_p=0.9, seed=seed, out=inputs, index=index, backend=backend
    )
    grad = torch.cos(inputs)[index]
    ops.guidance_update_(phi, grad, e, blend.state, lr=0.5, adam=adam, eps=1e-3, backend=backend)
    tokens = ops.sample_tokens(phi, temperature=0.7, top_k=5, seed=seed, counter=1, backend=backend)
    return tokens, ops.unmask_confidence(phi, tokens, alg="maskgit_plus", temperature=0.7, backend=backend)


def test_compiled_step_is_the_eager_step_and_new_sizes_are_no_new_graphs(backend):
    e = ref.table(63, D)
    ref.served(backend, e)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(one_step, backend=counter, fullgraph=True)
    graphs = []
    for turn, n in enumerate((5, 6, 11, 64, 3, 17)):
        phi, expected = ref.peaked(n, 63, seed=n), ref.peaked(n, 63, seed=n)
        tokens, confidence = compiled(phi, e, 100 + turn, ops.AdamState.zeros(phi), backend)
        assert torch.equal(tokens, one_step(expected, e, 100 + turn, ops.AdamState.zeros(expected), backend)[0])
        torch.testing.assert_close(phi, expected, rtol=1e-12, atol=1e-12)
        graphs.append(counter.frame_count)
    # The second size makes N (and the seed) dynamic, once; after that nothing is compiled again.
    assert graphs[0] == 1 and graphs[1] <= 2 and graphs[-1] == graphs[1]


def test_dynamic_from_the_start_never_recompiles(backend):
    e = ref.table(63, D)
    ref.served(backend, e)

    def step(phi: torch.Tensor) -> torch.Tensor:
        out = ops.entrgi_embedding(phi, e, temperature=0.7, top_p=0.9, backend=backend)
        lse, entropy = ops.softmax_entropy(phi, 0.7, backend=backend)
        soft = ops.soft_embedding(phi, e, temperature=0.7, backend=backend)
        log_prob = ops.token_log_prob(soft, e, out.tokens, backend=backend)
        return (out.embedding + soft).square().sum() + (lse * entropy).sum() + log_prob.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for turn, n in enumerate((5, 9, 2, 33)):
        phi, plain = (ref.peaked(n, 63, seed=n).requires_grad_() for _ in range(2))
        torch._dynamo.mark_dynamic(phi, 0)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            loss = compiled(phi)
            loss.backward()
        expected = step(plain)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(phi.grad, plain.grad, rtol=1e-11, atol=1e-12)


def test_new_seeds_steps_and_adam_steps_do_not_compile_without_bound(backend):
    x, e = ref.peaked(5, 63), ref.table(63, D)
    ref.served(backend, x)
    draws = CompileCounterWithBackend("aot_eager")

    def draw(seed: int, step: int) -> torch.Tensor:
        return ops.sample_tokens(x, seed=seed, counter=step, backend=backend)

    compiled = torch.compile(draw, backend=draws, fullgraph=True)
    values = [(7, 300), (8, 301), (9, 302), (1 << 40, 1 << 31), (-5, 303), ((1 << 63) - 1, 304), (12, 305)]
    for seed, step in values:
        assert torch.equal(compiled(seed, step), draw(seed, step))
    assert draws.frame_count <= 2
    counter = CompileCounterWithBackend("aot_eager")
    update = torch.compile(one_step, backend=counter, fullgraph=True)
    state = ops.AdamState.zeros(x)
    for turn in range(4):
        update(x, e, 50, state, backend)
        assert state.step == turn + 1
    assert counter.frame_count <= 3


def test_changing_temperature_and_filters_keep_one_graph_each(backend):
    x = ref.peaked(40, 63)
    ref.served(backend, x)

    def draw(temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
        return ops.sample_tokens(x, temperature=temperature, top_k=top_k, top_p=top_p, backend=backend)

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)  # a graph break raises
    for setting in ((0.7, 3, 0.9), (0.8, 3, 0.9), (0.0, 4, 0.8)):
        assert torch.equal(compiled(*setting), draw(*setting))


def annealed_step(phi: torch.Tensor, e: torch.Tensor, heat: float | torch.Tensor, backend: str) -> torch.Tensor:
    """Everything that a temperature, a share or a learning rate is given to, the number made by arithmetic."""
    blend = ops.entrgi_embedding(phi * (heat + 0.0), e, temperature=heat * 2, top_p=heat / 2, backend=backend)
    soft = ops.soft_embedding(phi, e, temperature=heat, backend=backend)
    loss = (blend.embedding + soft).sin().sum() + ops.softmax_entropy(phi, heat * 2, backend=backend)[1].sum()
    moved, out, index = phi.detach().clone(), torch.zeros_like(soft), torch.arange(len(phi))
    with torch.no_grad():
        placed = ops.entrgi_embedding(moved, e, temperature=heat, out=out, index=index, backend=backend)
        ops.guidance_update_(moved, soft.detach(), e, placed.state, lr=heat / 3, eps=1e-3, backend=backend)
        tokens = ops.sample_tokens(moved, temperature=heat * 2, top_p=heat / 2, seed=3, backend=backend)
        sure = ops.unmask_confidence(moved, tokens, temperature=heat, top_p=heat / 2, backend=backend)
    return loss + sure.sum() + moved.square().sum() + out.sum() + tokens.sum()


def gradient_of(step, phi: torch.Tensor, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = phi.clone().requires_grad_()
    loss = step(leaf, *arguments)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_numbers_in_tensors_compile_once(backend):
    phi, e = ref.peaked(5, 63), ref.table(63, D)
    ref.served(backend, phi)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(annealed_step, backend=counter, fullgraph=True)
    graphs = []
    for number in (0.5, 0.6, 0.7, 1.4):
        heat = torch.tensor(number, dtype=torch.float64)
        expected = gradient_of(annealed_step, phi, e, number, backend)
        for step in (annealed_step, compiled):
            ours = gradient_of(step, phi, e, heat, backend)
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


def test_a_temperature_in_a_tensor_is_that_of_the_forward_and_is_checked(backend):
    x, e = ref.peaked(5, 63), ref.table(63, D)
    ref.served(backend, x)

    def cooled(phi: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
        blend = ops.entrgi_embedding(phi, e, temperature=heat, backend=backend)
        loss = blend.embedding.sin().sum() + ops.softmax_entropy(phi, heat, backend=backend)[1].sum()
        heat.mul_(0.5)  # before the backward
        return loss

    compiled = torch.compile(cooled, backend="aot_eager", fullgraph=True)
    for value in (0.75, 1.5, 0.0):  # at 0 the draw is the argmax and the distribution has temperature 1
        heat, same = torch.tensor(value), torch.tensor(value)
        torch.testing.assert_close(gradient_of(compiled, x, heat), gradient_of(cooled, x, same))
        assert heat == same == value / 2
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature={bad}: expected a finite number"):
            compiled(x, torch.tensor(bad))


def test_floats_that_change_are_constants_of_a_graph():
    """Inductor's caches may take a graph's code for that of another value where the value is a symbol (torch 2.13)."""
    x, e, given = ref.peaked(5, 63), ref.table(63, D), []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        nodes = [node for node in graph.graph.nodes if "entrgi" in str(node.target)]
        assert len(nodes) == 7
        given.extend(node.args[place] for node in nodes for place in _numbers(node.target._opname))
        return graph.forward

    compiled = torch.compile(annealed_step, backend=backend, fullgraph=True)
    for heat in (0.5, 0.6, 0.7):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, e, heat, "eager"), annealed_step(x, e, heat, "eager"))
    assert given and {type(number) for number in given} == {float}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="inductor asks for a C++ compiler on a CPU")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_inductor_anneals(kind, fullgraph):
    x = ref.peaked(5, 63)
    torch.use_deterministic_algorithms(False)

    def entropy(logits: torch.Tensor, heat: float | torch.Tensor) -> torch.Tensor:
        return ops.softmax_entropy(logits * (heat + 0.0), temperature=heat * 2)[1]

    compiled = torch.compile(entropy, fullgraph=fullgraph)
    for heat in (0.5, 0.6, 0.7, 0.8):
        torch.testing.assert_close(compiled(x, kind(heat)), entropy(x, kind(heat)))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="inductor asks for a C++ compiler on a CPU")
def test_inductor(backend):
    x, e = ref.peaked(5, 63), ref.table(63, D)
    ref.served(backend, x)
    torch.use_deterministic_algorithms(False)

    def step(phi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The operators alone, one of them on a view.
        out = ops.entrgi_embedding(phi, e, temperature=0.7, top_p=0.9, backend=backend)
        return out.embedding, ops.softmax_entropy(out.embedding.T, backend=backend)[1]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        phi = x.clone().requires_grad_()
        outputs = function(phi)
        results.append((*outputs, *torch.autograd.grad(outputs[1].square().sum(), phi)))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_inference_mode(backend):
    e = ref.table(63, D)
    ref.served(backend, e)
    phi, expected = ref.peaked(5, 63), ref.peaked(5, 63)
    tokens, confidence = one_step(expected, e, 3, ops.AdamState.zeros(expected), backend)
    with torch.inference_mode():
        inside = phi.clone()
        assert inside.is_inference()
        ours = one_step(inside, e, 3, ops.AdamState.zeros(inside), backend)
        ops.softmax_entropy(inside, backend=backend)
        ops.soft_embedding(inside, e, backend=backend)
        ops.token_log_prob(inside[:, :D], e, tokens, backend=backend)
    assert torch.equal(inside, expected) and torch.equal(ours[0], tokens) and torch.equal(ours[1], confidence)


def test_autocast_changes_nothing(backend):
    e = ref.table(63, 33, torch.float32)
    ref.served(backend, e)
    results = []  # of 22 rows: under the interpreter the other engine of the products
    for enabled in (False, True):
        phi = ref.peaked(22, 63, torch.float32).requires_grad_()
        table = e.clone().requires_grad_()
        moved = phi.detach().clone()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = ops.entrgi_embedding(phi, e, temperature=0.7, backend=backend)
            soft = ops.soft_embedding(phi, table, temperature=0.7, backend=backend)
            log_prob = ops.token_log_prob(soft, table, out.tokens, backend=backend)
            loss = (out.embedding * e[:22]).sum() + (soft * e[22:44]).sum() + log_prob.sum()
            gradients = torch.autograd.grad(loss, (phi, table))
            ops.guidance_update_(moved, e[:22], e, out.state, lr=0.5, eps=1.0, backend=backend)
        results.append((out.embedding, soft, log_prob, *gradients, moved))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["softmax_entropy", "soft_embedding", "entrgi_embedding", "token_log_prob"])
def test_second_derivatives_are_refused_in_plain_words(backend, name):
    x, e = ref.peaked(3, 7).requires_grad_(), ref.table(7, D)
    ref.served(backend, x)
    arguments = {
        "softmax_entropy": (x,),
        "token_log_prob": (x, ref.table(D, 7).requires_grad_(), torch.tensor([0, 2, 1])),
    }.get(name, (x, e))
    out = getattr(ops, name)(*arguments, backend=backend)
    (gradient,) = torch.autograd.grad(out[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_deterministic_mode_is_served(backend):
    assert torch.are_deterministic_algorithms_enabled()  # by the fixture, which also poisons new memory
    e = ref.table(63, D)
    ref.served(backend, e)
    one_step(ref.peaked(5, 63), e, 0, None, backend)
