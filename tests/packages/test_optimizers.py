"""Masks hold under optimizers of other packages, and under torch's Muon: raw weights after each step, and outputs."""
from __future__ import annotations

import copy

import pytest
import torch

import moduli_kernels as mk
from tests.support.held import assert_sees_masked, assert_zero, loss_of, pruned_net
from tests.support.pruning_cases import Net


def train(net, optimizer, steps: int = 4, scheduled: mk.MagnitudePruner | None = None, to: float = 0.8) -> None:
    for k in range(steps):
        if scheduled is not None and k == steps // 2:
            scheduled.step_to(to)
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        assert_zero(net)
    assert_sees_masked(net)


# --- schedulefree -------------------------------------------------------------------------------------------------

SCHEDULE_FREE = {
    "sgd": lambda package, p: package.SGDScheduleFree(p, lr=0.1, weight_decay=0.1),
    "sgd_foreach_off": lambda package, p: package.SGDScheduleFree(p, lr=0.1, foreach=False),
    "adamw": lambda package, p: package.AdamWScheduleFree(p, lr=0.05, weight_decay=0.1),
    "radam": lambda package, p: package.RAdamScheduleFree(p, lr=0.05),
}


@pytest.fixture(scope="module")
def schedulefree():
    return pytest.importorskip("schedulefree", reason="needs the package schedulefree")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_schedule_free_weights_stay_masked_in_train_and_eval(schedulefree, kind, given):
    net = Net()
    optimizer = SCHEDULE_FREE[kind](schedulefree, net.parameters())
    pruner = mk.MagnitudePruner(net, ["encoder.weight", "rnn.weight_hh_l0"], optimizer=optimizer if given else None)
    pruner.step_to(0.3)
    optimizer.train()
    for sparsity in (0.3, 0.5, 0.7):
        pruner.step_to(sparsity)
        train(net, optimizer, 3)
        optimizer.eval()
        assert_zero(net)
        assert_sees_masked(net)
        assert pruner.sparsity == pytest.approx(sparsity, abs=0.01)
        optimizer.train()
        assert_zero(net)


@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_weights_pruned_just_before_schedule_free_evaluates_stay_0(schedulefree, kind):
    """eval() and train() interpolate towards the optimizer's own copy of the weights, which must be masked then."""
    net = Net()
    optimizer = SCHEDULE_FREE[kind](schedulefree, net.parameters())
    pruner = mk.MagnitudePruner(net, ["encoder.weight", "rnn.weight_hh_l0"])
    optimizer.train()
    pruner.step_to(0.2)
    train(net, optimizer)
    for sparsity, switch in [(0.5, optimizer.eval), (0.6, optimizer.train), (0.7, optimizer.eval)]:
        pruner.step_to(sparsity)
        switch()
        assert_zero(net)
        assert_sees_masked(net)
        assert pruner.sparsity == pytest.approx(sparsity, abs=0.01)


def test_a_schedule_free_run_goes_on_from_a_checkpoint(schedulefree):
    def made():
        net, pruner = pruned_net()
        optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=0.05)
        optimizer.train()
        return net, pruner, optimizer

    net, pruner, optimizer = made()
    train(net, optimizer)
    optimizer.eval()
    state = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    again, _, other = made()
    again.load_state_dict(state["net"])
    other.load_state_dict(state["optimizer"])
    for each in (optimizer, other):
        each.train()
    train(net, optimizer)
    train(again, other)
    assert torch.equal(net.rnn.weight_hh_l0, again.rnn.weight_hh_l0)


# --- sharpness-aware minimization: two steps for each batch -------------------------------------------------------

class TwoSteps(torch.optim.Optimizer):
    """SAM as its authors' PyTorch port writes it: first_step climbs, second_step returns and descends."""

    def __init__(self, params, base, rho=0.05, **settings):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def adam_then(p):
    return TwoSteps(p, torch.optim.AdamW, lr=0.05)


def momentum_then(p):
    return TwoSteps(p, torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("make", [adam_then, momentum_then])
@pytest.mark.parametrize("given", [True, False])
def test_sharpness_aware_steps_written_out(make, given):
    net = Net()
    optimizer = make(net.parameters())
    pruner = mk.MagnitudePruner(net, ["encoder.weight", "rnn.weight_hh_l0"], optimizer=optimizer if given else None)
    for sparsity in (0.0, 0.0, 0.4, 0.4, 0.7, 0.7):
        pruner.step_to(sparsity)
        loss_of(net).backward()
        optimizer.first_step(zero_grad=True)
        if sparsity:
            assert_zero(net)
        loss_of(net).backward()
        optimizer.second_step(zero_grad=True)
        if sparsity:
            assert_zero(net)
    assert_sees_masked(net)


def test_pruning_between_the_two_steps():
    """second_step brings back the weights of before pruning, and base_optimizer.step() masks them."""
    net, pruner = pruned_net(sparsity=0.2)
    optimizer = momentum_then(net.parameters())
    for sparsity in (0.4, 0.8):
        loss_of(net).backward()
        optimizer.first_step(zero_grad=True)
        pruner.step_to(sparsity)
        loss_of(net).backward()
        optimizer.second_step(zero_grad=True)
        assert_zero(net)
        assert pruner.sparsity == pytest.approx(sparsity, abs=0.01)


def with_closure(net, optimizer, first: bool):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    if first:
        closure()
    optimizer.step(closure)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_the_package_sam_pytorch(base):
    sam = pytest.importorskip("sam", reason="needs the package sam-pytorch")
    net, pruner = pruned_net(sparsity=0.2)
    inner = base(net.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = sam.SAM(net.parameters(), inner)
    mk.MagnitudePruner(net, ["rnn.weight_hh_l0"], optimizer=[optimizer, inner])
    for sparsity in (0.2, 0.5, 0.8):
        pruner.step_to(sparsity)
        with_closure(net, optimizer, first=False)
        assert_zero(net)
    assert_sees_masked(net)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_package_pytorch_optimizer(adaptive):
    package = pytest.importorskip("pytorch_optimizer", reason="needs the package pytorch_optimizer")
    net, pruner = pruned_net(sparsity=0.2)
    optimizer = package.SAM(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, adaptive=adaptive)
    for sparsity in (0.2, 0.5, 0.8):
        pruner.step_to(sparsity)
        with_closure(net, optimizer, first=True)
        assert_zero(net)
    assert_sees_masked(net)


def test_lookahead_returns_to_slow_weights_that_are_masked():
    package = pytest.importorskip("pytorch_optimizer", reason="needs the package pytorch_optimizer")
    net, pruner = pruned_net(sparsity=0.2)
    optimizer = package.Lookahead(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), k=2)
    mk.MagnitudePruner(net, ["rnn.weight_hh_l0"], optimizer=optimizer)
    for sparsity in (0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0.8):
        pruner.step_to(sparsity)
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        assert_sees_masked(net)
        assert_zero(net)
        assert pruner.sparsity == pytest.approx(sparsity, abs=0.01)


# --- Muon ---------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("given", [list, tuple, None])
def test_muon_beside_adamw(given):
    """Muon makes an update orthogonal, so that every entry of it differs from 0."""
    net = Net()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW([p for p in net.parameters() if p.ndim < 2], lr=0.05)
    optimizers = None if given is None else given([muon, adamw])
    pruner = mk.MagnitudePruner(net, ["encoder.weight", "rnn.weight_hh_l0"], optimizer=optimizers)
    for sparsity in (0.3, 0.3, 0.6, 0.6):
        pruner.step_to(sparsity)
        for each in (muon, adamw):
            each.zero_grad()
        loss_of(net).backward()
        for each in (muon, adamw):
            each.step()
        assert_zero(net)
    assert_sees_masked(net)
    with pytest.raises(ValueError, match="optimizer must hold at least one of the targets, got AdamW"):
        mk.MagnitudePruner(net, ["rnn.weight_hh_l0"], optimizer=adamw)


# --- an optimizer under torch.compile -----------------------------------------------------------------------------

@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
                                  lambda p: torch.optim.AdamW(p, lr=0.05)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_step(make):
    net, pruner = pruned_net(sparsity=0.2)
    optimizer = make(net.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for sparsity in (0.2, 0.2, 0.6, 0.6):
        pruner.step_to(sparsity)
        optimizer.zero_grad()
        loss_of(net).backward()
        step()
        assert_zero(net)
        for name, mask in pruner.masks.items():  # nothing that it has gathered would move them
            state = optimizer.state[net.get_parameter(name)].values()
            assert all(value[~mask].eq(0).all() for value in state if value.shape == mask.shape)
    assert_sees_masked(net)
    assert pruner.sparsity == pytest.approx(0.6, abs=0.01)
