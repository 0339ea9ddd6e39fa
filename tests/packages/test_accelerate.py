"""Masks hold in loops of Accelerate: its wrapper is taken as the optimizer, with accumulation and with loss scaling."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from tests.support.held import INPUT, assert_sees_masked, assert_zero, loss_of
from tests.support.pruning_cases import Net

accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")

TARGETS = ["encoder.weight", "rnn.weight_hh_l0"]


@pytest.fixture(autouse=True)
def new_state():
    """Accelerate keeps one state a process, which a test must not leave to the next."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerator, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)):
    net = Net()
    return accelerator.prepare(net, make(net.parameters()))


def run(accelerator, net, optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert_zero(net)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("given", ["wrapper", "inner", "list", None])
def test_prepared_model_and_optimizer(given, accumulate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net, optimizer = prepared(accelerator)
    optimizers = {"wrapper": optimizer, "inner": optimizer.optimizer, "list": [optimizer], None: None}[given]
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizers)
    for sparsity in (0.3, 0.6):
        pruner.step_to(sparsity)
        run(accelerator, net, optimizer)
    assert_sees_masked(net)
    assert [*pruner.masks] == TARGETS and pruner.sparsity == pytest.approx(0.6, abs=0.01)


def test_a_pruner_made_before_prepare():
    accelerator, net = accelerate.Accelerator(cpu=True), Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizer)
    pruner.step_to(0.3)
    net, optimizer = accelerator.prepare(net, optimizer)
    run(accelerator, net, optimizer)
    pruner.step_to(0.6)
    run(accelerator, net, optimizer)
    assert_sees_masked(net)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_loss_scale(wrapped):
    """A step may be left out where gradients overflow; what is pruned stays pruned."""
    accelerate.Accelerator(cpu=True)
    net = Net()
    inner = torch.optim.AdamW(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler) if wrapped else inner
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizer)
    for k, sparsity in enumerate((0.2, 0.2, 0.4, 0.6, 0.6)):
        pruner.step_to(sparsity)
        scaler.scale(loss_of(net, INPUT * (float("inf") if k == 3 else 1))).backward()
        if wrapped:
            optimizer.step()
            assert optimizer.step_was_skipped == (k == 3)
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        assert_zero(net)
    assert scaler.get_scale() == 128
    assert_sees_masked(net)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_mixed_precision(precision):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    net, optimizer = prepared(accelerator)
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizer)
    pruner.step_to(0.5)
    run(accelerator, net, optimizer)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


def test_what_is_refused_leaves_nothing_behind():
    accelerator = accelerate.Accelerator(cpu=True)
    _, foreign = prepared(accelerator)
    net = Net()
    with pytest.raises(ValueError, match="must hold at least one of the targets, got AcceleratedOptimizer that"):
        mk.MagnitudePruner(net, TARGETS, optimizer=foreign)
    with pytest.raises(TypeError, match="optimizer must be .* got a Accelerator"):
        mk.MagnitudePruner(net, TARGETS, optimizer=accelerator)
    for module in net.modules():
        assert not module._forward_pre_hooks and not module._state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks and not module._buffers
    assert not any(parameter._backward_hooks for parameter in net.parameters())


def test_save_and_load_state(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer = prepared(accelerator)
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizer)
    pruner.step_to(0.6)
    run(accelerator, net, optimizer)
    accelerator.save_state(tmp_path)
    weight = net.rnn.weight_hh_l0.detach().clone()
    run(accelerator, net, optimizer)
    accelerator.load_state(tmp_path)
    assert torch.equal(net.rnn.weight_hh_l0, weight)
    state = accelerator.get_state_dict(net)
    mk.load_pruned_(fresh := Net(), state)
    assert torch.equal(fresh.rnn.weight_hh_l0_mask, net.rnn.weight_hh_l0_mask)
    assert torch.equal(accelerator.unwrap_model(net)(INPUT), fresh(INPUT))


def test_a_schedule_free_optimizer_in_accelerate():
    schedulefree = pytest.importorskip("schedulefree", reason="needs the package schedulefree")
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer = prepared(accelerator, lambda p: schedulefree.AdamWScheduleFree(p, lr=0.05))
    pruner = mk.MagnitudePruner(net, TARGETS, optimizer=optimizer)
    optimizer.train()
    for sparsity in (0.3, 0.6):
        pruner.step_to(sparsity)
        run(accelerator, net, optimizer)
    optimizer.eval()
    assert_zero(net)
    assert_sees_masked(net)
