"""Hopper's two products, the kernels' own text, on an emulated GPU: many schedules, exact sums, planted faults."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hopper_machine import Edit, ForwardJob, Matrix, UpdateJob, build

FAULTS: dict[str, dict[str, list[Edit]]] = {
    "forward.cu": {
        "reads a tile before it came": [Edit("wait(&shared.full[slot], phase);")],
        "overwrites a tile in use": [Edit("wait(&shared.empty[slot], phase ^ 1);")],
        "announces too few bytes": [
            Edit(
                "expect_bytes(&shared.full[slot], LOGITS_BYTES + TABLE_BYTES);",
                "expect_bytes(&shared.full[slot], TABLE_BYTES);",
            )
        ],
        "frees a tile too early": [Edit("finish_products<DEPTH / 16>();", "finish_products<2 * DEPTH / 16>();")],
        "keeps registers that others wait for": [Edit("fewer_registers<24>();")],
        "never frees a tile": [Edit("if (thread == 0) arrive(&shared.empty[before]);")],
        "frees a tile for its own block only": [
            Edit(
                "arrive_at(&shared.empty[before], thread);",
                "if (thread == rank) arrive_at(&shared.empty[before], thread);",
            )
        ],
        "every thread frees a tile": [
            Edit("if (thread == 0) arrive(&shared.empty[before]);", "arrive(&shared.empty[before]);")
        ],
        "does not wait for the last product": [Edit("finish_products<0>();", "finish_products<1>();")],
        "begins products without a fence": [Edit("begin_products();")],
        "forms the next operand in the same registers": [
            Edit("turn(left[1], step + 1);", "turn(left[0], step + 1);", after="if (step + 1 < steps) ")
        ],
        "stages sums over tiles in use": [Edit("synchronize_threads<1, 2 * WARP_GROUP>();")],
        "adds slices before they are there": [
            Edit("synchronize_cluster<SLICES>();", after="if constexpr (SLICES > 1) "),
            Edit("synchronize_cluster<SLICES>();", after="\n      }\n      "),
        ],
        "ends while its sums are read": [
            Edit("synchronize_cluster<CLUSTER>();", after="arrive at it or read its sums.\n  ")
        ],
    },
    "update.cuh": {
        "reads a tile before it came": [Edit("wait(&shared.full[slot], phase);")],
        "overwrites a tile in use": [Edit("wait(&shared.empty[slot], phase ^ 1);")],
        "frees a tile too early": [Edit("finish_products<1>();", "finish_products<2>();")],
        "does not wait for the last product": [Edit("finish_products<0>();", "finish_products<1>();")],
        "keeps registers that others wait for": [Edit("fewer_registers<P::BRINGING>();")],
        "frees a tile for its own block only": [
            Edit(
                "arrive_at(&shared.empty[before], thread);",
                "if (thread == rank) arrive_at(&shared.empty[before], thread);",
            )
        ],
        "counts the arrivals of one block": [
            Edit("init_barrier(&shared.empty[s], 2 * CLUSTER);", "init_barrier(&shared.empty[s], 2);")
        ],
        "announces half of the table's tile": [
            Edit(
                "expect_bytes(&shared.full[slot], P::GRAD_BYTES + P::TABLE_BYTES);",
                "expect_bytes(&shared.full[slot], P::GRAD_BYTES + P::TABLE_BYTES / CLUSTER);",
            )
        ],
        "overwrites sums that are being read": [Edit("wait(&shared.taken[group], turn ^ 1);")],
        "gives the sums' second half back at once": [
            Edit("wait(&shared.summed[0], phase);", "wait(&shared.summed[0], phase); arrive(&shared.taken[1]);"),
            Edit("arrive(&shared.taken[1]);", after="}\n    "),
        ],
        "finishes before the first half is there": [Edit("wait(&shared.summed[0], phase);")],
        "finishes before the second half is there": [Edit("wait(&shared.summed[1], phase);")],
        "overwrites rows that are being read": [Edit("finishers_meet();", after="AT_ONCE * i + own);\n    ")],
        "reads rows before they are there": [Edit("finishers_meet();", after="}\n    ")],
        "ends while its neighbour arrives at it": [
            Edit("synchronize_cluster<CLUSTER>();", after="__syncwarp();\n  }\n  ")
        ],
    },
}
NUMBERS = {name: number for number, name in enumerate(((f, n) for f, some in FAULTS.items() for n in some), 1)}


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = build(tmp_path_factory.mktemp("hopper"), {name: list(some.values()) for name, some in FAULTS.items()})
    if isinstance(made, str):
        pytest.skip(made)
    return made


def apart(t: torch.Tensor) -> torch.Tensor:
    """The same [N, X] with rows further apart, and NaN between them."""
    n, x = t.shape
    whole = torch.full((n, x + 8), math.nan, dtype=t.dtype)
    whole[:, :x] = t
    return whole[:, :x]


def integers(*shape: int, most: int = 4) -> torch.Tensor:
    return apart(torch.randint(-most, most + 1, shape).to(torch.bfloat16))


def forward(
    hopper: ctypes.CDLL, n: int, v: int, d: int, parts: int, slices: int, seed: int, fault: int = 0, exact: bool = True,
    pairs: bool = False,
) -> str:  # fmt: skip
    """What is wrong with one run, "" for nothing.

    Probabilities are powers of two where the sums are to be exact, else of Gaussian logits at temperature 0.7.
    """
    torch.manual_seed(seed)
    x = apart((torch.randint(-9, 1, (n, v)).float() if exact else 3 * torch.randn(n, v)).to(torch.bfloat16))
    table = integers(v, d) if exact else apart(torch.randn(v, d).to(torch.bfloat16))
    inverse = math.log(2) if exact else 1 / 0.7
    maximum = torch.zeros(n) if exact else x.float().amax(1)
    logsum = torch.zeros(n) if exact else ((x.float() - maximum[:, None]) * inverse).exp().sum(1).log()
    blocks = -(-v // 64)
    length = -(-blocks // (parts * slices)) * 64
    out = torch.full((parts, n, d), math.nan)
    job = ForwardJob(
        Matrix.of(x), Matrix.of(table), maximum.data_ptr(), logsum.data_ptr(), out[0].data_ptr(), out[1:].data_ptr(),
        parts, slices, length, inverse,
    )  # fmt: skip
    if problem := hopper.forward(job, pairs, seed, fault).decode():
        return problem
    p = ((x.double() - maximum[:, None]) * inverse - logsum[:, None]).exp()
    ours, truth, magnitude = out.double().sum(0), p @ table.double(), p @ table.double().abs()
    wrong = ~((ours - truth).abs() <= (0 if exact else 2.0**-8) * magnitude + 1e-6)
    return f"{int(wrong.sum())} of {wrong.numel()} sums are wrong" if wrong.any() else ""


MOMENTS = {"none": (False, False), "reads": (True, False), "writes": (False, True), "both": (True, True)}


def update(
    hopper: ctypes.CDLL,
    n: int,
    v: int,
    d: int,
    moments: str,
    wide: bool,
    seed: int,
    fault: int = 0,
    sms: int = 2,
    candidate: int = -1,
) -> str:
    """What is wrong with one run, "" for nothing: integers as operands, Adam in float64 beside it."""
    torch.manual_seed(seed)
    kind = torch.float32 if wide else torch.bfloat16
    reads, writes = MOMENTS[moments]
    x, grad, table = apart(torch.randn(n, v).to(torch.bfloat16)), integers(n, d), integers(v, d)
    m = apart(torch.randn(n, v).to(kind)) if moments != "none" else None
    s = apart(torch.rand(n, v).to(kind)) if moments != "none" else None
    delta, inverse, step, root, beta1, beta2, eps = torch.randn(n), 1.3, 0.5, 1.1, 0.875, 0.75, 0.25
    lse = (x.double() * inverse).logsumexp(1).float() - 2  # so that what the gradient does is not lost in rounding
    before = [None if t is None else t.double() for t in (x, m, s)]
    job = UpdateJob(
        *map(Matrix.of, (x, grad, table, m, s)), delta.data_ptr(), lse.data_ptr(), reads, writes, wide,
        inverse, step, root, beta1, beta2, eps,
    )  # fmt: skip
    if problem := hopper.update(job, candidate, sms, seed, fault).decode():
        return problem
    p = (before[0] * inverse - lse.double()[:, None]).exp()
    g = p * (grad.double() @ table.double().T - delta.double()[:, None]) * inverse
    first = (beta1 * before[1] if reads else 0) + (1 - beta1) * g
    second = (beta2 * before[2] if reads else 0) + (1 - beta2) * g * g
    truth = [before[0] - step * first / (second.sqrt() * root + eps), first, second]
    for name, ours, start, exact in zip(("logits", "exp_avg", "exp_avg_sq"), (x, m, s), before, truth, strict=True):
        if ours is not None:
            expected = exact if name == "logits" or writes else start
            ulp = 2.0**-8 if ours.dtype == torch.bfloat16 else 2.0**-16
            wrong = ~((ours.double() - expected).abs() <= ulp * expected.abs() + 1e-5)
            if wrong.any():
                return f"{int(wrong.sum())} of {wrong.numel()} {name} are wrong"
            if not torch.as_strided(ours, (n - 1, 8), (v + 8, 1), v).isnan().all():
                return f"something was written between rows of {name}"
    return ""


# (N, V, D, parts, slices)
FORWARD = [
    (64, 256, 64, 1, 1), (200, 1096, 264, 1, 1), (129, 520, 520, 3, 1), (40, 600, 72, 1, 2), (130, 1000, 256, 2, 2),
    (33, 1032, 304, 1, 4), (8, 200, 8, 1, 8), (65, 1544, 320, 2, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", FORWARD, ids=str)
def test_forward(hopper, shape):
    for seed in range(4):
        assert forward(hopper, *shape, seed) == ""
    assert forward(hopper, *shape, 5, exact=False) == ""


@pytest.mark.parametrize("shape", [shape for shape in FORWARD if shape[-1] == 1], ids=str)
def test_pairs_of_the_forward_product(hopper, shape):
    """What only `benchmarks.tools.tune` runs."""
    for seed in range(4):
        assert forward(hopper, *shape, seed, pairs=True) == ""


# (N, V, D, moments, float32 moments)
UPDATE = [
    (64, 384, 64, "none", False), (100, 584, 136, "both", False), (128, 200, 256, "both", True),
    (5, 776, 8, "reads", False), (256, 400, 64, "both", False), (200, 1160, 136, "both", True),
    (300, 200, 200, "writes", False), (257, 584, 72, "none", True), (129, 392, 264, "reads", True),
]  # fmt: skip


@pytest.mark.parametrize("shape", UPDATE, ids=str)
def test_update(hopper, shape):
    for seed in range(4):
        assert update(hopper, *shape, seed, sms=2 + seed % 3) == ""


@pytest.mark.parametrize("candidate", range(20))
def test_candidates_of_the_update(hopper, candidate):
    """Tiles that only `benchmarks.tools.tune` runs."""
    assert hopper.candidate_name(candidate) and not hopper.candidate_name(20), "a candidate that is not tried here"
    for seed in range(3):
        for shape in ((100, 584, 136, "both"), (300, 776, 328, "both"), (257, 392, 72, "none")):
            assert update(hopper, *shape, False, seed, sms=2 + seed, candidate=candidate) == ""


def test_who_waits_is_told(hopper):
    problem = forward(hopper, 64, 1096, 256, 1, 2, 0, NUMBERS["forward.cu", "never frees a tile"])
    assert problem.startswith(
        "nothing can go on: 1 threads (from 256) of block 0 wait for &shared.empty[s] no. 1, parity 0"
    )


@pytest.mark.parametrize("name", FAULTS["forward.cu"])
def test_faults_in_the_forward_product_are_seen(hopper, name):
    pairs = "own block" in name
    shape = (200, 1096, 256, 1, 1) if pairs else (64, 1096, 256, 1, 2)
    assert any(forward(hopper, *shape, seed, NUMBERS["forward.cu", name], pairs=pairs) for seed in range(9))


@pytest.mark.parametrize("name", FAULTS["update.cuh"])
def test_faults_in_the_update_are_seen(hopper, name):
    number = NUMBERS["update.cuh", name]
    assert any(update(hopper, 600, 1160, 264, "both", False, seed, number) for seed in range(9))
