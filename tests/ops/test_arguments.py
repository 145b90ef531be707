"""Bad arguments: each error names the value and says what is accepted."""

from __future__ import annotations

import math

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops

X, E, TOKENS = ref.peaked(3, 7), ref.table(7, 4), torch.zeros(3, dtype=torch.int64)
OUT = torch.zeros(5, 4, dtype=torch.float64)
GRAD = torch.zeros(3, 4, dtype=torch.float64)
STATE = ops.entrgi_embedding(X, E).state


def update(**changes):
    arguments = {"logits": X.clone(), "grad": GRAD, "table": E, "state": STATE, "lr": 0.5}
    return ops.guidance_update_(**(arguments | changes))


def kept(**changes) -> dict[str, ops.ForwardState]:
    return {"state": STATE._replace(**changes)}


def adam(*shape: int, dtype: torch.dtype = torch.float64) -> ops.AdamState:
    return ops.AdamState(torch.zeros(*shape, dtype=dtype), torch.zeros(*shape, dtype=dtype))


CALLS = {
    "softmax_entropy": lambda x=X, **k: ops.softmax_entropy(x, **k),
    "sample_tokens": lambda x=X, **k: ops.sample_tokens(x, **k),
    "soft_embedding": lambda x=X, **k: ops.soft_embedding(x, E, **k),
    "entrgi_embedding": lambda x=X, **k: ops.entrgi_embedding(x, E, **k),
    "guidance_update_": lambda x=X, temperature=1.0, **k: update(logits=x, **kept(temperature=temperature), **k),
    "unmask_confidence": lambda x=X, **k: ops.unmask_confidence(x, TOKENS, **k),
}
FILTERED = ["sample_tokens", "entrgi_embedding", "unmask_confidence"]
DRAWING = ["sample_tokens", "entrgi_embedding"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": [[1.0]]}, TypeError, ["logits is list", "torch.Tensor"]),
        ({"x": torch.zeros(7)}, ValueError, ["logits has shape [7]", "[N, V]"]),
        ({"x": torch.zeros(2, 3, 7)}, ValueError, ["logits has shape [2, 3, 7]", "[N, V]"]),
        ({"x": torch.zeros(3, 0)}, ValueError, ["logits has shape [3, 0]", "V >= 1"]),
        ({"x": torch.zeros(3, 7, dtype=torch.int64)}, TypeError, ["torch.int64", "torch.bfloat16"]),
        ({"temperature": -0.1}, ValueError, ["temperature=-0.1", ">= 0"]),
        ({"temperature": math.nan}, ValueError, ["temperature=nan", "finite"]),
        ({"temperature": math.inf}, ValueError, ["temperature=inf", "finite"]),
        ({"temperature": "hot"}, TypeError, ["temperature='hot'", "str", "finite number"]),
        ({"temperature": None}, TypeError, ["temperature=None", "finite number"]),
        ({"temperature": torch.tensor(1.0)}, TypeError, ["temperature=tensor(1.)", "finite number"]),
        ({"backend": "cutlass"}, ValueError, ["backend='cutlass'", "'auto'", "'eager'", "'triton'"]),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_of_every_operator(name, changes, error, words):
    with pytest.raises(error) as caught:
        CALLS[name](**changes)
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


@pytest.mark.parametrize("name", FILTERED)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"top_p": 0}, ValueError, ["top_p=0", "(0, 1]"]),
        ({"top_p": 1.5}, ValueError, ["top_p=1.5", "(0, 1]"]),
        ({"top_p": -0.5}, ValueError, ["top_p=-0.5", "(0, 1]"]),
        ({"top_p": math.nan}, ValueError, ["top_p=nan", "(0, 1]"]),
        ({"top_p": "0.9"}, TypeError, ["top_p='0.9'", "str"]),
        ({"top_k": 0}, ValueError, ["top_k=0", ">= 1"]),
        ({"top_k": -3}, ValueError, ["top_k=-3", ">= 1"]),
        ({"top_k": 2.0}, TypeError, ["top_k=2.0", "float", "integer"]),
        ({"top_k": True}, TypeError, ["top_k=True", "bool"]),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_filters(name, changes, error, words):
    with pytest.raises(error) as caught:
        CALLS[name](**changes)
    assert all(word in str(caught.value) for word in [*words, "expected None or"]), str(caught.value)


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"seed": 1 << 63}, ValueError, [f"seed={1 << 63}", str((1 << 63) - 1)]),
        ({"seed": 1.5}, TypeError, ["seed=1.5", "float"]),
        ({"seed": None}, TypeError, ["seed=None", "int"]),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, ["[3]", "int64 [2]"]),
        ({"seed": torch.zeros(2)}, ValueError, ["torch.float32", "int64 [2]"]),
        ({"seed": torch.zeros(())}, ValueError, ["torch.float32", "int64 scalar"]),
        ({"seed": torch.zeros(2, dtype=torch.int64), "counter": 3}, ValueError, ["counter=3", "expected 0"]),
        ({"counter": -1}, ValueError, ["counter=-1", "from 0 to 4294967295"]),
        ({"counter": 1 << 32}, ValueError, [f"counter={1 << 32}", "from 0 to 4294967295"]),
        ({"keys": torch.arange(4)}, ValueError, ["keys has shape [4]", "[3]"]),
        ({"keys": torch.zeros(3)}, TypeError, ["keys is torch.float32", "torch.int64"]),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_keys(name, changes, error, words):
    with pytest.raises(error) as caught:
        CALLS[name](**changes)
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


def half(entropy, v):
    """A weight function that gives a number where a tensor is due."""
    return 0.5


ENTRGI = [
    ({"weight": "linear"}, ValueError, ["weight='linear'", "'entropy'", "callable"]),
    ({"weight": 0.5}, TypeError, ["weight is float", "tensor [N]"]),
    ({"weight": torch.zeros(4)}, ValueError, ["weight has shape [4]", "[3]"]),
    ({"weight": TOKENS}, TypeError, ["weight is torch.int64"]),
    ({"weight": half}, TypeError, ["weight is float"]),
    ({"tokens": TOKENS[:2]}, ValueError, ["tokens has shape [2]", "[3]"]),
    ({"tokens": TOKENS.int()}, TypeError, ["tokens is torch.int32", "torch.int64"]),
    ({"out": OUT}, ValueError, ["out is given", "index=None", "both"]),
    ({"index": TOKENS}, ValueError, ["index is given", "out=None", "both"]),
    ({"out": OUT[:, :3], "index": TOKENS}, ValueError, ["out has shape [5, 3]", "[M, 4]"]),
    ({"out": OUT[0], "index": TOKENS}, ValueError, ["out has shape [4]", "[M, 4]"]),
    ({"out": OUT.float(), "index": TOKENS}, TypeError, ["out is torch.float32", "torch.float64"]),
    ({"out": OUT.to("meta"), "index": TOKENS}, ValueError, ["out is on meta", "cpu"]),
    ({"out": OUT[:1].expand(5, 4), "index": TOKENS}, ValueError, ["out has strides [0, 1]", "dense rows"]),
    ({"out": OUT.T.contiguous().T, "index": TOKENS}, ValueError, ["out has strides [1, 5]", "dense rows"]),
    ({"out": OUT, "index": TOKENS[:2]}, ValueError, ["index has shape [2]", "[3]"]),
    ({"out": OUT, "index": TOKENS.int()}, TypeError, ["index is torch.int32", "torch.int64"]),
    ({"out": E[2:], "index": TOKENS}, ValueError, ["out shares memory with table"]),
    ({"out": OUT.clone().requires_grad_(), "index": TOKENS}, ValueError, ["out.requires_grad", "detach()"]),
    ({"x": X.clone().requires_grad_(), "out": OUT, "index": TOKENS}, ValueError, ["logits.requires_grad"]),
]
UPDATE = [
    ({"grad": E}, ValueError, ["grad has shape [7, 4]", "[3, 4]"]),
    (kept(soft=GRAD[:, :3]), ValueError, ["state.soft has shape [3, 3]", "[3, 4]"]),
    (kept(soft=GRAD.float()), TypeError, ["state.soft is torch.float32", "torch.float64"]),
    (kept(logsumexp=STATE.logsumexp[:2]), ValueError, ["state.logsumexp has shape [2]", "[3]"]),
    (kept(logsumexp=STATE.logsumexp.float()), TypeError, ["state.logsumexp is torch.float32", "torch.float64"]),
    ({"lr": -1.0}, ValueError, ["lr=-1.0", ">= 0"]),
    ({"lr": math.nan}, ValueError, ["lr=nan", "finite"]),
    ({"lr": "fast"}, TypeError, ["lr='fast'", "str", "finite"]),
    ({"grad": None}, TypeError, ["grad is NoneType", "that of the embedding"]),
    ({"betas": (0.9,)}, ValueError, ["betas=(0.9,)", "two numbers"]),
    ({"betas": (0.9, 1.0)}, ValueError, ["betas=(0.9, 1.0)", "[0, 1)"]),
    ({"betas": (-0.1, 0.9)}, ValueError, ["betas=(-0.1, 0.9)", "[0, 1)"]),
    ({"eps": 0.0}, ValueError, ["eps=0.0", "> 0"]),
    ({"adam": adam(3, 6)}, ValueError, ["adam.exp_avg", "[3, 6]", "[3, 7]"]),
    ({"state": adam(3, 7)}, TypeError, ["state is AdamState", ".state that entrgi_embedding returned"]),
    ({"adam": adam(3, 7, dtype=torch.int64)}, TypeError, ["adam.exp_avg is torch.int64"]),
    ({"logits": X[:1].expand(3, 7)}, ValueError, ["[3, 7]", "strides [0, 1]", "clone"]),
    ({"logits": X.clone().requires_grad_()}, ValueError, ["require grad", "detach()"]),
]
OTHERS = [("entrgi_embedding", *case) for case in ENTRGI] + [
    ("unmask_confidence", {"alg": "margin"}, ValueError, ["alg='margin'", "'topk_margin'", "'anchor'"])
]


@pytest.mark.parametrize(("name", "changes", "error", "words"), OTHERS, ids=lambda x: str(x)[:30])
def test_of_one_operator(name, changes, error, words):
    with pytest.raises(error) as caught:
        CALLS[name](**changes)
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


@pytest.mark.parametrize(("changes", "error", "words"), UPDATE, ids=lambda x: str(x)[:40])
def test_of_the_update(changes, error, words):
    with pytest.raises(error) as caught:
        update(**changes)
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


@pytest.mark.parametrize("call", [ops.soft_embedding, ops.entrgi_embedding])
@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (ref.table(6, 4), ValueError, ["table has 6 rows", "7 columns", "one row per"]),
        (ref.table(7, 1)[:, 0], ValueError, ["table has shape [7]", "[V, D]"]),
        (E[:, :0], ValueError, ["table has shape [7, 0]", "D >= 1"]),
        (E.long(), TypeError, ["table is torch.int64"]),
        (E.tolist(), TypeError, ["table is list", "[V, D]"]),
        (E.to("meta"), ValueError, ["table is on meta", "cpu", "one device"]),
    ],
    ids=["rows", "dim", "empty", "int", "list", "device"],
)
def test_tables(call, table, error, words):
    with pytest.raises(error) as caught:
        call(X, table)
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    ours = ops.sample_tokens(
        X, temperature=numpy.float32(0.5), top_k=numpy.int64(3), top_p=numpy.float64(0.5), seed=numpy.int64(3)
    )
    assert torch.equal(ours, ops.sample_tokens(X, temperature=0.5, top_k=3, top_p=0.5, seed=3))


def test_phi_that_requires_grad_is_moved_under_no_grad():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        update(logits=x, grad=torch.ones_like(GRAD))
    assert not torch.equal(x.detach(), X)
