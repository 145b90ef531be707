"""A minute of the fuzz harness, at a fixed seed; and that the harness catches what it is there to catch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from entrgi_kernels.backends import native  # noqa: E402
from fuzz import driver  # noqa: E402
from fuzz.draws import Draws, Failure, twice  # noqa: E402

SEED = 17


@pytest.fixture
def ready():
    """A kind's run(draws), in this process, which is put back afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def make(kind: str):
        if kind == "files":
            pytest.importorskip("yaml")
        prepare, run = driver.functions(kind)
        prepare()
        return run

    yield make
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    if native.why_not(torch.device("cpu"), torch.float32) is None:
        native.set_isa("")


# Parts, so that they spread over processes.
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(("kind", "count"), [("operators", 700), ("arguments", 1000), ("files", 150), ("sampler", 12)])
def test_a_fixed_sample_of_cases(ready, kind, count, part):
    run, found = ready(kind), []
    for number in range(part * count, (part + 1) * count):
        _, message, _ = driver.case(kind, SEED, number, run)
        if message:
            found.append(f"make fuzz CASE={kind}:{SEED}:{number}  # {message}")
    assert not found, f"{len(found)} of {count}:\n" + "\n".join(found[:20])


def test_a_case_follows_from_its_number_alone():
    def drawn(number: int) -> list:
        d = Draws("operators", SEED, number)
        return [d.shape(), d.logits(2, 5, torch.float32).tolist(), d.filters(9), d.temperature()]

    assert repr(drawn(3)) == repr(drawn(3)) != repr(drawn(4))


def test_wrong_numbers_are_found(ready, monkeypatch):
    """A backend that is off by a hundredth in one operator, or that writes where it must not, does not pass."""
    run = ready("operators")
    operators = importlib.import_module("fuzz.operators")
    right = operators.ops.softmax_entropy
    monkeypatch.setattr(operators.ops, "softmax_entropy", lambda *a, **k: tuple(t * 1.01 for t in right(*a, **k)))
    found = [driver.case("operators", SEED, number, run)[1] for number in range(60)]
    assert any("softmax_entropy" in message for message in found)

    d = Draws("operators", SEED, 0)
    view = d.laid(torch.zeros(4, 5), "x", dense=True)
    d.check_memory()
    view = d.laid(torch.zeros(4, 5), "x", dense=True)
    view[3, 4] = 1
    with pytest.raises(Failure, match="memory of x"):
        d.check_memory()
    with pytest.raises(Failure, match="two runs differ"):
        twice(lambda: torch.rand(3))


def test_a_crash_and_a_hang_cost_one_case_each(capfd):
    report = driver.Campaign(SEED, {"dying": 30}, workers=2).run()
    assert report["cases"] == {"dying": 30} and report["calls"] == {"dying": {"x here": 27}} and report["failed"] == 3
    found = {case: message for message, told in report["failures"].items() for case, _ in told["cases"]}
    assert [found[f"dying:{SEED}:{number}"].split(": ")[1].split(":")[0] for number in (3, 7, 12)] == [
        "off by #", "crash", "hang",
    ]  # fmt: skip
    assert f"make fuzz CASE=dying:{SEED}:7   # crash: SIGABRT" in capfd.readouterr().err
