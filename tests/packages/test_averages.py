"""Averages of weights that other code keeps: torch's with update_bn, ema-pytorch, and those of timm, written as there.

AveragedModel takes the masks as they are now (tests/masks/test_averaging.py). Other averages are copies of the model,
which keep the masks that they were copied with, until they are given the pruner's.
"""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import moduli_kernels as mk
from tests.support.held import INPUT, assert_sees_masked, assert_zero, loss_of, masks_of
from tests.support.pruning_cases import Net, WithNorm

TARGETS = ["encoder.weight", "rnn.weight_hh_l0"]


def train(net, update, pruner=None, sparsities=(0.2, 0.4, 0.6)) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for sparsity in sparsities:
        if pruner is not None:
            pruner.step_to(sparsity)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()
            update(net)


def give_masks(net: nn.Module, pruner: mk.MagnitudePruner) -> None:
    """What the documentation says to do with an average that is no AveragedModel, before it is used."""
    mk.MagnitudePruner(net, TARGETS).load_state_dict(pruner.state_dict())


def assert_same_masks(average: nn.Module, net: nn.Module) -> None:
    assert_zero(average)
    for name, mask in masks_of(net).items():
        assert torch.equal(masks_of(average)[name], mask)
        assert not torch.equal(average.get_parameter(name), net.get_parameter(name))  # it is an average


# --- torch.optim.swa_utils ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_swa_and_ema_with_update_bn(decay, buffers, early):
    def averaged(net):
        multi = None if decay is None else swa_utils.get_ema_multi_avg_fn(decay)
        return swa_utils.AveragedModel(net, multi_avg_fn=multi, use_buffers=buffers)

    net = WithNorm()
    average = averaged(net) if early else None
    pruner = mk.MagnitudePruner(net, TARGETS)
    pruner.step_to(0.2)
    average = average or averaged(net)
    train(net, average.update_parameters, pruner)
    scheduler = swa_utils.SWALR(torch.optim.SGD(net.parameters(), lr=0.1), swa_lr=0.05)
    assert scheduler is not None
    if not buffers:
        swa_utils.update_bn([INPUT, INPUT + 1], average)
    assert_same_masks(average.module, net)
    average.eval()
    assert torch.isfinite(average(INPUT)).all()
    assert average.module.norm.running_mean.ne(0).any()


def test_an_average_of_an_average_and_of_a_compiled_model():
    net = Net()
    pruner = mk.MagnitudePruner(net, TARGETS)
    compiled = torch.compile(net, backend="eager")
    average = swa_utils.AveragedModel(compiled, use_buffers=True)
    again = swa_utils.AveragedModel(average, use_buffers=True)
    train(net, lambda net: (average.update_parameters(compiled), again.update_parameters(average)), pruner)
    for each in (average, again):
        module = each.module
        while not isinstance(module, Net):
            module = getattr(module, "_orig_mod", None) or module.module
        assert_same_masks(module, net)


# --- ema-pytorch --------------------------------------------------------------------------------------------------

def ema_of(net, **settings):
    package = pytest.importorskip("ema_pytorch", reason="needs the package ema-pytorch")
    return package.EMA(net, beta=0.5, update_after_step=0, update_every=1, **settings)


@pytest.mark.parametrize("early", [True, False])
def test_ema_pytorch_is_given_the_masks_before_it_is_used(early):
    net = WithNorm()
    ema = ema_of(net) if early else None
    pruner = mk.MagnitudePruner(net, TARGETS)
    pruner.step_to(0.2)
    ema = ema or ema_of(net)
    train(net, lambda _: ema.update(), pruner)
    old = masks_of(ema.ema_model)
    assert all(mask.sum() > masks_of(net)[name].sum() for name, mask in old.items())  # those it was copied with
    give_masks(ema.ema_model, pruner)
    assert_same_masks(ema.ema_model, net)
    assert_sees_masked(ema.ema_model.requires_grad_(True).eval())
    train(net, lambda _: ema.update(), pruner, sparsities=(0.6,))
    assert_same_masks(ema.ema_model, net)  # stays so while the masks stay


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_model_that_ema_pytorch_writes_back_to_is_masked(beta):
    net = Net()
    ema = ema_of(net, update_model_with_ema_every=2, update_model_with_ema_beta=beta)
    pruner = mk.MagnitudePruner(net, TARGETS)

    def update(net):
        ema.update()
        assert_sees_masked(net)
        assert_zero(net)

    train(net, update, pruner)
    assert pruner.sparsity == pytest.approx(0.6, abs=0.01)


# --- timm ---------------------------------------------------------------------------------------------------------

class ModelEmaV2(nn.Module):
    """timm.utils.ModelEmaV2: every entry of the state_dict as a number, masks too."""

    def __init__(self, model, decay=0.5):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model):
        for ema_v, model_v in zip(self.module.state_dict().values(), model.state_dict().values()):
            ema_v.copy_(self.decay * ema_v + (1.0 - self.decay) * model_v)


class ModelEmaV3(ModelEmaV2):
    """timm.utils.ModelEmaV3: floating-point entries are averaged, others copied."""

    @torch.no_grad()
    def update(self, model):
        for ema_v, model_v in zip(self.module.state_dict().values(), model.state_dict().values()):
            if ema_v.is_floating_point():
                ema_v.lerp_(model_v, weight=1.0 - self.decay)
            else:
                ema_v.copy_(model_v)


def test_timms_third_average_copies_the_masks():
    net = WithNorm()
    pruner = mk.MagnitudePruner(net, TARGETS)
    average = ModelEmaV3(net)
    train(net, average.update, pruner)
    average.module(INPUT)
    assert_same_masks(average.module, net)
    assert_sees_masked(average.module)


def test_timms_second_average_keeps_what_any_mask_has_kept_until_it_is_given_the_masks():
    net = WithNorm()
    pruner = mk.MagnitudePruner(net, TARGETS)
    pruner.step_to(0.2)
    average = ModelEmaV2(net)
    first = copy.deepcopy(masks_of(net))
    train(net, average.update, pruner)
    assert all(torch.equal(mask, first[name]) for name, mask in masks_of(average.module).items())
    give_masks(average.module, pruner)
    assert_same_masks(average.module, net)
    assert_sees_masked(average.module)


def test_timms_averages_made_before_the_pruner_are_refused_by_the_sizes():
    """They pair the entries of two state_dicts in order, so that masks of only one of them shift the rest."""
    net = WithNorm()
    average = ModelEmaV2(net)
    mk.MagnitudePruner(net, TARGETS)
    with pytest.raises(RuntimeError, match="size of tensor"):
        average.update(net)
