"""The random numbers against the vectors of docs/philox.md, which come from plain Python integers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.backends import philox

DATA = Path(__file__).parents[1] / "data"
VECTORS = json.loads((DATA / "philox_vectors.json").read_text(encoding="utf-8"))
POINTS = VECTORS["layout"] + VECTORS["tails"]
BACKENDS = [name for name, info in ops.backends().items() if "cpu" in info.devices]


def _reference():
    spec = importlib.util.spec_from_file_location("philox_reference", DATA / "philox_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rng(point: dict) -> torch.Tensor:
    return torch.tensor([point["seed"], point["step"]])


def test_vectors_are_what_the_plain_implementation_makes():
    tails = [{name: t[name] for name in ("seed", "step", "row", "v")} for t in VECTORS["tails"]]
    assert _reference().make(tails) == VECTORS


def test_tails_are_the_words_at_the_ends_and_at_the_seam():
    words = {int(t["high"] + t["low"], 16) for t in VECTORS["tails"]}
    assert words == {0, 1 << 24, (1 << 63) - 1, 1 << 63, (1 << 64) - 1}
    assert {t["v"] % 2 for t in VECTORS["tails"]} == {0, 1}


@pytest.mark.parametrize("case", VECTORS["known_answers"], ids=["zeros", "ones", "pi"])
def test_known_answers_of_random123(case):
    counter, key = (tuple(torch.tensor(int(x, 16)) for x in case[name]) for name in ("counter", "key"))
    assert [f"{int(x):08x}" for x in philox.philox4x32(counter, key)] == case["words"]


def test_plain_implementation_gives_the_known_answers():
    for case in VECTORS["known_answers"]:
        counter, key, words = ([int(x, 16) for x in case[name]] for name in ("counter", "key", "words"))
        assert _reference().philox4x32_10(counter, key) == words


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p['high']}{p['low']}")
def test_words_and_variates(point):
    row, v = torch.tensor([point["row"]]), torch.tensor([point["v"]])
    high, low = philox.words(_rng(point), row, v)
    assert (f"{int(high):08x}", f"{int(low):08x}") == (point["high"], point["low"])
    expected = float(point["exponential"])
    double = philox.exponential(_rng(point), row, v, torch.float64)
    single = philox.exponential(_rng(point), row, v, torch.float32)
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    assert abs(double.item() / expected - 1) < 1e-15
    assert abs(single.item() / expected - 1) < 4e-7


def test_words_broadcast_rows_against_vocabulary():
    rng, rows, index = torch.tensor([5, 6]), torch.tensor([[3], [-4]]), torch.arange(5)
    high, low = philox.words(rng, rows, index)
    assert high.shape == low.shape == (2, 5)
    plain = _reference().word64
    for i, row in enumerate((3, -4)):
        assert [int(h) << 32 | int(x) for h, x in zip(high[i], low[i], strict=True)] == [
            plain(5, 6, row, v) for v in range(5)
        ]


def test_variates_have_the_exponential_distribution():
    e = philox.exponential(torch.tensor([11, 0]), torch.arange(100)[:, None], torch.arange(1001), torch.float64)
    ranked = e.flatten().sort().values
    n = ranked.numel()
    gap = (-torch.expm1(-ranked) - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.63 / n**0.5  # Kolmogorov-Smirnov at 1%
    single = philox.exponential(torch.tensor([11, 0]), torch.arange(100)[:, None], torch.arange(1001), torch.float32)
    assert ((single.double() - e).abs() <= 4e-7 * e).all()


def test_uniforms_stay_inside_the_open_interval():
    for point in VECTORS["tails"]:
        u = philox.uniform(_rng(point), torch.tensor([point["row"]]), torch.tensor([point["v"]])).item()
        assert 0 < u < 1
        assert abs(u - (int(point["high"] + point["low"], 16) + 0.5) / 2**64) < 2e-16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda c: f"t{c['temperature']}k{c['top_k']}p{c['top_p']}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_of_every_backend(backend, case, dtype):
    logits = torch.tensor([[float(x) for x in row] for row in VECTORS["logits"]], dtype=dtype)
    try:
        tokens = ops.sample_tokens(
            logits,
            temperature=case["temperature"],
            top_k=case["top_k"] or None,
            top_p=case["top_p"],
            seed=case["seed"],
            counter=case["step"],
            keys=torch.tensor(case["rows"]),
            backend=backend,
        )
    except ops.BackendUnavailableError as error:
        pytest.skip(str(error))
    assert tokens.tolist() == case["tokens"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_of_probability_1e_12_can_be_drawn(backend, dtype):
    """At counters found by running Philox backwards the word of one entry is 2^24: E = 9.1e-13. That entry wins against
    62 others although its probability is about 1e-12, and no longer when its probability is 2% less."""
    plain = _reference()
    points = [t for t in VECTORS["tails"] if int(t["high"] + t["low"], 16) == 1 << 24]
    assert len(points) == 2
    for point in points:
        neighbour = point["v"] ^ 1  # shares the counter, whose other word the search left small as well
        key = point["seed"], point["step"], point["row"]
        others = [plain.word64(*key, v) for v in range(64) if v not in (point["v"], neighbour)]
        first = min(float(plain.exponential(word)) for word in others)
        # An entry of relative weight r wins iff E / r is below the others' first arrival.
        for factor, wins in ((1.01, True), (0.99, False)):
            weight = torch.tensor(float(point["exponential"]) / first * factor, dtype=torch.float64)
            assert weight / 62 < 2e-11
            logits = torch.zeros(1, 64, dtype=dtype)
            logits[0, neighbour] = -torch.inf
            logits[0, point["v"]] = weight.log()
            token = ops.sample_tokens(
                logits, seed=point["seed"], counter=point["step"], keys=torch.tensor([point["row"]]), backend=backend
            )
            assert (token.item() == point["v"]) == wins
