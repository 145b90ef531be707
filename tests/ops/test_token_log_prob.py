"""token_log_prob against float64 torch."""

from __future__ import annotations

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops

# (N, V, D); the last one's vocabulary spans several chunks of every backend.
SHAPES = [(0, 7, 3), (1, 1, 1), (3, 1, 5), (1, 7, 4), (5, 63, 17), (70, 1001, 33), (2, 151_936, 48)]
PAIRS = [(d, d) for d in ref.DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
]


def truth(hidden, head, targets, bias=None):
    logits = hidden.double() @ head.double().T + (0 if bias is None else bias.double())
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]


def naive(hidden, head, targets, bias=None):
    """What people write: logits in the head's dtype, log-softmax in float32 or wider."""
    logits = torch.nn.functional.linear(hidden.to(head.dtype), head, None if bias is None else bias.to(head.dtype))
    wide = logits.to(ref.accumulation(hidden, head))
    return torch.log_softmax(wide, dim=-1).gather(-1, targets[:, None])[:, 0]


def case(n, v, d, pair=(torch.float64, torch.float64), bias=True):
    """hidden, head, targets, bias; logits of a few nats, targets over the whole vocabulary."""
    hidden, head = ref.table(n, d, pair[0], seed=2), (2 * ref.table(v, d, seed=3) / d**0.5).to(pair[1])
    targets = torch.arange(n) * (v // max(n - 1, 1)) % v
    if n:
        targets[-1] = v - 1
    return hidden, head, targets, ref.table(v, 1, pair[1], seed=4)[:, 0].contiguous() if bias else None


# All shapes in each dtype but the large vocabulary, which takes two; mixed dtypes where rows and vocabulary are odd.
CASES = [(pair, shape) for pair in PAIRS[: len(ref.DTYPES)] for shape in SHAPES[:-1]]
CASES += [((dtype, dtype), SHAPES[-1]) for dtype in (torch.float32, torch.bfloat16)]
CASES += [(pair, (5, 63, 17)) for pair in PAIRS[len(ref.DTYPES) :]]


@pytest.mark.parametrize("learns, bias", [("head", True), ("hidden", False)], ids=["head", "hidden alone"])
@pytest.mark.parametrize("pair, shape", CASES, ids=str)
def test_values_and_gradients(backend, pair, shape, learns, bias):
    hidden, head, targets, b = case(*shape, pair, bias and shape[1] < 10_000)
    ref.served(backend, hidden, head)
    g = ref.table(shape[0], 1, torch.float64, seed=5)[:, 0]
    results = []
    for function, kind in (
        (lambda *a: ops.token_log_prob(*a[:3], bias=a[3], backend=backend), None),
        (truth, torch.float64),
        (naive, None),
    ):
        inputs = [t if t is None or kind is None else t.to(kind) for t in (hidden, head, b)]
        leaves = [
            None if t is None else t.detach().clone().requires_grad_(t is inputs[0] or learns == "head") for t in inputs
        ]
        out = function(leaves[0], leaves[1], targets, leaves[2])
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        results.append((out.detach(), *torch.autograd.grad(out, wanted, g.to(out.dtype))))
    assert results[0][0].dtype == ref.accumulation(hidden, head)
    for ours, leaf in zip(results[0][1:], (hidden, head, b), strict=False):
        assert ours.dtype == leaf.dtype
    for ours, exact, plain in zip(*results, strict=True):
        assert ours.shape == exact.shape
        # Each gradient is a sum over V or N of terms up to 1: where they cancel, their size is the scale.
        ref.assert_accurate(ours, exact, plain, ulps=64, floor=1.0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_rows_of_one_target_add_up(backend, dtype, bias):
    hidden, head, _, b = case(6, 40, 8, (dtype, dtype), bias)
    ref.served(backend, hidden)
    targets, g = torch.tensor([3, 3, 7, 3, 39, 7]), torch.linspace(-1, 1, 6, dtype=torch.float64)
    given = [tensor.requires_grad_() for tensor in (hidden, head, b) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = torch.autograd.grad(truth(*exact[:2], targets, *exact[2:]), exact, g)
    out = ops.token_log_prob(hidden, head, targets, bias=b, backend=backend)
    for ours, slope in zip(torch.autograd.grad(out, given, g.to(out.dtype)), expected, strict=True):
        error = (ours.double() - slope).abs().max() / slope.abs().max()
        assert error <= 8 * torch.finfo(dtype).eps, f"relative error {error:.1e}"


@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 7, 4), (2, 63, 5)], ids=str)
def test_gradcheck(backend, shape):
    hidden, head, targets, bias = case(*shape)
    ref.served(backend, hidden)
    leaves = [t.requires_grad_() for t in (hidden, head, bias)]

    def function(x, w, b):
        return ops.token_log_prob(x, w, targets, bias=b, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=shape[1] > 7)
    frozen = (head.detach(), bias.detach())
    assert torch.autograd.gradcheck(lambda x: function(x, *frozen), leaves[:1], fast_mode=shape[1] > 7)


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
@pytest.mark.parametrize("learns", [True, False], ids=["head learns", "head frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, dtype, learns, layout):
    hidden, head, targets, bias = case(5, 63, 17, (dtype, dtype))
    ref.served(backend, hidden)
    wide = bias.new_full((126,), torch.nan)
    wide[::2] = bias
    strided = [ref.layouts(hidden)[layout], ref.layouts(head)[layout], wide[::2]]
    results = []
    for x, w, b in ((hidden, head, bias), strided):
        x, w, b = x.requires_grad_(), w.requires_grad_(learns), b.requires_grad_(learns)
        out = ops.token_log_prob(x, w, targets, bias=b, backend=backend)
        # sum() sends a gradient of stride 0 back
        results.append((out, *torch.autograd.grad(out.sum(), (x, w, b) if learns else (x,))))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_both_ways_to_the_gradient_of_hidden_agree(backend):
    hidden, head, targets, bias = case(70, 1001, 33)
    ref.served(backend, hidden)
    gradients = []
    for learns in (True, False):
        x = hidden.clone().requires_grad_()
        out = ops.token_log_prob(x, head.clone().requires_grad_(learns), targets, bias=bias, backend=backend)
        gradients.append(torch.autograd.grad(out, x, torch.arange(70.0, dtype=torch.float64))[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_logits_stay_finite(backend, dtype):
    head = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype)
    hidden = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    ref.served(backend, hidden)
    hidden.requires_grad_()
    out = ops.token_log_prob(hidden, head, torch.tensor([0, 0, 2]), backend=backend)
    torch.testing.assert_close(out, torch.tensor([0.0, -2e4, -torch.tensor(3.0).log()], dtype=dtype))
    gradient = torch.autograd.grad(out.sum(), hidden)[0]
    rounding = 1e4 * torch.finfo(dtype).eps  # of the terms that cancel
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [2e4], [0.0]], dtype=dtype), rtol=1e-6, atol=rounding)


def test_forbidden_tokens_have_no_probability(backend):
    hidden, head, targets, bias = case(3, 63, 5)
    ref.served(backend, hidden)
    bias[40:] = -torch.inf
    targets = torch.tensor([0, 41, 39])
    hidden.requires_grad_()
    out = ops.token_log_prob(hidden, head, targets, bias=bias, backend=backend)
    expected = truth(hidden[:, :], head[:40], targets.clamp(max=39), bias[:40])
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]], rtol=1e-12, atol=1e-12)
    assert out[1] == -torch.inf
    assert torch.autograd.grad(out[0] + out[2], hidden)[0].isfinite().all()


def test_bad_rows_and_targets_leave_the_others_alone(backend):
    hidden, head, _, _ = case(6, 63, 5)
    ref.served(backend, hidden)
    hidden[1, 2] = torch.nan
    hidden[3, 0] = torch.inf
    targets = torch.tensor([0, 1, 63, 3, -100, 62])
    good = torch.tensor([True, False, False, False, False, True])
    hidden.requires_grad_()
    out = ops.token_log_prob(hidden, head, targets, backend=backend)
    assert out[~good].isnan().all()
    torch.testing.assert_close(out[good], truth(hidden[good], head, targets[good]), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(out[good].sum(), hidden)[0][good].isfinite().all()


@pytest.mark.parametrize("incoming", ["zero", "one"])
@pytest.mark.parametrize("learns", ["head", "hidden"])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_ignored_targets_have_no_gradient(backend, dtype, learns, incoming):
    """Labels of -100 under torch.where, as a training loss has them: zeros, also where the hidden state is NaN."""
    hidden, head, _, bias = case(6, 63, 5, (dtype, dtype))
    ref.served(backend, hidden)
    targets = torch.tensor([0, -100, 5, 63, -100, 62])
    kept = (targets >= 0) & (targets < 63)
    hidden[4] = torch.nan
    tensors = (hidden, head, bias) if learns == "head" else (hidden,)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = ops.token_log_prob(hidden, head, targets, bias=bias, backend=backend)
    assert torch.equal(out.isnan(), ~kept)
    loss = torch.where(kept, out, 0) if incoming == "zero" else out
    found = torch.autograd.grad(loss.sum(), leaves)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head, bias)]
    expected = torch.autograd.grad(truth(exact[0][kept], exact[1], targets[kept], exact[2]).sum(), exact)
    assert (found[0][~kept] == 0).all()
    rounding = 16 * torch.finfo(dtype).eps
    for ours, slope in zip(found, expected, strict=False):
        torch.testing.assert_close(ours.double(), slope, rtol=rounding, atol=rounding)


def test_the_logits_never_exist(backend):
    """Forward and backward allocate nothing near N x V (beyond the head's own gradient)."""
    n, v, d = 512, 60_000, 4
    hidden, head, targets, _ = case(n, v, d, (torch.float32, torch.float32), bias=False)
    ref.served(backend, hidden, head)
    leaves = hidden.requires_grad_(), head.requires_grad_()

    def largest(function) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.autograd.grad(function(*leaves, targets).sum(), leaves)
        events = profile.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    assert largest(naive) >= n * v * 4
    assert largest(lambda *a: ops.token_log_prob(*a, backend=backend)) <= n * v * 4 // 3


def test_same_bits_from_run_to_run(backend):
    hidden, head, targets, bias = case(33, 5003, 64, (torch.float32, torch.float32))
    ref.served(backend, hidden, head)
    leaves = [t.requires_grad_() for t in (hidden, head, bias)]
    runs = []
    for _ in range(2):
        out = ops.token_log_prob(hidden, head, targets, bias=bias, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


HIDDEN, HEAD, TARGETS, BIAS = case(3, 7, 4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden": HIDDEN[0]}, ValueError, ["hidden has shape [4]", "[N, D]"]),
        ({"hidden": HIDDEN.tolist()}, TypeError, ["hidden is list"]),
        ({"hidden": HIDDEN.long()}, TypeError, ["hidden is torch.int64"]),
        ({"head": HEAD[:, :3]}, ValueError, ["head has shape [7, 3]", "hidden [3, 4]", "same D"]),
        ({"head": HEAD[:0]}, ValueError, ["head has shape [0, 4]", "V >= 1"]),
        ({"head": HEAD.to("meta")}, ValueError, ["head is on meta", "hidden is on cpu"]),
        ({"bias": BIAS[:3]}, ValueError, ["bias has shape [3]", "[7]"]),
        ({"bias": BIAS.long()}, TypeError, ["bias is torch.int64"]),
        ({"targets": TARGETS[:2]}, ValueError, ["targets has shape [2]", "[3]"]),
        ({"targets": TARGETS.int()}, TypeError, ["targets is torch.int32", "torch.int64"]),
        ({"targets": TARGETS.tolist()}, TypeError, ["targets is list"]),
        ({"backend": "liger"}, ValueError, ["backend='liger'", "'auto'"]),
    ],
    ids=str,
)
def test_arguments(changes, error, words):
    with pytest.raises(error) as caught:
        ops.token_log_prob(**({"hidden": HIDDEN, "head": HEAD, "targets": TARGETS, "bias": BIAS} | changes))
    assert all(word in str(caught.value) for word in [*words, "expected"]), str(caught.value)


@pytest.mark.parametrize("learns", ["head", "hidden"])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_near_certain_targets_keep_their_gradients(backend, dtype, learns):
    """A gradient by 1 - p = 1e-3 is not what 16-bit rounding leaves of head[target] less a sum with p in it."""
    hidden = torch.eye(2, 8).to(dtype)
    ref.served(backend, hidden)
    head = torch.zeros(8, 8, dtype=dtype)
    head[0, 0] = head[3, 1] = 9.0
    head[:, 2] = torch.linspace(-1, 1, 8)
    targets = torch.tensor([0, 3])
    inputs = [hidden.requires_grad_(), head.requires_grad_(learns == "head")]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(truth(*exact, targets).sum(), exact)
    out = ops.token_log_prob(*inputs, targets, backend=backend)
    found = torch.autograd.grad(out.sum(), [tensor for tensor in inputs if tensor.requires_grad])
    for ours, slope in zip(found, expected, strict=False):
        # 5e-6: terms of up to 9 in float32, which is what sums are in.
        torch.testing.assert_close(ours.double(), slope, rtol=8 * torch.finfo(dtype).eps, atol=5e-6)


@pytest.mark.parametrize("d", [31, 32, 34, 76])
def test_what_lies_behind_a_row_does_not_reach_it(backend, d):
    """In bfloat16, where a library reads past a row: the row before a bad one, and rows with NaN between them."""
    hidden, head = ref.peaked(20, d, torch.bfloat16), ref.table(50, d, torch.bfloat16)
    ref.served(backend, hidden, head)
    targets = torch.arange(20)
    expected = ops.token_log_prob(hidden, head, targets, backend=backend)
    apart = torch.full((20, d + 3), torch.nan, dtype=torch.bfloat16)[:, 1 : d + 1].copy_(hidden)
    assert torch.equal(ops.token_log_prob(apart, head, targets, backend=backend), expected)
    hidden[7] = torch.nan
    found = ops.token_log_prob(hidden, head, targets, backend=backend)
    assert torch.equal(found.isnan().nonzero().flatten(), torch.tensor([7]))
    assert torch.equal(found[8:], expected[8:]) and torch.equal(found[:7], expected[:7])
