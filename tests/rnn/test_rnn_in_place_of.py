"""`model.rnn = SparseRNN.from_rnn(model.rnn)` at any time: optimizer, regularizer and pruner that were made before go
on working on the net, since Parameters and masks are shared; `copy=True` makes an independent net."""
from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

import moduli_kernels as mk
from tests.support.penalty_cases import on_device
from tests.support.rnn_cases import draw, draw_mask, net_of, quiet

pytestmark = [on_device, *quiet]

N = 12
PATHS = ("auto", "sparse", "dense")


class Model(nn.Module):
    def __init__(self, cls: type[nn.RNN] = nn.RNN, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = cls(4, N, **settings), nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def trained(replace_at: int | None, optimizer: str, path: str, cls: type[nn.RNN] = nn.RNN) -> tuple[Model, list[float]]:
    """Trains a model with a penalty and a pruner; at a step its net is replaced, and all else stays as it is."""
    model = Model(cls)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    reg = mk.regularize(model.rnn, strength=0.1, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    pruner = mk.MagnitudePruner([(model.rnn, "weight_hh_l0"), (model.rnn, "weight_ih_l0")], optimizer=optimizer)
    losses = []
    for step in range(12):
        if step == replace_at:
            model.rnn = mk.SparseRNN.from_rnn(model.rnn, path=path)
        if step % 3 == 0:
            pruner.step_to(step / 12)
        loss = model(draw(5, 3, 4, seed=step)).square().mean() + reg()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name in ("weight_hh_l0", "weight_ih_l0"):
            mask = getattr(model.rnn, f"{name}_mask")
            assert getattr(model.rnn, name).grad[~mask].eq(0).all()
        optimizer.step()
        for name in ("weight_hh_l0", "weight_ih_l0"):
            assert getattr(model.rnn, name)[~getattr(model.rnn, f"{name}_mask")].eq(0).all()
        assert sum(int((~mask).sum()) for mask in model.rnn.buffers()) == round(pruner.sparsity * (N * N + 4 * N))
    assert pruner.sparsity == 0.75
    return model, losses


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("replace_at", [0, 5])
def test_training_goes_on_as_if_nothing_had_been_replaced(path, optimizer, replace_at):
    model, losses = trained(replace_at, optimizer, path)
    same, want = trained(None, optimizer, path)
    assert losses == pytest.approx(want, rel=1e-4)
    assert model.state_dict().keys() == same.state_dict().keys()
    for name, its in same.state_dict().items():
        assert torch.allclose(model.state_dict()[name], its, atol=1e-4), name
    assert isinstance(model.rnn, mk.SparseRNN)


def test_a_sparse_rnn_in_place_of_another():
    model, losses = trained(4, "sgd", "sparse", mk.SparseRNN)
    assert losses == pytest.approx(trained(None, "sgd", "sparse", mk.SparseRNN)[1], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_what_is_shared(settings):
    rnn = net_of(4, N, densities=(None, 0.3), leak=0.5, **settings)
    rnn.set_order("weight_hh_l0", torch.randperm(N))
    rnn.weight_ih_l0.requires_grad_(False)
    rnn.eval()
    shared, copied = mk.SparseRNN.from_rnn(rnn), mk.SparseRNN.from_rnn(rnn, copy=True)
    for name, tensor in rnn.state_dict(keep_vars=True).items():
        assert shared.state_dict(keep_vars=True)[name] is tensor
        own = copied.state_dict(keep_vars=True)[name]
        assert torch.equal(own, tensor) and own.data_ptr() != tensor.data_ptr()
        assert own.requires_grad == tensor.requires_grad
    for net in (shared, copied):
        assert not net.training and net.leak == 0.5 and torch.equal(net(draw(5, 3, 4))[0], rnn(draw(5, 3, 4))[0])
    assert copied.weight_hh_l0.grad is None


def test_a_copy_is_independent():
    model = Model()
    pruner = mk.MagnitudePruner([(model.rnn, "weight_hh_l0")])
    pruner.step_to(0.25)
    net = mk.SparseRNN.from_rnn(model.rnn, copy=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruner.step_to(0.9)
    with torch.no_grad():
        model.rnn.bias_hh_l0.add_(1)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    own = mk.MagnitudePruner([(net, "weight_hh_l0")])
    own.step_to(0.5)
    assert pruner.sparsity == pytest.approx(0.9, abs=0.01) and own.sparsity == 0.5


@pytest.mark.parametrize("who", ["the old pruner", "set_mask", "load_state_dict", "a new pruner"])
def test_every_change_of_a_mask_reaches_both(who):
    model = Model()
    old, pruner = model.rnn, mk.MagnitudePruner([(model.rnn, "weight_hh_l0")])
    model.rnn = mk.SparseRNN.from_rnn(model.rnn)
    mask = model.rnn.weight_hh_l0_mask
    if who == "the old pruner":
        pruner.step_to(0.5)
    elif who == "set_mask":
        model.rnn.set_mask("weight_hh_l0", draw_mask(N, N, density=0.5))
    elif who == "load_state_dict":
        pruner.load_state_dict({key: draw_mask(N, N, density=0.5) for key in pruner.masks})
    else:
        mk.MagnitudePruner([(model.rnn, "weight_hh_l0")]).step_to(0.5)
    assert model.rnn.weight_hh_l0_mask is old.weight_hh_l0_mask is mask and not mask.all()
    assert pruner.sparsity == pytest.approx(1 - int(mask.sum()) / N**2) and model.rnn.weight_hh_l0[~mask].eq(0).all()


def test_the_old_net_may_go():
    model = Model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    mk.MagnitudePruner([(model.rnn, "weight_hh_l0")], optimizer=optimizer).step_to(0.5)
    for step in range(4):
        if step == 2:
            model.rnn = mk.SparseRNN.from_rnn(model.rnn)
            gc.collect()
        optimizer.zero_grad()
        model(draw(5, 3, 4)).square().sum().backward()
        optimizer.step()
        assert model.rnn.weight_hh_l0[~model.rnn.weight_hh_l0_mask].eq(0).all()
    assert model.state_dict()["rnn.weight_hh_l0"][~model.rnn.weight_hh_l0_mask].eq(0).all()


# --- moving, saving, copying --------------------------------------------------------------------------------------

@pytest.mark.parametrize("moves", ["double", "bfloat16", "share_memory", "to a device"])
def test_moving_the_new_net_moves_the_old_ones_parameters_and_masks(moves):
    model = Model()
    old, pruner = model.rnn, mk.MagnitudePruner([(model.rnn, "weight_hh_l0")])
    model.rnn = mk.SparseRNN.from_rnn(model.rnn)
    mask = model.rnn.weight_hh_l0_mask
    {"double": lambda: model.double(), "bfloat16": lambda: model.bfloat16(),
     "share_memory": lambda: model.share_memory(),
     "to a device": lambda: model._apply(torch.clone)}[moves]()  # as .to("cuda") does: other tensors of the same kind
    assert model.rnn.weight_hh_l0_mask is old.weight_hh_l0_mask is mask
    assert model.rnn.weight_hh_l0 is old.weight_hh_l0 and mask.dtype == torch.bool
    pruner.step_to(0.5)
    assert model.rnn.weight_hh_l0_mask is mask and int(mask.sum()) == N * N // 2
    model(draw(5, 3, 4, dtype=model.out.weight.dtype)).sum().backward()
    assert model.rnn.weight_hh_l0.grad[~mask].eq(0).all()


def test_a_mask_that_was_left_behind_is_an_error_in_words():
    """nn.RNN moves its Parameters, which are shared, and makes another buffer of its mask."""
    net = net_of(4, N)
    net._buffers["weight_hh_l0_mask"] = net.weight_hh_l0_mask.to("meta")
    with pytest.raises(RuntimeError) as error:
        net(draw(5, 3, 4))
    assert str(error.value) == (
        f"weight_hh_l0_mask of SparseRNN must be on the device of weight_hh_l0, {net.weight_hh_l0.device}, got meta; "
        "move this net with .to() as well (another net has its Parameters, and was moved).")


def test_copies_and_pickles_of_a_model_and_its_pruner():
    model = Model()
    pruner = mk.MagnitudePruner([(model.rnn, "weight_hh_l0")])
    model.rnn = mk.SparseRNN.from_rnn(model.rnn)
    for twin, its in (copy.deepcopy((model, pruner)), pickle.loads(pickle.dumps((model, pruner)))):
        its.step_to(0.5)
        assert int(twin.rnn.weight_hh_l0_mask.sum()) == N * N // 2 and model.rnn.weight_hh_l0_mask.all()
    other = Model(mk.SparseRNN)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(draw(5, 3, 4)), model(draw(5, 3, 4)))


# --- nets pruned by torch.nn.utils.prune --------------------------------------------------------------------------

@pytest.mark.parametrize("path", PATHS)
def test_a_net_pruned_by_torch_shares_the_original_and_has_a_mask_of_its_own(path):
    model = Model()
    nn.utils.prune.random_unstructured(model.rnn, "weight_hh_l0", 0.5)
    old, optimizer, x = model.rnn, OPTIMIZERS["sgd"](model.parameters()), draw(5, 3, 4)
    want = old(x)[0].detach()
    model.rnn = mk.SparseRNN.from_rnn(model.rnn, path=path)
    assert model.rnn.weight_hh_l0 is old.weight_hh_l0_orig and torch.allclose(model.rnn(x)[0], want, atol=1e-6)
    assert model.rnn.weight_hh_l0_mask.dtype == torch.bool
    before = model.rnn.weight_hh_l0.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    mask = model.rnn.weight_hh_l0_mask
    assert (model.rnn.weight_hh_l0 != before)[mask].any() and torch.allclose(model.rnn(x)[0], old(x)[0], atol=1e-6)
    assert model.state_dict()["rnn.weight_hh_l0"][~mask].eq(0).all()


def test_a_mask_of_other_numbers_by_torch_prune_is_multiplied_in():
    rnn, x = nn.RNN(4, N), draw(5, 3, 4)
    nn.utils.prune.custom_from_mask(rnn, "weight_hh_l0", draw_mask(N, N, density=0.7) * 0.5)
    net = mk.SparseRNN.from_rnn(rnn)
    assert torch.allclose(net(x)[0], rnn(x)[0], atol=1e-6) and net.weight_hh_l0 is not rnn.weight_hh_l0_orig
