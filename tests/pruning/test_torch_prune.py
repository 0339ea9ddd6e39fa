"""Converts MagnitudePruner's masks to torch.nn.utils.prune's and back."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from moduli_kernels.pruning.pruner import MagnitudePruner
from tests.support.penalty_cases import on_device
from tests.support.pruning_cases import Net, Tied, cut_count, loss_of, size_of

pytestmark = on_device


def step(net, optimizer, seed):
    optimizer.zero_grad()
    loss_of(net, seed=seed).backward()
    optimizer.step()


@pytest.mark.parametrize("by", ["model", "targets"])
def test_from_torch_prune_keeps_weights_parameters_and_optimizer(by):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    objects = {id(p) for p in net.parameters()}
    torch_prune.global_unstructured(net.targets(), torch_prune.L1Unstructured, amount=0.3)
    torch_prune.global_unstructured(net.targets(), torch_prune.L1Unstructured, amount=0.5)
    assert isinstance(next(iter(net.rnn._forward_pre_hooks.values())), torch_prune.PruningContainer)
    step(net, optimizer, 0)
    output = net(torch.ones(2, 1, 3))
    masks = {f"{i}.{n}": getattr(m, f"{n}_mask").bool() for i, (m, n) in enumerate(net.targets())}
    pruner = MagnitudePruner.from_torch_prune(net if by == "model" else net.targets(), optimizer)
    if by == "targets":
        assert all(torch.equal(masks[key], mask) for key, mask in pruner.masks.items())
    assert pruner.sparsity == sum(int((~m).sum()) for m in masks.values()) / size_of(pruner)
    assert torch.equal(net(torch.ones(2, 1, 3)), output)
    assert {id(p) for p in net.parameters()} == objects
    assert set(net.state_dict()) == {k for k in Net().state_dict()} | {
        "encoder.weight_mask", "rnn.weight_hh_l0_mask", "rnn.weight_ih_l0_mask", "decoder.weight_mask"}
    assert not torch_prune.is_pruned(net)
    pruner.step_to(0.8)
    before = net.rnn.weight_hh_l0.detach().clone()
    for seed in range(3):
        step(net, optimizer, seed)
    assert not torch.equal(before, net.rnn.weight_hh_l0)  # the optimizer still trains the Parameter that the net uses
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all()


def test_to_torch_prune_goes_on_as_torch_would():
    """Both nets train alike, step by step, since plain SGD remembers nothing of masked weights."""
    ours, theirs = Net(), Net()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (ours, theirs)]
    objects = {id(p) for p in ours.parameters()}
    pruner = MagnitudePruner(ours.targets(), optimizer=optimizers[0])
    pruner.step_to(0.6)
    total = size_of(pruner)
    torch_prune.global_unstructured(theirs.targets(), torch_prune.L1Unstructured, amount=round(0.6 * total))
    for seed in range(6):
        if seed == 3:
            pruner.to_torch_prune()
            assert torch_prune.is_pruned(ours) and {id(p) for p in ours.parameters()} == objects
            assert not optimizers[0]._optimizer_step_post_hooks
            assert not ours.rnn.weight_hh_l0_orig._backward_hooks
            assert set(ours.state_dict()) == set(theirs.state_dict())
        for net, optimizer in zip((ours, theirs), optimizers):
            step(net, optimizer, seed)
        for (m, n), (t, _) in zip(ours.targets(), theirs.targets()):
            mask = getattr(t, f"{n}_mask").bool()
            weight = getattr(m, f"{n}_orig" if seed >= 3 else n)
            torch.testing.assert_close(weight * mask, getattr(t, f"{n}_orig") * mask, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="make a new MagnitudePruner"):
        pruner.step_to(0.7)
    again = MagnitudePruner.from_torch_prune(ours.targets(), optimizers[0])
    assert again.sparsity == round(0.6 * total) / total


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_nets_run_on_the_pruned_weights_after_each_conversion(kind):
    torch.manual_seed(0)
    rnn, plain = kind(3, 4, num_layers=2, bidirectional=True), kind(3, 4, num_layers=2, bidirectional=True)
    targets = [(rnn, name) for name, _ in rnn.named_parameters() if name.startswith("weight")]
    x = torch.randn(5, 2, 3)

    def check():
        plain.load_state_dict({n: getattr(rnn, n) for n in plain.state_dict()})
        output = rnn(x)[0]
        assert torch.equal(output, plain(x)[0])
        output.sum().backward()  # its gradients must reach the Parameters
        assert all(p.grad is not None for p in rnn.parameters())
        rnn.zero_grad()

    pruner = MagnitudePruner(targets)
    pruner.step_to(0.3)
    check()
    pruner.to_torch_prune()
    check()
    torch_prune.global_unstructured(targets, torch_prune.L1Unstructured, amount=0.5)
    pruner = MagnitudePruner.from_torch_prune(rnn)
    check()
    assert torch.equal(rnn.weight_hh_l0 == 0, ~rnn.weight_hh_l0_mask)
    pruner.step_to(0.9)
    check()
    pruner.make_permanent()
    check()


def test_a_tied_parameter_to_and_from_torch():
    net = Tied()
    pruner = MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    mask = net.encoder.weight_mask.clone()
    pruner.to_torch_prune()
    assert net.encoder.weight_orig is net.decoder.weight_orig
    pruner = MagnitudePruner.from_torch_prune(net)
    assert net.encoder.weight is net.decoder.weight and net.encoder.weight_mask is net.decoder.weight_mask
    assert torch.equal(net.encoder.weight_mask, mask) and list(pruner.masks) == ["encoder.weight"]
    pruner.to_torch_prune()
    net.decoder.weight_mask[3] = 0
    with pytest.raises(ValueError, match="must have one mask, got masks that differ"):
        MagnitudePruner.from_torch_prune(net)
    assert torch_prune.is_pruned(net.encoder) and torch_prune.is_pruned(net.decoder)


def test_from_torch_prune_takes_plain_targets_beside_pruned_ones():
    net = Net()
    torch_prune.l1_unstructured(net.rnn, "weight_hh_l0", amount=10)
    pruner = MagnitudePruner.from_torch_prune(net.targets())
    assert cut_count(net.targets()) == 10 and len(pruner.masks) == 4


def test_from_torch_prune_errors_change_nothing():
    net = Net()
    with pytest.raises(ValueError) as error:
        MagnitudePruner.from_torch_prune(net)
    assert str(error.value) == ("targets_or_model must hold a parameter pruned by torch.nn.utils.prune, got "
                                "none; use MagnitudePruner(targets) for plain parameters.")
    torch_prune.l1_unstructured(net.encoder, "weight", amount=3)
    torch_prune.custom_from_mask(net.decoder, "weight", torch.full((2, 8), 0.5))
    for optimizer, kind, message in [
        (net.parameters(), TypeError, "optimizer must be a torch.optim.Optimizer, a wrapper that has param_groups, or "
                                      "a list of them, got a generator; pass the one that steps these weights, or "
                                      "None."),
        (None, ValueError, "weight_mask of Linear must hold only 0 and 1, got other values; make these "
                           "weights permanent with torch.nn.utils.prune.remove first."),
    ]:
        with pytest.raises(kind) as error:
            MagnitudePruner.from_torch_prune(net, optimizer)
        assert str(error.value) == message
        assert torch_prune.is_pruned(net.encoder) and torch_prune.is_pruned(net.decoder)
