"""Which weights a pruner prunes, what they are called, and whether they are ranked together or each by itself."""
from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import moduli_kernels as mk
from tests.support.penalty_cases import on_device
from tests.support.pruning_cases import Net, Tied

pytestmark = on_device
NAMES = ["encoder.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0", "decoder.weight"]


class Many(nn.Module):
    """Holds every kind of recurrent module."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2), "gru": nn.GRU(3, 4, bidirectional=True)})
        self.cells = nn.ModuleList([nn.RNNCell(3, 4), nn.LSTMCell(3, 4), mk.SparseRNNCell(3, 4)])
        self.sparse, self.head = mk.SparseRNN(3, 4), nn.Linear(4, 1)


def test_a_model_alone_means_its_recurrent_weights_as_regularize_finds_them():
    model = Many()
    pruner = mk.MagnitudePruner(model)
    assert list(pruner.masks) == [
        "body.lstm.weight_hh_l0", "body.lstm.weight_hh_l1", "body.gru.weight_hh_l0", "body.gru.weight_hh_l0_reverse",
        "cells.0.weight_hh", "cells.1.weight_hh", "cells.2.weight_hh", "sparse.weight_hh_l0"]
    assert sorted(pruner.masks) == sorted(name for name, _ in mk.regularize(model).items())
    assert set(pruner.masks) <= {name for name, _ in model.named_parameters()}


def test_a_recurrent_module_alone():
    assert list(mk.MagnitudePruner(nn.LSTM(3, 4)).masks) == ["weight_hh_l0"]
    assert list(mk.MagnitudePruner(nn.GRUCell(3, 4)).masks) == ["weight_hh"]


def test_names_and_pairs_mean_the_same():
    net, other = Net(), Net()
    by_name, by_pair = mk.MagnitudePruner(net, NAMES), mk.MagnitudePruner(other.targets())
    with_model = mk.MagnitudePruner(Net(), targets=NAMES)
    assert list(by_name.masks) == list(with_model.masks) == NAMES
    assert list(mk.MagnitudePruner(net, net.targets()).masks) == NAMES
    assert list(by_pair.masks) == [f"{i}.{name.rpartition('.')[2]}" for i, name in enumerate(NAMES)]
    by_name.step_to(0.6)
    by_pair.step_to(0.6)
    for mine, theirs in zip(by_name.masks.values(), by_pair.masks.values()):
        assert torch.equal(mine, theirs)
    assert list(by_name.densities()) == NAMES and list(by_name.state_dict()) == NAMES


def test_a_pruner_with_names_loads_the_state_of_one_with_pairs_and_the_other_way_round():
    nets = Net(), Net(seed=1), Net(seed=2)
    by_pair, by_name = mk.MagnitudePruner(nets[0].targets()), mk.MagnitudePruner(nets[1], NAMES)
    by_pair.step_to(0.7)
    by_name.load_state_dict(by_pair.state_dict())
    again = mk.MagnitudePruner(nets[2].targets())
    again.load_state_dict(by_name.state_dict())
    for key, mask in again.masks.items():
        assert torch.equal(mask, by_pair.masks[key])
    swapped = dict(reversed(by_pair.state_dict().items()))
    with pytest.raises(ValueError, match="a mask that fits no parameter"):
        by_name.load_state_dict(swapped)


def test_a_tied_weight_has_the_name_of_its_first_place():
    assert list(mk.MagnitudePruner(Tied(), ["encoder.weight", "decoder.weight"]).masks) == ["encoder.weight"]


@pytest.mark.parametrize("targets, kind, message", [
    (["rnn.weight"], ValueError, "targets[0] must name a parameter the module itself owns, got 'weight' of RNN; it "
                                 "owns: weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0."),
    (["lstm.weight_hh_l0"], ValueError, "targets must name weights of the model, got 'lstm.weight_hh_l0': Net has no "
                                        "attribute `lstm`; pass names such as those of model.named_parameters()."),
    ([], ValueError, "targets must name at least one parameter, got an empty list; pass e.g. [(model.rnn, "
                     "'weight_hh_l0')]."),
    ([3], TypeError, "targets[0] must be a pair (module, parameter name), got a int; pass e.g. [(model.rnn, "
                     "'weight_hh_l0')]."),
])
def test_wrong_names(targets, kind, message):
    with pytest.raises(kind) as error:
        mk.MagnitudePruner(Net(), targets)
    assert str(error.value) == message


def test_one_name_need_not_be_in_a_list():
    assert list(mk.MagnitudePruner(Net(), "rnn.weight_hh_l0").masks) == ["rnn.weight_hh_l0"]


def test_pairs_in_both_places_are_refused():
    net = Net()
    with pytest.raises(TypeError, match="^model must be an nn.Module where targets are given beside it, got a list"):
        mk.MagnitudePruner(net.targets(), net.targets())


# --- together or each by itself ----------------------------------------------------------------------------------

def lopsided() -> nn.LSTM:
    """An LSTM whose hidden weights are a hundredth of its input weights, as after a strong penalty on them."""
    torch.manual_seed(0)
    lstm = nn.LSTM(32, 32)
    lstm.weight_hh_l0.data.mul_(0.01)
    return lstm


BOTH = ["weight_hh_l0", "weight_ih_l0"]


def test_each_target_is_pruned_to_the_same_sparsity():
    lstm = lopsided()
    pruner = mk.MagnitudePruner(lstm, BOTH, scope="each")
    for sparsity in (0.0, 0.3, 0.9):
        pruner.step_to(sparsity)
        for name in BOTH:
            weight, mask = getattr(lstm, name), getattr(lstm, f"{name}_mask")
            assert int((~mask).sum()) == round(sparsity * mask.numel())
            if 0 < sparsity:
                assert weight[mask].abs().min() >= weight[~mask].abs().max()  # which is 0 by now
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    alone = lopsided()
    mk.MagnitudePruner(alone, BOTH[:1]).step_to(0.9)
    assert torch.equal(alone.weight_hh_l0_mask, lstm.weight_hh_l0_mask)


def test_each_in_blocks():
    lstm, order = lopsided(), (torch.arange(128), torch.arange(32))
    pruner = mk.MagnitudePruner(lstm, BOTH, scope="each", block=(8, 8), order={"weight_hh_l0": order})
    pruner.step_to(0.75)
    assert int((~lstm.weight_ih_l0_mask).sum()) == int((~lstm.weight_hh_l0_mask).sum()) == 0.75 * 128 * 32
    blocks = lstm.weight_hh_l0_mask.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).sum((1, 3))
    assert set(blocks.flatten().tolist()) == {0, 64}


def test_a_target_that_the_common_ranking_empties_is_warned_of_once():
    pruner = mk.MagnitudePruner(lopsided(), BOTH)
    pruner.step_to(0.3)  # weight_hh_l0 keeps 40 % where both together keep 70 %
    with pytest.warns(UserWarning, match=r"^weight_hh_l0 keeps .* % of its weights where all targets together keep 40 "
                                         r'%, because .* MagnitudePruner\(..., scope="each"\)'):
        pruner.step_to(0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step_to(0.7)
        mk.MagnitudePruner(lopsided(), BOTH, scope="each").step_to(0.9)
        mk.MagnitudePruner(nn.LSTM(32, 32), BOTH).step_to(0.9)


def test_bad_scope_and_sparsity():
    lstm = nn.LSTM(32, 32)
    with pytest.raises(ValueError, match="^scope must be one of 'global', 'each', got 'layer'"):
        mk.MagnitudePruner(lstm, scope="layer")
    assert not list(lstm.buffers())
    mk.MagnitudePruner(lstm, BOTH[:1]).step_to(0.5)
    pruner = mk.MagnitudePruner(lstm, BOTH, scope="each")
    with pytest.raises(ValueError, match=r"^sparsity must be at least the 0.5 already cut \(2048 of 4096 weights of "
                                         r"weight_hh_l0\), got 0.3"):
        pruner.step_to(0.3)
    assert lstm.weight_ih_l0_mask.all()
    lstm.weight_ih_l0.data[3, 3] = float("nan")
    before = pruner.state_dict()
    with pytest.raises(ValueError, match="got NaN in weight_ih_l0; no mask was changed"):
        pruner.step_to(0.9)
    assert all(torch.equal(before[key], mask) for key, mask in pruner.masks.items())
