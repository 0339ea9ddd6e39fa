"""A plain loop under Lightning Fabric: masks hold, and state_dicts have the model's own names."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk

pytest.importorskip("lightning.fabric")

from lightning.fabric import Fabric

from tests.support.held import INPUT, assert_sees_masked, assert_zero, loss_of
from tests.support.lightning_runs import QUIET
from tests.support.pruning_cases import Net

pytestmark = QUIET
TARGETS = ["encoder.weight", "rnn.weight_hh_l0"]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_masks_hold_in_a_loop_of_fabric(precision, early):
    fabric, net = Fabric(accelerator="cpu", devices=1, precision=precision), Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizer) if early else None
    model, wrapped = fabric.setup(net, optimizer)
    pruner = pruner or mk.MagnitudePruner(net, TARGETS, optimizer=wrapped)
    reg = mk.regularize(net, manifold="torus", strength=0.1)
    for sparsity in (0.3, 0.6):
        pruner.step_to(sparsity)
        for _ in range(3):
            wrapped.zero_grad()
            fabric.backward(loss_of(model) + reg())
            fabric.clip_gradients(model, wrapped, max_norm=1.0)
            wrapped.step()
            assert_zero(net)
    assert_sees_masked(net)
    assert pruner.sparsity == pytest.approx(0.6, abs=0.01) and [*pruner.masks] == TARGETS


def test_a_state_saved_by_fabric_loads(tmp_path):
    fabric, net = Fabric(accelerator="cpu", devices=1), Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=[optimizer])
    pruner.step_to(0.5)
    assert model.state_dict().keys() == net.state_dict().keys() >= {"rnn.weight_hh_l0_mask"}
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    weight = net.rnn.weight_hh_l0.detach().clone()
    net.rnn.weight_hh_l0.data.normal_()
    pruner.step_to(0.8)
    fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    assert torch.equal(net.rnn.weight_hh_l0, weight) and pruner.sparsity == pytest.approx(0.5, abs=0.01)
    fresh = Net(1)
    mk.load_pruned_(fresh, torch.load(tmp_path / "state.ckpt", weights_only=True)["model"])
    assert torch.equal(fresh(INPUT), net(INPUT))
