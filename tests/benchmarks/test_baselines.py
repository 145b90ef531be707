"""The baselines compute the method: a speed against wrong code would be worth nothing."""

import math

import pytest
import torch

from benchmarks.baselines import step as baselines
from benchmarks.baselines.step import Published, Vectorized
from benchmarks.harness import oracle
from benchmarks.harness.inputs import Canvas, Shape, StepSettings, canvas, embedding_table, linear_reward, peaked_logits
from benchmarks.suites.fused import Fused
from benchmarks.suites.step import Problem, maker

V, D, N = 61, 5, 13


class ExactPublished(Published):
    log_epsilon = 0.0


def curved_reward(board: Canvas, d: int):
    """A reward whose gradient depends on the embeddings, so that errors of a step reach the next one."""
    linear = linear_reward(board, d, dtype=torch.float64)

    def reward(embeddings, alive):
        return torch.tanh(3 * linear(embeddings, alive)) + (embeddings * alive.unsqueeze(-1)).pow(2).sum(dim=(1, 2))

    return reward


def inputs(n=N, seed=0):
    board = canvas(n, V, length=6, seed=seed)
    phi = peaked_logits(n, V, dtype=torch.float64, seed=seed)
    return phi, 10 * embedding_table(V, D, dtype=torch.float64, seed=seed), board


def run_steps(make, reward, tokens):
    subject = make()
    return subject, [subject.step(reward, drawn) for drawn in tokens]


@pytest.mark.parametrize("weight", ["entropy", "one", "zero"])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("other", ["vectorized", "eager"])
def test_three_steps_agree_in_float64(weight, top_k, other):
    phi, table, board = inputs()
    settings = StepSettings(weight=weight, top_k=top_k)
    reward = curved_reward(board, D)
    tokens = torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(5))
    published, first = run_steps(lambda: ExactPublished(phi, table, board, settings), reward, tokens)
    if other == "eager":
        subject, second = run_steps(lambda: Fused(phi, table, board, settings, backend="eager"), reward, tokens)
    else:
        subject, second = run_steps(lambda: Vectorized(phi, table, board, settings), reward, tokens)
    for ours, theirs in zip(second, first, strict=True):
        for name in ("embedding", "weight", "entropy", "rewards"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(subject.phi.detach(), published.phi.detach(), rtol=1e-9, atol=1e-9)
    assert (published.phi.detach() - phi).abs().max() > 0.5  # three steps of 0.5 that went somewhere


def test_the_published_epsilon_shifts_the_entropy_by_no_more_than_it_can():
    phi, table, board = inputs()
    settings, reward = StepSettings(), linear_reward(board, D, dtype=torch.float64)
    tokens = torch.zeros(N, dtype=torch.int64)
    plain = Published(phi, table, board, settings).step(reward, tokens).entropy
    exact = ExactPublished(phi, table, board, settings).step(reward, tokens).entropy
    shift = (exact - plain).abs()
    assert 0 < shift.max() <= V * 1e-10 + 1e-14


def test_a_step_is_the_one_of_the_definition():
    """The oracle, written from the formulas, against autograd and torch.optim.Adam."""
    phi, table, board = inputs()
    settings, reward = StepSettings(), linear_reward(board, D, dtype=torch.float64)
    tokens = torch.arange(N)
    subject = ExactPublished(phi, table, board, settings)
    result = subject.step(reward, tokens)
    problem = Problem(Shape(N, D, V), torch.float64, settings, phi, table, board, reward)
    exact = oracle.truth(phi, table, tokens, problem.grad, settings)
    for ours, theirs in (
        (result.embedding, exact.embedding),
        (result.entropy, exact.entropy),
        (result.weight, exact.weight),
        (result.grad, exact.grad),
        (subject.phi.detach(), exact.phi),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_living_positions_end_after_the_first_eos():
    tokens = torch.tensor([[1, 9, 2, 9, 3], [8, 1, 8, 9, 9], [1, 2, 3, 4, 5]])
    expected = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(baselines.scan_alive(tokens, eos_id=9, pad_id=8), expected)
    assert torch.equal(baselines.batched_alive(tokens, eos_id=9, pad_id=8), expected)
    same = torch.tensor([[1, 9, 2, 9]])  # Qwen-like: EOS is the padding token
    assert torch.equal(baselines.scan_alive(same, 9, 9), baselines.batched_alive(same, 9, 9))


def test_trajectories_without_masks_and_with_eos_inside():
    phi, table, _ = inputs(n=7)
    tokens = torch.randint(0, V - 2, (4, 6), generator=torch.Generator().manual_seed(1))
    tokens[0, 2] = V - 1
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[0, 1:4], masked[2, :], masked[2, 4:] = True, True, False
    board = Canvas(tokens, masked, V - 1, V - 2)
    reward, hard = curved_reward(board, D), torch.arange(7)
    results = {}
    for cls in (ExactPublished, Vectorized, Fused):
        extra = {"backend": "eager"} if cls is Fused else {}
        subject = cls(phi, table, board, StepSettings(), **extra)
        results[cls] = (subject.step(reward, hard), subject.step(reward, hard).rewards, subject.phi.detach())
    for cls in (Vectorized, Fused):
        torch.testing.assert_close(results[cls][1:], results[ExactPublished][1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("top_p, top_k", [(0.6, None), (1.0, 4), (0.9, 2), (1.0, None)])
def test_draws_follow_the_filtered_distribution(top_p, top_k):
    count = 20_000
    row = torch.tensor([2.0, 1.5, 1.5, 0.0, -1.0, -3.0, 0.7])
    settings = StepSettings(temperature=0.7, top_p=top_p, top_k=top_k)
    wanted = baselines.filtered(row[None] / 0.7, settings).softmax(dim=-1)[0]
    torch.manual_seed(0)
    drawn = baselines.batched_draw(row.expand(count, -1), 0.7, top_p, top_k)
    counts = torch.bincount(drawn, minlength=len(row))
    assert counts[wanted < 1e-30].sum() == 0
    spread = (count * wanted * (1 - wanted)).sqrt()
    assert ((counts - count * wanted).abs() <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["published", "vectorized"])
def test_baselines_pass_the_gate_they_are_timed_under(name, dtype):
    problem = Problem.make(Shape(9, 16, 503), dtype)
    check = problem.check(maker(problem, name), own=False)
    assert check.passed, check.detail


@pytest.mark.slow
def test_the_compiled_baseline_passes_the_gate():
    torch._dynamo.reset()
    problem = Problem.make(Shape(5, 8, 127), torch.float32)
    try:
        check = problem.check(maker(problem, "compiled"), own=False)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch.compile does not work on this machine: {type(error).__name__}")
    assert check.passed, check.detail


def test_weights_are_checked():
    with pytest.raises(ValueError, match="'linear'"):
        StepSettings(weight="linear")


def test_peaked_logits_span_certain_to_open():
    logits = peaked_logits(64, 20_011)
    entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    assert entropy.min() < 0.05 and entropy.max() > 5 and 0.2 < entropy.median() < 5
    mass = (logits / 0.7).softmax(dim=-1).sort(dim=-1, descending=True).values
    nucleus = ((mass.cumsum(dim=-1) - mass) <= 0.95).sum(dim=-1)
    assert nucleus.min() == 1 and nucleus.max() > 200
    assert torch.equal(logits, peaked_logits(64, 20_011))
    assert not torch.equal(logits, peaked_logits(64, 20_011, seed=1))
    assert peaked_logits(1, 1).shape == (1, 1) and math.isfinite(float(peaked_logits(1, 1)))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 300])
def test_a_canvas_has_as_many_masks_as_asked(n):
    board = canvas(n, 100)
    assert int(board.masked.sum()) == n and board.masked.sum(dim=1).max() <= 128
