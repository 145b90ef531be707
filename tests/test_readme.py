"""README's loop of one's own runs as it is printed, and is LogitOptimizer to the bit."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import torch

from entrgi_kernels import LogitOptimizer

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_of_your_own():
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^    from entrgi_kernels import ops\n(?:    .*\n|\n(?=    ))+", text)
    code = textwrap.dedent(block)
    assert len(code[code.index("for m") :].splitlines()) == 5  # the loop's head and a step of four lines
    logits, table, probe = torch.randn(5, 63), torch.randn(63, 8), torch.randn(5, 8)

    def reward(embedding: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(embedding) * probe).sum(dim=-1)

    names = {"torch": torch, "logits": logits, "table": table, "reward": reward}
    exec(compile(code, str(README), "exec"), names)

    optimizer = LogitOptimizer(logits.clone(), table, lr=0.5, temperature=0.7, top_p=0.95, seed=0)
    rewards = []
    for _ in range(3):
        embedding = optimizer.embed().embedding
        rewards.append(reward(embedding).sum())
        optimizer.step(torch.autograd.grad(-rewards[-1], embedding)[0])
    assert torch.equal(names["phi"], optimizer.phi) and not torch.equal(optimizer.phi, logits)
    assert rewards[-1] > rewards[0] and names["adam"].step == 3
