"""What the tests of packages ask of a pruned model: masked weights are 0, and outputs are those of masked weights."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels.masks import remove_mask
from tests.support.pruning_cases import Net

INPUT = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(3))


def pruned_net(optimizer=None, sparsity: float = 0.5) -> tuple[Net, mk.MagnitudePruner]:
    net = Net()
    pruner = mk.MagnitudePruner(net, [f"{path}.{name}" for path, name in NAMES], optimizer=optimizer)
    pruner.step_to(sparsity)
    return net, pruner


NAMES = [("encoder", "weight"), ("rnn", "weight_hh_l0"), ("rnn", "weight_ih_l0"), ("decoder", "weight")]


def masks_of(net: nn.Module) -> dict[str, Tensor]:
    """The bool buffers of masks, by the names of their weights."""
    return {name.removesuffix("_mask"): mask for name, mask in net.named_buffers() if name.endswith("_mask")}


def assert_zero(net: nn.Module) -> None:
    """The weights themselves are 0 where they are masked, and only there."""
    masks = masks_of(net)
    assert masks
    for name, mask in masks.items():
        weight = net.get_parameter(name)
        assert not mask.all() and weight[~mask].eq(0).all() and weight[mask].ne(0).all(), name


def assert_sees_masked(net: nn.Module, x: Tensor = INPUT) -> None:
    """Outputs, gradients and the state_dict are those of a plain net with masked weights, whatever lies under the masks
    now."""
    masks, plain = masks_of(net), copy.deepcopy(net)
    for path, module in plain.named_modules():
        for key in [key for key in module._buffers if key.endswith("_mask")]:
            name = key.removesuffix("_mask")
            remove_mask(module, name)
            with torch.no_grad():
                module._parameters[name].mul_(masks[f"{path}.{name}".lstrip(".")])
    for parameter in net.parameters():
        parameter.grad = None
    output, expected = net(x), plain(x)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, weight), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        grad = other.grad if name not in masks else other.grad * masks[name]
        torch.testing.assert_close(weight.grad, grad, msg=name)
        weight.grad = None
    state = net.state_dict()
    for name, mask in masks.items():
        assert state[name][~mask].eq(0).all(), name


def loss_of(net: nn.Module, x: Tensor = INPUT) -> Tensor:
    return (net(x) - 1).square().mean()
