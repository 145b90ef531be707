"""The reference policy on plain networks, and on one that FSDP2 has sharded (a single process is enough for that)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrgi.train.reference import ReferencePolicy


@pytest.fixture(params=["plain", "fsdp2"])
def network(request, tmp_path):
    """Two layers, the first one frozen."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    found[0].requires_grad_(False)
    if request.param == "plain":
        yield found
        return
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        yield fully_shard(found, mesh=mesh)
    finally:
        torch.distributed.destroy_process_group()


def _halve(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network[1].parameters():
            parameter.mul_(0.5)


def test_the_network_is_the_reference_for_a_while(network):
    inputs = torch.ones(1, 3)
    reference = ReferencePolicy(network)
    with torch.no_grad():
        start = network(inputs).clone()
    reference.sync()  # after a forward without a backward: FSDP2 has not sharded the network again by itself
    _halve(network)
    with torch.no_grad():
        moved = network(inputs).clone()
        with reference.in_place():
            assert torch.equal(network(inputs), start)
        assert torch.equal(network(inputs), moved) and not torch.equal(moved, start)
        reference.sync(0.5)
        with reference.in_place():
            torch.testing.assert_close(network(inputs), (start + moved) / 2)


def test_a_saved_reference_is_taken_up(network, tmp_path):
    from safetensors.torch import load_file

    inputs, path = torch.ones(1, 3), tmp_path / "reference.safetensors"
    with torch.no_grad():
        start = network(inputs).clone()
        reference = ReferencePolicy(network)
        reference.save(path)
        assert sorted(load_file(path)) == ["1.bias", "1.weight"]  # what is trained, and nothing else
        _halve(network)
        other = ReferencePolicy(network)
        other.load(path)
        with other.in_place():
            assert torch.equal(network(inputs), start)
    assert other.sharded == hasattr(network, "reshard")
    ReferencePolicy(nn.Sequential(nn.Linear(3, 2))).save(path)
    with pytest.raises(ValueError, match=r"0\.bias is \[2\] there and missing here"):
        other.load(path)
