"""Masks of SparseRNN: setting, saving, loading, torch.nn.utils.prune, to and from nn.RNN, and what is counted when."""
from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import moduli_kernels as mk
from moduli_kernels import backends
from moduli_kernels.rnn import crossovers
from tests.support.penalty_cases import DEVICE, needs_kernels, on_device
from tests.support.rnn_cases import PATHS, assert_same, draw, draw_mask, net_of, plain_rnn, quiet, run, weight_names

pytestmark = [on_device, *quiet]


# --- set_mask -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_set_mask_and_take_it_away(path):
    net, mask = mk.SparseRNN(4, 6, path=path), draw_mask(6, 6, density=0.3)
    before = net.weight_hh_l0.detach().clone()
    net.set_mask("weight_hh_l0", mask)
    assert torch.equal(net.weight_hh_l0_mask, mask) and net.weight_hh_l0_mask.data_ptr() != mask.data_ptr()
    assert torch.equal(net.weight_hh_l0, before.masked_fill(~mask, 0))
    assert "masks of weight_hh_l0" in repr(net)
    buffer = net.weight_hh_l0_mask
    net.set_mask("weight_hh_l0", mask & draw_mask(6, 6, density=0.5, seed=1))
    assert net.weight_hh_l0_mask is buffer  # in place: compiled graphs and pruners hold it
    net.set_mask("weight_hh_l0", None)
    net.set_mask("weight_hh_l0", None)
    assert not list(net.buffers()) and net.state_dict().keys() == nn.RNN(4, 6).state_dict().keys()


@pytest.mark.parametrize("path", PATHS)
def test_masks_of_biases(path):
    net = mk.SparseRNN(4, 6, 2, path=path)
    mk.MagnitudePruner([(net, "bias_ih_l0"), (net, "weight_hh_l1")]).step_to(0.5)
    net.set_mask("bias_hh_l1", draw_mask(6, density=0.5))
    with torch.no_grad():
        net.bias_ih_l0[~net.bias_ih_l0_mask] = math.nan
    assert not net.bias_ih_l0_mask.all()
    x = draw(5, 3, 4)
    assert_same(net, run(net, x), run(plain_rnn(net), x), 1e-5)


NAMES = "weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0"
BAD_MASKS = {
    "name": ("weight_hh", torch.ones(6, 6, dtype=torch.bool), ValueError,
             f"name must be a weight of this SparseRNN, got 'weight_hh'; it has {NAMES}."),
    "no_name": (None, None, ValueError, f"name must be a weight of this SparseRNN, got a NoneType; it has {NAMES}."),
    "list": ("weight_hh_l0", [[True]], TypeError,
             "mask must be a bool tensor (True = kept) or None, got a list; pass weight != 0, or None."),
    "floats": ("weight_hh_l0", torch.ones(6, 6), TypeError,
               "mask must be a bool tensor (True = kept), got torch.float32; convert it with .bool()."),
    "shape": ("weight_ih_l0", torch.ones(6, 6, dtype=torch.bool), ValueError,
              "mask must have the shape (6, 4) of weight_ih_l0, got (6, 6); build it with "
              "torch.ones_like(module.weight_ih_l0, dtype=torch.bool)."),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_masks_that_do_not_fit(case):
    name, mask, error, message = BAD_MASKS[case]
    net = mk.SparseRNN(4, 6)
    before = net.weight_ih_l0.detach().clone()
    with pytest.raises(error) as caught:
        net.set_mask(name, mask)
    assert str(caught.value) == message and not list(net.buffers()) and torch.equal(net.weight_ih_l0, before)


def test_a_buffer_of_another_shape():
    net = mk.SparseRNN(4, 6)
    net.register_buffer("weight_hh_l0_mask", torch.ones(6, 1, dtype=torch.bool))
    with pytest.raises(ValueError) as error:
        net(draw(5, 3, 4))
    assert str(error.value) == ("weight_hh_l0_mask of SparseRNN must have the shape (6, 6) of weight_hh_l0, got "
                                "(6, 1); set it with set_mask('weight_hh_l0', mask).")
    mask = draw_mask(6, 6, density=0.5)
    net.set_mask("weight_hh_l0", mask)
    assert torch.equal(net.weight_hh_l0_mask, mask) and net(draw(5, 3, 4))[0].isfinite().all()


def test_set_mask_takes_the_place_of_a_mask_of_floats_and_holds_it():
    net, mask = mk.SparseRNN(4, 6), draw_mask(6, 6, density=0.5)
    net.register_buffer("weight_hh_l0_mask", torch.ones(6, 6))
    net.set_mask("weight_hh_l0", mask)
    assert torch.equal(net.weight_hh_l0_mask, mask) and net.weight_hh_l0_mask.dtype == torch.bool
    bare = mk.SparseRNN(4, 6)
    bare.register_buffer("weight_hh_l0_mask", torch.ones(6, 6, dtype=torch.bool))  # nothing holds it
    bare.set_mask("weight_hh_l0", mask)
    for each in (net, bare):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, weight_decay=0.1)
        each.weight_hh_l0.data.fill_(1)
        each(draw(5, 3, 4))[0].sum().backward()
        optimizer.step()
        assert each.weight_hh_l0[~mask].eq(0).all() and each.weight_hh_l0[mask].ne(0).all()


# --- state_dict ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_with_and_without_masks(assign):
    net = net_of(4, 6, 2, densities=(None, 0.3), bidirectional=True)
    state, x = net.state_dict(), draw(5, 3, 4)
    masks = {f"{name}_mask" for name in weight_names(net) if "hh" in name}
    assert {key for key in state if key.endswith("_mask")} == masks
    other = mk.SparseRNN(4, 6, 2, bidirectional=True, path="sparse")
    outer = nn.Sequential(other)
    outer.load_state_dict({f"0.{key}": value.clone() for key, value in state.items()}, assign=assign)
    assert torch.equal(other(x)[0], net(x)[0])
    assert other.weight_hh_l0_mask.dtype == torch.bool
    plain = nn.RNN(4, 6, 2, bidirectional=True)
    other = mk.SparseRNN(4, 6, 2, bidirectional=True, path="sparse")
    other.load_state_dict(plain.state_dict(), assign=assign)
    plain.load_state_dict(other.state_dict())
    assert torch.allclose(other(x)[0], plain(x)[0], atol=1e-6)
    with pytest.raises(RuntimeError, match="Missing key.*weight_hh_l0_mask"):
        net.load_state_dict(plain.state_dict())
    net.load_state_dict(plain.state_dict(), strict=False)  # keeps the masks
    assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)


@pytest.mark.parametrize(("mask", "came"), [
    (torch.ones(6, 5, dtype=torch.bool), "torch.bool (6, 5)"), (torch.ones(6, 6), "torch.float32 (6, 6)"),
    (3, "a int")])
def test_saved_masks_that_do_not_fit(mask, came):
    net = mk.SparseRNN(4, 6)
    message = (f"weight_hh_l0_mask must be a torch.bool mask (6, 6), got {came}; save the state_dict of a net with the "
               "same sizes, pruned by MagnitudePruner or set_mask.")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        net.load_state_dict(net.state_dict() | {"weight_hh_l0_mask": mask})
    assert not list(net.buffers())


def test_a_pruner_goes_on_with_loaded_masks():
    net = net_of(4, 6)
    twin = mk.SparseRNN(4, 6)
    twin.load_state_dict(net.state_dict())
    pruner = mk.MagnitudePruner([(twin, "weight_hh_l0")])
    assert torch.equal(pruner.masks["0.weight_hh_l0"], net.weight_hh_l0_mask)
    pruner.step_to(0.9)
    assert not (twin.weight_hh_l0_mask & ~net.weight_hh_l0_mask).any()


# --- torch.nn.utils.prune ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_nets_pruned_by_torch_work(path):
    net = mk.SparseRNN(4, 6, path=path)
    mask = draw_mask(6, 6, density=0.3)
    torch_prune.custom_from_mask(net, "weight_hh_l0", mask)
    x, optimizer = draw(5, 3, 4), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    plain = nn.RNN(4, 6)
    for _ in range(3):
        state = {name: getattr(net, name).detach() for name, _ in plain.named_parameters()}
        plain.load_state_dict(state | {"weight_hh_l0": net.weight_hh_l0_orig.detach() * mask})
        optimizer.zero_grad(), plain.zero_grad()
        for each in (net, plain):
            each(x)[0].square().sum().backward()
        assert torch.allclose(net.weight_hh_l0_orig.grad, plain.weight_hh_l0.grad * mask, atol=1e-5)
        optimizer.step()
    with pytest.raises(ValueError) as error:
        net.set_mask("weight_hh_l0", mask)
    assert str(error.value) == (
        "name must be a plain parameter, got weight_hh_l0 of SparseRNN pruned by torch.nn.utils.prune, whose mask "
        "decides; take it over with MagnitudePruner.from_torch_prune(module) first.")
    net(x)
    taken = mk.SparseRNN.from_rnn(net, path=path)
    assert torch.equal(taken.weight_hh_l0_mask, mask) and torch.allclose(taken(x)[0], net(x)[0], atol=1e-6)
    assert torch.allclose(net.to_rnn()(x)[0], net(x)[0], atol=1e-6)
    mk.MagnitudePruner.from_torch_prune(net)
    assert torch.equal(net.weight_hh_l0_mask, mask) and torch.allclose(taken(x)[0], net(x)[0], atol=1e-6)


# --- to and from nn.RNN -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, {"dtype": torch.float64}, {"num_layers": 2, "nonlinearity": "relu", "bias": False, "batch_first": True,
                                   "bidirectional": True, "dropout": 0.3}])
def test_from_rnn_and_back(settings):
    plain = nn.RNN(4, 6, **settings).eval()
    pruner = mk.MagnitudePruner([(plain, "weight_hh_l0"), (plain, "weight_ih_l0")])
    pruner.step_to(0.4)
    plain.weight_ih_l0.requires_grad_(False)
    state = torch.get_rng_state()
    net = mk.SparseRNN.from_rnn(plain, path="sparse")
    assert torch.equal(state, torch.get_rng_state())
    x = draw(5, 3, 4, dtype=plain.weight_hh_l0.dtype)
    assert torch.allclose(net(x)[0], plain(x)[0], atol=1e-6)
    assert not net.training
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in plain.parameters()]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor) and net.state_dict()[name].data_ptr() == tensor.data_ptr()
    with torch.no_grad():
        net.weight_hh_l0[~net.weight_hh_l0_mask] = math.nan
    back = net.to_rnn()
    assert type(back) is nn.RNN and not list(back.buffers()) and back.weight_hh_l0[~net.weight_hh_l0_mask].eq(0).all()
    assert torch.allclose(back(x)[0], plain(x)[0], atol=1e-6) and not back.training


def test_a_leak_goes_along_but_not_into_nn_rnn():
    net = net_of(4, 6, leak=0.25)
    twin = mk.SparseRNN.from_rnn(net)
    assert twin.leak == 0.25 and torch.equal(twin(draw(5, 3, 4))[0], net(draw(5, 3, 4))[0])
    with pytest.raises(ValueError) as error:
        net.to_rnn()
    assert str(error.value) == "leak must be 1 for to_rnn() (torch.nn.RNN knows no leak), got 0.25; keep the SparseRNN."


@pytest.mark.parametrize("module", [nn.LSTM(3, 3), nn.Linear(3, 3), "rnn"])
def test_from_what_is_no_rnn(module):
    kind = repr(module) if isinstance(module, str) else f"a {type(module).__name__}"
    with pytest.raises(TypeError) as error:
        mk.SparseRNN.from_rnn(module)
    assert str(error.value) == f"rnn must be a torch.nn.RNN, got {kind}; LSTM and GRU have no sparse form."


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")  # torch's, of every nn.RNN
def test_to_rnn_can_be_exported():
    net, x = net_of(4, 6, 2), draw(5, 3, 4)
    exported = torch.export.export(net.to_rnn().eval(), (x,))
    assert torch.allclose(exported.module()(x)[0], net(x)[0], atol=1e-6)


# --- what is counted, and when ------------------------------------------------------------------------------------

@needs_kernels  # else the path does not depend on them
@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA a count is remembered by version")
def test_densities_are_counted_once_a_call(monkeypatch):
    monkeypatch.setattr(backends, "forced", None)
    net, counted = net_of(4, 6, 2, densities=(0.5, 0.3), path="auto"), []
    count = torch.count_nonzero
    monkeypatch.setattr(torch, "count_nonzero", lambda mask: counted.append(1) or count(mask))
    for mode in (torch.enable_grad(), torch.no_grad()):
        for path in ("sparse", "dense"):
            monkeypatch.setattr(crossovers, "margin", lambda *_, path=path: 0.0 if path == "sparse" else 1e9)
            counted.clear()
            with mode:
                net(draw(5, 3, 4))
            assert len(counted) == 4
    net.set_mask("weight_hh_l1", None)
    assert net._densities({})[1] == pytest.approx((36 + int(net.weight_hh_l0_mask.sum())) / 72)


@pytest.mark.parametrize(("path", "batch"), [("dense", 3), ("sparse", 1)])
def test_what_takes_weights_as_they_are_sees_every_change_of_weights_and_masks(path, batch):
    net, x = net_of(4, 6, path=path), draw(5, batch, 4)
    other = {key: v + 1 if v.is_floating_point() else ~v for key, v in net.state_dict().items()}
    with torch.no_grad():
        for change in (lambda: net.weight_hh_l0.add_(1), lambda: net.weight_hh_l0_mask.logical_not_(),
                       lambda: setattr(net.weight_hh_l0, "data", torch.ones(6, 6)),
                       lambda: net.load_state_dict(other),
                       lambda: net.weight_hh_l0.masked_fill_(~net.weight_hh_l0_mask, math.nan)):
            for _ in range(2):
                assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)
            change()
            assert torch.allclose(net(x)[0], plain_rnn(net)(x)[0], atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA nothing is looked up")
def test_weights_that_are_0_where_masked_are_taken_as_they_are():
    """Without gradients, and where the call may look: no copy of the weight at each call."""
    net = net_of(4, 6, path="dense")

    def taken(counted) -> torch.Tensor:
        return net._masked_weight("weight_hh_l0", net.weight_hh_l0, counted)

    with torch.no_grad():
        assert taken({}) is net.weight_hh_l0 and taken(None) is not net.weight_hh_l0
        net.weight_hh_l0.fill_(1)
        assert torch.equal(taken({}), net.weight_hh_l0_mask.float())
    assert taken({}) is not net.weight_hh_l0
    net.weight_hh_l0.requires_grad_(False).masked_fill_(~net.weight_hh_l0_mask, 0)
    assert taken({}) is net.weight_hh_l0


@pytest.mark.parametrize(("density", "batch", "whole"),
                         [(0.2, 1, True), (0.05, 1, False), (0.4, 2, False), (0.9, 2, True)])
def test_the_sparse_path_leaves_out_masks_of_weights_that_it_reads_whole_and_that_are_0_anyway(density, batch, whole):
    net = mk.SparseRNN(4, 40, path="sparse")
    net.set_mask("weight_hh_l0", torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < density)

    def left_out():
        return net._layers(net._flat_weights, batch, {})[0].mask_hh is None

    assert not left_out()  # the gradient needs it
    with torch.no_grad():
        assert left_out() == whole
        net.weight_hh_l0.add_(1)
        assert not left_out()


@pytest.mark.parametrize("path", PATHS)
def test_inference_mode(path):
    with torch.inference_mode():
        net = net_of(4, 6, path=path)
        for mask in (draw_mask(6, 6, density=0.5, seed=5), draw_mask(6, 6, density=0.5, seed=6)):
            net.weight_hh_l0.copy_(draw(6, 6)), net.weight_hh_l0_mask.copy_(mask)
            assert torch.allclose(net(draw(5, 3, 4))[0], plain_rnn(net)(draw(5, 3, 4))[0], atol=1e-6)
