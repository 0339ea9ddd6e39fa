"""AveragedModel takes masks as they are: the average has the model's masks, and masked weights are 0 in it."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import moduli_kernels as mk
from tests.support.pruning_cases import Net, WithNorm, loss_of

AVERAGES = {
    "mean": lambda net, buffers: swa_utils.AveragedModel(net, use_buffers=buffers),
    "EMA": lambda net, buffers: swa_utils.AveragedModel(
        net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=buffers),
    "own": lambda net, buffers: swa_utils.AveragedModel(
        net, avg_fn=lambda average, now, count: 0.5 * average + 0.5 * now, use_buffers=buffers),
}


def train(net, optimizer, average, pruner=None, sparsities=(0.0, 0.3, 0.6, 0.8)):
    for seed, sparsity in enumerate(sparsities):
        if pruner is not None:
            pruner.step_to(sparsity)
        optimizer.zero_grad()
        loss_of(net, seed=seed).backward()
        optimizer.step()
        average.update_parameters(net)


def check(net, average):
    """The average has the net's masks, 0 where masked, and elsewhere a number that is not the net's."""
    for path, module in net.named_modules():
        twin = average.module.get_submodule(path)
        for name, buffer in module._buffers.items():
            if not name.endswith("_mask"):
                continue
            weight, mine = twin._parameters[name.removesuffix("_mask")], module._parameters[name.removesuffix("_mask")]
            assert torch.equal(getattr(twin, name), buffer) and getattr(twin, name) is not buffer
            assert weight[~buffer].eq(0).all() and weight[buffer].ne(mine[buffer]).all()


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("kind", [Net, WithNorm])
def test_the_average_has_the_masks_of_the_model(make, buffers, kind):
    net = kind()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pruner = mk.MagnitudePruner(net.targets())
    average = make(net, buffers)
    train(net, optimizer, average, pruner)
    check(net, average)
    twins = mk.MagnitudePruner([(average.module.get_submodule(path), "weight") for path in ("encoder", "decoder")])
    assert twins.sparsity == mk.MagnitudePruner([(net.encoder, "weight"), (net.decoder, "weight")]).sparsity > 0
    saved = average.state_dict()
    assert saved["module.rnn.weight_hh_l0"][~net.rnn.weight_hh_l0_mask].eq(0).all()


@pytest.mark.parametrize("buffers", [False, True])
def test_pruning_that_begins_or_ends_after_the_average_was_made(buffers):
    net = WithNorm()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    average = AVERAGES["EMA"](net, buffers)
    train(net, optimizer, average, sparsities=(0.0, 0.0))
    pruner = mk.MagnitudePruner(net.targets())
    train(net, optimizer, average, pruner)
    check(net, average)
    assert average.module.norm.running_mean.ne(0).all()  # other buffers met their own counterparts
    assert average.module.norm.running_var.shape == (8,)
    pruner.make_permanent()
    train(net, optimizer, average)
    assert {name for name, _ in average.module.named_buffers()} == {name for name, _ in net.named_buffers()}


def test_an_average_of_a_wrapped_model():
    net = Net()
    wrapped = nn.Sequential()
    wrapped.module = net  # as DistributedDataParallel names the model that it wraps
    average = AVERAGES["EMA"](net, True)
    pruner = mk.MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    average.update_parameters(wrapped)
    assert torch.equal(average.module.rnn.weight_hh_l0_mask, net.rnn.weight_hh_l0_mask)
    assert torch.equal(average.module.rnn.weight_hh_l0, net.rnn.weight_hh_l0)


def test_an_average_of_a_sparse_rnn():
    net = mk.SparseRNN(3, 8)
    average = AVERAGES["mean"](net, True)
    for density in (0.9, 0.5, 0.2):
        net.set_mask("weight_hh_l0", torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < density)
        net.weight_hh_l0.data.add_(torch.randn(8, 8) * net.weight_hh_l0_mask)
        average.update_parameters(net)
    x = torch.randn(5, 2, 3)
    assert torch.equal(average.module.weight_hh_l0_mask, net.weight_hh_l0_mask)
    assert average.module.weight_hh_l0[~net.weight_hh_l0_mask].eq(0).all() and average(x)[0].shape == (5, 2, 8)
