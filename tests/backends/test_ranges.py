"""Named ranges: silent until somebody listens, and what listeners are told."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels.backends import ranges


class Heard(list):
    def begin(self, name):
        self.append(name)

    def end(self, name):
        self.append(f"/{name}")


@ranges.ranged
def work():
    return 7


def test_nvtx_is_off_until_asked_for(monkeypatch):
    pushed = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pushed.append("pop"))
    assert work() == 7 and pushed == []
    ranges.enable_nvtx()
    ranges.enable_nvtx()  # twice is once
    try:
        with ranges.scope("reward forward"):
            assert work() == 7
    finally:
        ranges.enable_nvtx(False)
    assert work() == 7
    assert pushed == ["reward forward", "entrgi::work", "pop", "pop"]


def test_listeners_hear_what_is_inside_and_are_forgotten():
    heard = Heard()
    with ranges.listening(heard), ranges.scope("draw"):
        work()
    with ranges.scope("draw"):
        work()
    assert heard == ["draw", "entrgi::work", "/entrgi::work", "/draw"] and ranges.listeners == ()


def test_a_range_ends_where_its_block_raises():
    heard = Heard()
    with pytest.raises(KeyError), ranges.listening(heard), ranges.scope("draw"):
        raise KeyError
    assert heard == ["draw", "/draw"] and ranges.listeners == ()


def test_nobody_listening_costs_no_object():
    assert ranges.scope("draw") is ranges.scope("embed")
