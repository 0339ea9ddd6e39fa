"""Checks the lottery protocol: reinitialize_ and rewind_ change the weights and keep the masks."""
from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

from moduli_kernels.pruning.lottery import reinitialize_, rewind_
from moduli_kernels.pruning.pruner import MagnitudePruner
from tests.support.penalty_cases import on_device

pytestmark = on_device


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.decoder = nn.RNN(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.decoder(self.norm(self.rnn(x)[0][-1]))

    def targets(self):
        return [(self.rnn, "weight_hh_l0"), (self.decoder, "weight")]


def trained(sparsity: float = 0.6) -> tuple[Net, MagnitudePruner]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    for share in (0.0, sparsity):
        pruner.step_to(share)
        net(torch.randn(4, 2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, pruner


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(net.state_dict())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- fresh weights ------------------------------------------------------------------------------------------

def test_reinitialize_gives_fresh_weights_on_the_same_masks():
    net, pruner = trained()
    before, parameters = snapshot(net), list(net.parameters())
    reinitialize_(net, pruner)
    after = snapshot(net)
    for name, value in after.items():
        if name.endswith("_mask"):
            assert torch.equal(value, before[name])
        else:
            assert value.isfinite().all() and not torch.equal(value, before[name])
    assert net.norm.weight.eq(1).all()
    for module, name in net.targets():
        weight, mask = getattr(module, name), getattr(module, f"{name}_mask")
        assert weight[~mask].eq(0).all() and weight[mask].ne(0).all()
    assert all(a is b for a, b in zip(parameters, net.parameters()))
    bound = 1 / math.sqrt(8)
    assert net.rnn.weight_ih_l0.abs().max() <= bound  # the bound with which torch initializes RNN(3, 8)


def test_a_generator_makes_it_repeatable_and_spares_the_global_one():
    results = []
    for global_seed in (1, 2):
        net, pruner = trained()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(7)
        reinitialize_(net, pruner, generator=generator)
        assert torch.equal(state, torch.get_rng_state())
        results.append(snapshot(net))
        reinitialize_(net, pruner, generator=generator)
        assert not same(results[-1], snapshot(net))  # the generator has advanced
    assert same(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_generator_on_a_gpu_model(device):
    results = []
    for global_seed in (1, 2):
        net, pruner = trained()
        net.cuda()
        torch.manual_seed(global_seed)
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        reinitialize_(net, pruner, generator=torch.Generator(device).manual_seed(7))
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], torch.cuda.get_rng_state())
        results.append(snapshot(net))
    assert same(*results)


def test_init_fn_and_its_generator():
    def init(model):
        for p in model.parameters():
            p.uniform_(1, 2)

    results = []
    for _ in range(2):
        net, pruner = trained()
        reinitialize_(net, pruner, init, generator=torch.Generator().manual_seed(3))
        results.append(snapshot(net))
        weight, mask = net.rnn.weight_hh_l0, net.rnn.weight_hh_l0_mask
        assert weight[~mask].eq(0).all() and weight[mask].ge(1).all() and net.norm.weight.ge(1).all()
    assert same(*results)


def test_a_parents_reset_has_the_last_word():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def reset_parameters(self):
            nn.init.constant_(self.layer.bias, 5.0)

    net = Parent()
    reinitialize_(net, MagnitudePruner([(net.layer, "weight")]))
    assert net.layer.bias.eq(5).all() and net.layer.weight.ne(0).all()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(1))


def test_parameters_that_nobody_resets_are_refused_and_nothing_changes():
    net = Bare()
    pruner = MagnitudePruner([(net.layer, "weight")])
    pruner.step_to(0.5)
    before = snapshot(net)
    with pytest.raises(ValueError) as error:
        reinitialize_(net, pruner)
    assert str(error.value) == ("model must set every trainable parameter in some reset_parameters(), got "
                                "none that sets scale; pass init_fn, or freeze what should stay.")
    assert same(before, snapshot(net))
    net.scale.requires_grad_(False)
    reinitialize_(net, pruner)
    assert net.scale.eq(1).all() and not torch.equal(net.layer.bias, before["layer.bias"])


def test_an_init_fn_that_fails_changes_nothing():
    net, pruner = trained()
    before, state = snapshot(net), torch.get_rng_state()

    def init(model):
        model.decoder.weight.fill_(3)
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        reinitialize_(net, pruner, init, generator=torch.Generator())
    assert same(before, snapshot(net)) and torch.equal(state, torch.get_rng_state())


def test_multihead_attention_resets_too():
    net = nn.MultiheadAttention(4, 2)
    before = snapshot(net)
    reinitialize_(net, MagnitudePruner([(net, "in_proj_weight")]))
    assert not torch.equal(before["in_proj_weight"], net.in_proj_weight)
    assert net.in_proj_weight.isfinite().all()


def test_a_bad_generator():
    net, pruner = trained()
    with pytest.raises(TypeError) as error:
        reinitialize_(net, pruner, generator=7)
    assert str(error.value) == ("generator must be a torch.Generator, got a int; pass "
                                "torch.Generator().manual_seed(0).")


# --- rewinding ----------------------------------------------------------------------------------------------

def test_rewind_brings_earlier_weights_on_the_same_masks():
    torch.manual_seed(1)
    net = Net()
    unmasked = snapshot(net)  # saved before there was a pruner, so it has no mask keys
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.2)
    masked = snapshot(net)  # has the mask keys of an earlier step
    for _ in range(3):
        net(torch.randn(4, 2, 3)).square().sum().backward()
        optimizer.step()
    pruner.step_to(0.7)
    masks = pruner.state_dict()
    for earlier in (unmasked, masked):
        rewind_(net, pruner, earlier)
        assert same(masks, pruner.state_dict())
        for name, value in earlier.items():
            if not name.endswith("_mask"):
                module, _, parameter = name.rpartition(".")
                mask = getattr(net.get_submodule(module), f"{parameter}_mask", torch.tensor(True))
                assert torch.equal(net.state_dict()[name], value * mask)
    reinitialize_(net, pruner)
    assert same(masks, pruner.state_dict())


def test_rewind_ignores_masks_that_the_model_does_not_save():
    layer = nn.Linear(4, 4)
    layer.register_buffer("weight_mask", torch.eye(4, dtype=torch.bool), persistent=False)
    earlier = {**snapshot(layer), "weight_mask": torch.ones(4, 4, dtype=torch.bool)}
    rewind_(layer, MagnitudePruner([(layer, "weight")]), earlier)
    assert torch.equal(layer.weight, earlier["weight"] * torch.eye(4))


def test_rewind_to_what_does_not_fit_changes_nothing():
    net, pruner = trained()
    good = {k: v + 1 for k, v in snapshot(net).items() if not k.endswith("_mask")}
    before = snapshot(net)
    for bad, part in [
        ({k: v for k, v in good.items() if k != "norm.bias"}, 'Missing key(s) in state_dict: "norm.bias"'),
        ({**good, "extra": torch.ones(1)}, 'Unexpected key(s) in state_dict: "extra"'),
        ({**good, "norm.bias": torch.ones(9)}, "size mismatch for norm.bias"),
    ]:
        with pytest.raises(ValueError, match=re.escape(part)) as error:
            rewind_(net, pruner, bad)
        assert str(error.value).startswith("state_dict must fit the model, pass one saved from this model: ")
        assert same(before, snapshot(net))


def test_rewind_refuses_the_models_own_live_tensors():
    net, pruner = trained()
    with pytest.raises(ValueError) as error:
        rewind_(net, pruner, net.state_dict())
    assert str(error.value) == ("state_dict must hold earlier weights, got the model's own live tensor at "
                                "'rnn.weight_ih_l0'; save copy.deepcopy(model.state_dict()) before training.")


# --- both ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use", [lambda net, pruner: reinitialize_(net, pruner),
                                 lambda net, pruner: rewind_(net, pruner, snapshot(net))])
def test_a_pruner_of_another_model_is_refused(use):
    net, pruner = trained()
    copied = copy.deepcopy(net)
    before = snapshot(copied)
    with pytest.raises(ValueError) as error:
        use(copied, pruner)
    assert str(error.value) == ("pruner must prune modules of the model, got 0.weight_hh_l0 of a RNN that is "
                                "not in it; after a deepcopy make a new MagnitudePruner on the copy.")
    assert same(before, snapshot(copied))


def test_modules_found_under_two_names_and_tied_ones():
    first, shared = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = first.weight
    net = nn.ModuleDict({"a": first, "b": shared, "again": shared, "tied": tied})
    earlier = snapshot(net)
    pruner = MagnitudePruner([(first, "weight"), (shared, "weight"), (tied, "weight")])
    pruner.step_to(0.5)
    reinitialize_(net, pruner)
    rewind_(net, pruner, earlier)
    assert torch.equal(first.weight, earlier["a.weight"] * first.weight_mask)
    assert torch.equal(shared.weight, earlier["b.weight"] * shared.weight_mask)
    assert tied.weight_mask is first.weight_mask
