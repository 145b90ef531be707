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


HEAD = ref.table(6, 7)


def log_prob(**changes):
    return ops.token_log_prob(**({"hidden": X, "head": HEAD, "targets": TOKENS} | changes))


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
        ({"temperature": torch.tensor([1.0])}, TypeError, ["temperature is a torch.float32", "[1]", "0-d"]),
        ({"temperature": torch.tensor(True)}, TypeError, ["temperature is a torch.bool", "0-d"]),
        ({"temperature": torch.tensor(1j)}, TypeError, ["temperature is a torch.complex64", "0-d"]),
        ({"temperature": torch.tensor(-0.5)}, ValueError, ["temperature=-0.5", ">= 0"]),
        ({"temperature": torch.tensor(1.0, device="meta")}, ValueError, ["temperature is a tensor on meta", "CPU"]),
        ({"temperature": torch.tensor(1.0, requires_grad=True)}, ValueError, ["temperature.requires_grad", "detach()"]),
        ({"temperature": 10**400}, ValueError, ["temperature=1000", "finite number"]),
        ({"x": X.to_sparse()}, TypeError, ["logits is a torch.sparse_coo tensor", "dense"]),
        ({"x": torch._neg_view(X)}, ValueError, ["logits is a negated view", "resolve_neg"]),
        ({"x": X.numpy()}, TypeError, ["logits is ndarray", "torch.Tensor"]),
        ({"backend": None}, ValueError, ["backend=None", "'auto'"]),
        ({"backend": X}, ValueError, ["backend=tensor", "'auto'"]),
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
        ({"top_k": 1 << 63}, ValueError, [f"top_k={1 << 63}", "< 2**63"]),
        ({"top_k": torch.tensor(3)}, TypeError, ["top_k=tensor(3)", "integer"]),
        ({"top_p": torch.tensor(1.5)}, ValueError, ["top_p=1.5", "(0, 1]"]),
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
        ({"seed": True}, TypeError, ["seed=True", "bool"]),
        ({"seed": torch.zeros((), dtype=torch.int64, device="meta")}, ValueError, ["seed is on meta", "cpu"]),
        ({"seed": torch.zeros(2, dtype=torch.int64), "counter": [0]}, ValueError, ["counter=[0]", "expected 0"]),
        ({"counter": True}, TypeError, ["counter=True", "bool"]),
        ({"keys": torch._neg_view(TOKENS)}, ValueError, ["keys is a negated view"]),
        ({"keys": TOKENS.to_sparse()}, TypeError, ["keys is a torch.sparse_coo tensor"]),
        ({"keys": [0, 1, 2]}, TypeError, ["keys is list", "[3]"]),
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
    ({"out": OUT[:0], "index": TOKENS}, ValueError, ["out has 0 rows", "M >= 1"]),
    ({"out": torch._neg_view(OUT), "index": TOKENS}, ValueError, ["out is a negated view"]),
    ({"out": OUT, "index": TOKENS, "weight": OUT[:3, 0]}, ValueError, ["out shares memory with weight"]),
    ({"out": OUT, "index": OUT.view(torch.int64)[:3, 0]}, ValueError, ["out shares memory with index"]),
    ({"out": OUT, "index": TOKENS + 7}, IndexError, ["index holds [7]", "which has 5"]),
    ({"tokens": TOKENS + 9}, IndexError, ["tokens holds 9", "below 7"]),
    ({"out": OUT[:1].expand(5, 4), "index": TOKENS}, ValueError, ["out has strides [0, 1]", "dense rows"]),
    ({"out": OUT.T.contiguous().T, "index": TOKENS}, ValueError, ["out has strides [1, 5]", "dense rows"]),
    ({"out": OUT, "index": TOKENS[:2]}, ValueError, ["index has shape [2]", "[3]"]),
    ({"out": OUT, "index": TOKENS.int()}, TypeError, ["index is torch.int32", "torch.int64"]),
    ({"out": E[2:], "index": TOKENS}, ValueError, ["out shares memory with table"]),
    ({"out": OUT.clone().requires_grad_(), "index": TOKENS}, ValueError, ["out.requires_grad", "detach()"]),
    ({"x": X.clone().requires_grad_(), "out": OUT, "index": TOKENS}, ValueError, ["logits.requires_grad"]),
]
PAIR, TRIPLE = torch.zeros(2, 3, 7, dtype=torch.float64), torch.zeros(9, 7, dtype=torch.float64)
PHI = X.clone()
UPDATE = [
    ({"state": None}, TypeError, ["state is NoneType", "entrgi_embedding"]),
    ({"state": tuple(STATE)}, TypeError, ["state is tuple"]),
    (kept(soft=None), TypeError, ["state.soft is NoneType"]),
    (kept(logsumexp=1.0), TypeError, ["state.logsumexp is float"]),
    (kept(temperature=None), TypeError, ["state.temperature=None", "finite"]),
    ({"adam": (PAIR[0], PAIR[1])}, TypeError, ["adam is tuple", "AdamState"]),
    ({"adam": ops.AdamState(None, None)}, TypeError, ["adam.exp_avg is NoneType", "[N, V]"]),
    ({"adam": ops.AdamState(PAIR[0], None)}, TypeError, ["adam.exp_avg_sq is NoneType", "[N, V]"]),
    ({"adam": ops.AdamState(PAIR[0], PAIR[1], -1)}, ValueError, ["adam.step=-1", ">= 0"]),
    ({"adam": ops.AdamState(PAIR[0], PAIR[1], 2.5)}, TypeError, ["adam.step=2.5", "float"]),
    ({"adam": ops.AdamState(PAIR[0], PAIR[1], 1 << 70)}, ValueError, [f"adam.step={1 << 70}", "< 2**63"]),
    ({"adam": ops.AdamState(*[PAIR[0]] * 2)}, ValueError, ["adam.exp_avg_sq is adam.exp_avg"]),
    ({"adam": ops.AdamState(PAIR[0], PAIR[0].view(3, 7))}, ValueError, ["exp_avg shares memory with adam.exp_avg_sq"]),
    ({"adam": ops.AdamState(TRIPLE[:3], TRIPLE[2:5])}, ValueError, ["exp_avg shares memory with adam.exp_avg_sq"]),
    ({"logits": PHI, "adam": ops.AdamState(PHI, PAIR[0])}, ValueError, ["logits shares memory with adam.exp_avg"]),
    ({"logits": PHI, "adam": ops.AdamState(PAIR[0], PHI)}, ValueError, ["logits shares memory with adam.exp_avg_sq"]),
    ({"logits": PHI, "grad": PHI[:, :4]}, ValueError, ["logits shares memory with grad"]),
    (
        {"table": TRIPLE[:7, :4], "adam": ops.AdamState(TRIPLE[4:7], PAIR[0])},
        ValueError,
        ["adam.exp_avg shares memory with table"],
    ),
    ({"adam": ops.AdamState(PAIR[0, :1].expand(3, 7), PAIR[1])}, ValueError, ["adam.exp_avg", "strides [0, 1]"]),
    ({"adam": ops.AdamState(PAIR[0].clone().requires_grad_(), PAIR[1])}, ValueError, ["adam.exp_avg.requires_grad"]),
    ({"logits": TRIPLE.flatten().as_strided((3, 7), (2, 1))}, ValueError, ["logits of shape [3, 7]", "[2, 1]"]),
    ({"betas": 0.9}, TypeError, ["betas=0.9", "float", "two numbers"]),
    ({"betas": "ab"}, TypeError, ["betas='ab'", "two numbers"]),
    ({"keep": None}, TypeError, ["keep=None", "True or False"]),
    ({"lr": torch.tensor(-1.0)}, ValueError, ["lr=-1.0", ">= 0"]),
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
LOG_PROB = [
    ({"bias": [0.0] * 6}, TypeError, ["bias is list", "[6]"]),
    ({"bias": 0.5}, TypeError, ["bias is float", "[6]"]),
    ({"bias": HEAD[:, 0].to_sparse()}, TypeError, ["bias is a torch.sparse_coo tensor"]),
    ({"bias": HEAD[:5, 0]}, ValueError, ["bias has shape [5]", "[6]"]),
    ({"bias": TOKENS.repeat(2)}, TypeError, ["bias is torch.int64"]),
    ({"hidden": None}, TypeError, ["hidden is NoneType", "[N, D]"]),
    ({"head": HEAD.to_sparse()}, TypeError, ["head is a torch.sparse_coo tensor"]),
    ({"head": HEAD[:, :5]}, ValueError, ["head has shape [6, 5]", "same D"]),
    ({"targets": None}, TypeError, ["targets is NoneType", "[3]"]),
    ({"targets": TOKENS.bool()}, TypeError, ["targets is torch.bool", "torch.int64"]),
    ({"targets": TOKENS.to("meta")}, ValueError, ["targets is on meta", "cpu"]),
]
OTHERS = [("entrgi_embedding", *case) for case in ENTRGI] + [
    ("unmask_confidence", {"alg": "margin"}, ValueError, ["alg='margin'", "'topk_margin'", "'anchor'"]),
    ("unmask_confidence", {"alg": None}, ValueError, ["alg=None", "'anchor'"]),
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


@pytest.mark.parametrize(("changes", "error", "words"), LOG_PROB, ids=lambda x: str(x)[:40])
def test_of_log_probabilities(changes, error, words):
    with pytest.raises(error) as caught:
        log_prob(**changes)
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


def test_moments_in_alternate_columns_are_apart(backend):
    """Rows of one buffer, side by side: nothing is shared, and the step is that of separate moments."""
    steps = []
    for buffer in (torch.zeros(3, 21, dtype=torch.float64), None):
        adam = ops.AdamState.zeros(X) if buffer is None else ops.AdamState(buffer[:, :7], buffer[:, 7:14])
        phi = X.clone() if buffer is None else buffer[:, 14:].copy_(X)
        for _ in range(2):
            update(logits=phi, grad=torch.ones_like(GRAD), adam=adam, backend=backend)
        steps.append(phi)
    torch.testing.assert_close(*steps)


def test_a_refused_step_changes_nothing(backend):
    phi, moments = X.clone(), torch.ones(2, 3, 7, dtype=torch.float64)
    for bad in (ops.AdamState(moments[0], moments[0], 1), ops.AdamState(moments[0], moments[1], -1)):
        with pytest.raises(ValueError):
            update(logits=phi, grad=torch.ones_like(GRAD), adam=bad, backend=backend)
    assert torch.equal(phi, X) and bool((moments == 1).all())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1.0]], 0, 0), TypeError, ["logits is list"]),
        ((X, None, 0), TypeError, ["seed=None"]),
        ((X, 0, 1 << 32), ValueError, [f"counter={1 << 32}"]),
    ],
    ids=["logits", "seed", "counter"],
)
def test_random_state(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.make_rng(*arguments)
    assert all(word in str(caught.value) for word in words)


def test_fresh_moments():
    with pytest.raises(TypeError, match="logits is list"):
        ops.AdamState.zeros([1.0])
    with pytest.raises(TypeError, match="dtype=torch.int64: expected None or one of torch.float64"):
        ops.AdamState.zeros(X, torch.int64)


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


@pytest.mark.parametrize("name", CALLS)
def test_tensors_hold_numbers(name, backend):
    """Eager calls read them at once; a state holds the number, not the tensor."""
    results = [CALLS[name](temperature=number, backend=backend) for number in (0.75, torch.tensor(0.75), 0.75)]
    if name == "entrgi_embedding":
        assert results[1].state.temperature == 0.75 and type(results[1].state.temperature) is float
        results = [one.embedding for one in results]
    if name != "guidance_update_":
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", CALLS)
def test_nested_tensors(name):
    with pytest.raises(TypeError, match="logits is a nested tensor: expected a dense one"):
        CALLS[name](x=torch.nested.nested_tensor(list(X)))


def test_phi_that_requires_grad_is_moved_under_no_grad():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        update(logits=x, grad=torch.ones_like(GRAD))
    assert not torch.equal(x.detach(), X)
