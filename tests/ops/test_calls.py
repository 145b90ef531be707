"""The way round the dispatcher: what a plain call costs in calls (not in time), and who must not take it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import ops_reference as ref
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from entrgi_kernels import backends, ops
from entrgi_kernels.backends import eager
from entrgi_kernels.ops import _vocabulary_head

N, V, D = 3, 7, 4
ROOT = Path(__file__).parents[2]
# Name to what makes a call of it, its arguments ready.
CALLS = {
    "softmax_entropy": lambda x, e, **k: partial(ops.softmax_entropy, x, 0.7, **k),
    "sample_tokens": lambda x, e, **k: partial(ops.sample_tokens, x, temperature=0.7, top_p=0.9, seed=3, **k),
    "soft_embedding": lambda x, e, **k: partial(ops.soft_embedding, x, e, temperature=0.7, **k),
    "entrgi_embedding": lambda x, e, **k: partial(ops.entrgi_embedding, x, e, temperature=0.7, top_k=5, seed=3, **k),
    "guidance_update_": lambda x, e, **k: update(x, e, **k),
    "first_order_update_": lambda x, e, **k: partial(
        ops.first_order_update_, x, x[:, :D].clone(), e, targets(x), scale=0.5, **k
    ),
    "unmask_confidence": lambda x, e, **k: partial(ops.unmask_confidence, x, targets(x), **k),
    "token_log_prob": lambda x, e, **k: partial(ops.token_log_prob, x, e.T, targets(x), **k),
}
DIFFERENTIABLE = ["softmax_entropy", "soft_embedding", "entrgi_embedding", "token_log_prob"]


def targets(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x[:, 0], dtype=torch.int64)


def update(x: torch.Tensor, e: torch.Tensor, **options) -> partial:
    state = ops.ForwardState(x[:, :D].clone(), x[:, 0].clone(), targets(x), 0.7)
    return partial(ops.guidance_update_, x, x[:, :D].clone(), e, state, lr=0.5, adam=ops.AdamState.zeros(x), **options)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return ref.peaked(N, V, dtype), ref.table(V, D, dtype)


def first(result):
    return result[0] if isinstance(result, tuple) else result


class Calls:
    """Counts the calls, Python's and C's, made while it is entered, and notes the files of the former."""

    def __enter__(self) -> Calls:
        self.count, self.files = 0, set()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)

    def _note(self, frame, event, arg) -> None:
        self.count += event in ("call", "c_call")
        if event == "call":
            self.files.add(frame.f_code.co_filename)


class Known:
    """A backend whose functions cost nothing: each returns what eager's gave at its first call."""

    NAME = "known"

    def __init__(self) -> None:
        self._results: dict[str, object] = {}

    def __getattr__(self, name: str):
        def known(*args):
            if name not in self._results:
                self._results[name] = getattr(eager, name)(*args)
            return self._results[name]

        return known


# Calls of Python and of C, the kernel's own left out: about a tenth more than Python 3.11 and torch 2.13 need.
MOST = {
    "softmax_entropy": 43,
    "sample_tokens": 64,
    "soft_embedding": 53,
    "entrgi_embedding": 80,
    "guidance_update_": 142,  # five moments and rows are read, three written, and each of them apart from the others
    "first_order_update_": 78,
    "unmask_confidence": 53,
    "token_log_prob": 52,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_is_few_calls_and_none_of_the_dispatchers(name, grad, monkeypatch):
    known, resolve = Known(), backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda *a: resolve(*a) and known)
    monkeypatch.setattr(_vocabulary_head, "token_log_prob", lambda _, __, *a: known.token_log_prob(*a))
    x, e = inputs()
    CALLS[name](x.clone(), e)()
    call = CALLS[name](x.requires_grad_(grad and name in DIFFERENTIABLE), e)
    with torch.set_grad_enabled(grad), Calls() as calls:
        call()
    assert calls.count <= MOST[name] + (40 if grad else 0), calls.count
    assert not [file for file in calls.files if "_library" in file], calls.files


SCRIPT = """
import sys
import torch
from entrgi_kernels import LogitOptimizer, ops

x, e, target = torch.randn(3, 7), torch.randn(7, 4), torch.zeros(3, dtype=torch.int64)
learning, head = x.clone().requires_grad_(), e.clone().requires_grad_()
for logits, table in ((x, e), (learning, head)):
    blend = ops.entrgi_embedding(logits, table, temperature=0.7, top_p=0.9)
    parts = [blend.embedding, ops.soft_embedding(logits, table), ops.token_log_prob(logits, table.T, target)]
    parts += ops.softmax_entropy(logits)
    loss = sum(part.sum() for part in parts)
    if loss.requires_grad:
        loss.backward()
    ops.sample_tokens(logits, temperature=0), ops.unmask_confidence(logits, blend.tokens)
optimizer = LogitOptimizer(x, e)
for last in (False, True):
    leaf = optimizer.embed().embedding
    optimizer.step(torch.autograd.grad(leaf.sin().sum(), leaf)[0], last=last)
assert "torch._dynamo" not in sys.modules, "a call imported torch._dynamo"
"""


def test_no_call_imports_the_compiler():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, cwd=ROOT)


class Watch(TorchDispatchMode):
    """Names of this project's operators that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "entrgi":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_whoever_watches_calls_sees_the_registered_operator(name):
    with Watch() as watch:
        CALLS[name](*inputs())()
    assert watch.seen == [name]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_content_get_shapes(name, kind):
    x, e = inputs()
    expected = first(CALLS[name](x, e)())
    if kind == "meta":
        ours = first(CALLS[name](x.to("meta"), e.to("meta"))())
    else:
        with FakeTensorMode() as mode:
            ours = first(CALLS[name](mode.from_tensor(x), mode.from_tensor(e))())
    assert ours is None or (ours.shape == expected.shape and ours.dtype == expected.dtype)


def test_a_trace_holds_the_operator():
    graph = make_fx(lambda x: ops.softmax_entropy(x, 0.7)[1])(inputs()[0])
    assert torch.ops.entrgi.softmax_entropy.default in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_that_of_the_registered_operator(name, backend):
    gradients = []
    x, e = inputs(torch.float64)
    ref.served(backend, x)
    for watched in (False, True):
        leaf = x.clone().requires_grad_()
        if watched:
            with Watch() as watch:
                first(CALLS[name](leaf, e, backend=backend)()).sum().backward()
            assert len(watch.seen) == 2 or name == "token_log_prob"
        else:
            first(CALLS[name](leaf, e, backend=backend)()).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_a_subclass_is_the_dispatchers_business(backend):
    """A fake tensor outside of its mode: there is nothing in it that a kernel could read."""
    x, _ = inputs()
    ref.served(backend, x)
    fake = FakeTensorMode().from_tensor(x)
    lse, entropy = ops.softmax_entropy(fake, backend=backend)
    assert isinstance(lse, FakeTensor) and entropy.shape == (N,)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions(backend):
    x = torch.stack([inputs()[0], 2 * inputs()[0]])
    ref.served(backend, x)
    draw = partial(ops.sample_tokens, temperature=0.7, top_p=0.9, seed=3, backend=backend)
    assert torch.equal(torch.vmap(draw)(x), torch.stack([draw(x[0]), draw(x[1])]))


def test_random_state_is_made_of_what_is_given():
    x, _ = inputs()
    for seed in (-5, (1 << 63) - 1, torch.tensor(9)):
        for counter in (0, (1 << 32) - 1, torch.tensor(4)):
            rng = ops.make_rng(x, seed, counter)
            assert rng.dtype == torch.int64 and rng.tolist() == [int(seed), int(counter)]
