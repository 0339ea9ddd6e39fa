"""Masks hold through every way in which weights are written."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import moduli_kernels as mk
from moduli_kernels import masks
from tests.support.pruning_cases import Net, loss_of


def pruned(sparsity: float = 0.9, **settings) -> tuple[Net, mk.MagnitudePruner]:
    net = Net()
    pruner = mk.MagnitudePruner(net, ["encoder.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0", "decoder.weight"],
                                scope="each", **settings)
    pruner.step_to(sparsity)
    return net, pruner


def weights(net: Net) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(getattr(module, name).detach(), getattr(module, f"{name}_mask")) for module, name in net.targets()]


def left_at_zero(net: Net) -> float:
    """The share of the masked weights that are 0."""
    zero = sum(int(weight[~mask].eq(0).sum()) for weight, mask in weights(net))
    return zero / sum(int((~mask).sum()) for _, mask in weights(net))


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(net, seed=seed).backward()
        optimizer.step()


# --- optimizers --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam with weight decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, lambd=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_that_the_pruner_was_not_given(make):
    net = Net()
    optimizer = make(net.parameters())
    train(net, optimizer)  # momentum has built up
    pruner = mk.MagnitudePruner(net.targets())
    pruner.step_to(0.9)
    train(net, optimizer, steps=1)
    assert left_at_zero(net) == 1 and pruner.sparsity == pytest.approx(0.9, abs=0.01)
    train(net, optimizer)
    assert left_at_zero(net) == 1
    train(net, make(net.parameters()))  # an optimizer built anew
    assert left_at_zero(net) == 1


def test_an_update_without_an_optimizer_is_seen_masked_by_the_next_forward_pass():
    net, _ = pruned()
    x = torch.randn(5, 4, 3)
    for _ in range(3):
        net.zero_grad()
        net(x).sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * (p.grad + 0.1)
    plain = Net()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if not key.endswith("_mask")})
    assert torch.equal(net(x), plain(x)) and left_at_zero(net) == 1


@pytest.mark.parametrize("kind", [
    lambda optimizer: optimizer, lambda optimizer: [optimizer], lambda optimizer: (OTHER, optimizer),
    lambda optimizer: Wrapper(optimizer)])
def test_an_optimizer_a_list_and_wrappers_are_taken(kind):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pruner = mk.MagnitudePruner(net, optimizer=kind(optimizer))
    pruner.step_to(0.5)
    train(net, optimizer)
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all() and pruner.sparsity == 0.5


OTHER = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class Groups:
    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]


@pytest.mark.parametrize("make", [
    lambda net: torch.optim.SGD(Net().parameters(), lr=0.1), lambda net: [OTHER], lambda net: (),
    lambda net: Wrapper(OTHER), lambda net: torch.optim.SGD(net.decoder.parameters(), lr=0.1),
    lambda net: Groups(Net().parameters())])
def test_optimizers_that_hold_none_of_the_targets_are_refused_and_nothing_is_changed(make):
    net = Net()
    with pytest.raises(ValueError, match="^optimizer must hold at least one of the targets, got .* holds none of them; "
                                         "pass the one that steps these weights"):
        mk.MagnitudePruner(net, optimizer=make(net))
    assert not list(net.buffers()) and not net.rnn._forward_pre_hooks and not net.rnn.weight_hh_l0._backward_hooks


@pytest.mark.parametrize("optimizer", [3, "adam", [OTHER, 3], Wrapper(None), lambda: None])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(TypeError, match="^optimizer must be a torch.optim.Optimizer, a wrapper that has param_groups"):
        mk.MagnitudePruner(Net(), optimizer=optimizer)


# --- other writes ------------------------------------------------------------------------------------------------

def write_data(net):
    net.rnn.weight_hh_l0.data.normal_()


def write_a_vector(net):
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in net.parameters())), net.parameters())


def write_an_initialization(net):
    nn.init.orthogonal_(net.rnn.weight_hh_l0)


def write_a_mutation(net):
    for p in net.parameters():
        p.data.add_(torch.randn_like(p))


def write_through_a_view(net):
    net.rnn.weight_hh_l0.detach().view(-1).fill_(3)


def write_through_numpy(net):
    net.rnn.weight_hh_l0.detach().numpy()[:] = 2


WRITES = [write_data, write_a_vector, write_an_initialization, write_a_mutation, write_through_a_view,
          write_through_numpy]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_pass_sees_masked_weights_whoever_wrote_them(write, grad):
    net, pruner = pruned()
    x = torch.randn(5, 4, 3)
    net(x)
    write(net)
    expected = Net()
    expected.load_state_dict({
        name: p * mask if (mask := dict(net.named_buffers()).get(f"{name}_mask")) is not None else p
        for name, p in net.named_parameters()})
    with torch.set_grad_enabled(grad):
        assert torch.equal(net(x), expected(x))
    assert pruner.sparsity == pytest.approx(0.9, abs=0.02) and left_at_zero(net) == 1


@pytest.mark.parametrize("write", WRITES)
def test_state_dicts_come_out_masked(write):
    net, _ = pruned()
    write(net)
    saved = net.state_dict()
    for path, mask in list(saved.items()):
        if path.endswith("_mask"):
            assert saved[path.removesuffix("_mask")][~mask].eq(0).all()


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_checkpoint_does_not_undo_pruning(assign):
    net, pruner = pruned()
    net.load_state_dict(Net(seed=5).state_dict(), strict=False, assign=assign)
    assert left_at_zero(net) == 1 and pruner.sparsity == pytest.approx(0.9, abs=0.02)
    assert net.encoder.weight[net.encoder.weight_mask].ne(0).all()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer)
    assert left_at_zero(net) == 1


def test_a_checkpoint_with_other_masks_brings_its_own():
    net, pruner = pruned(0.9)
    other, _ = pruned(0.5)
    net.load_state_dict(other.state_dict())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.02)
    for (mine, mask), (theirs, their_mask) in zip(weights(net), weights(other)):
        assert torch.equal(mine, theirs) and torch.equal(mask, their_mask)


@pytest.mark.parametrize("write", [None, *WRITES[:4]])
def test_a_backward_pass_through_two_calls_of_one_module(write):
    """Looking at the weights before each call changes nothing that the first call has kept for its backward pass."""
    net, _ = pruned(0.5)
    if write is not None:
        write(net)
    x = torch.randn(5, 4, 3)
    (net(x) + net(x + 1)).sum().backward()
    for module, name in net.targets():
        mask, grad = getattr(module, f"{name}_mask"), getattr(module, name).grad
        assert grad[~mask].eq(0).all() and grad[mask].ne(0).any()


def channels_last(net):
    return net.to(memory_format=torch.channels_last)


def transposed(net):
    net.weight = nn.Parameter(net.weight.detach().transpose(2, 3).contiguous().transpose(2, 3))
    return net


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("layout", [channels_last, transposed])
def test_a_backward_pass_through_two_calls_whatever_the_layout_of_the_weights(layout, early):
    net = nn.Conv2d(4, 4, 3, padding=1)
    if early:
        layout(net)
    mk.MagnitudePruner([(net, "weight")]).step_to(0.5)
    layout(net)
    assert not net.weight.is_contiguous()
    net.weight.data.add_(1)
    net(net(torch.randn(2, 4, 5, 5))).sum().backward()
    assert net.state_dict()["weight"][~net.weight_mask].eq(0).all() and net.weight.grad[~net.weight_mask].eq(0).all()


def test_autocast_forgets_the_weights_that_it_has_rounded_before_more_were_masked():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    pruner = mk.MagnitudePruner([(layer, "weight")])
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        pruner.step_to(0.9)
        within = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), within)


def test_the_sparsity_is_what_the_weights_are_with_one_warning_where_they_differ():
    net, pruner = pruned()
    masked = {key: int((~mask).sum()) for key, mask in pruner.masks.items()}
    total = sum(mask.numel() for mask in pruner.masks.values())
    net.decoder.weight.data.fill_(1)
    key = "decoder.weight"
    with pytest.warns(UserWarning, match=rf"^{masked[key]} masked weights \(the first in {key}\) are not 0: "):
        assert pruner.sparsity == (sum(masked.values()) - masked[key]) / total
    assert pruner.densities()[key] == 1 and pruner.densities()["encoder.weight"] < 0.2  # without a second warning
    pruner.apply()
    assert pruner.sparsity == sum(masked.values()) / total


def test_the_masked_weights_of_a_sparse_rnn_count_as_zero_whatever_they_hold():
    net = mk.SparseRNN(3, 8)
    pruner = mk.MagnitudePruner(net)
    pruner.step_to(0.75)
    net.weight_hh_l0.data.fill_(1)
    assert pruner.sparsity == 0.75 and pruner.densities() == {"weight_hh_l0": 0.25}


# --- copies ------------------------------------------------------------------------------------------------------

def test_a_copy_is_held_as_the_net_is_and_apart_from_it():
    net, pruner = pruned()
    twin = copy.deepcopy(net)
    pruner.step_to(1.0)
    assert any(mask.any() for _, mask in weights(twin))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1))
    assert left_at_zero(twin) == 1
    write_a_mutation(twin)
    twin(torch.randn(5, 4, 3))
    assert left_at_zero(twin) == 1
    mk.MagnitudePruner(twin.targets()).make_permanent()
    assert not twin.rnn._forward_pre_hooks and not twin.rnn._state_dict_pre_hooks and not list(twin.buffers())


def test_another_models_parameters_are_never_written():
    net, _ = pruned(0.5)
    teacher = Net(seed=7)
    before = copy.deepcopy(teacher.state_dict())
    x = torch.randn(5, 4, 3)
    theirs = dict(teacher.named_parameters())
    output = torch.func.functional_call(net, theirs, (x,))
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not teacher.rnn.weight_hh_l0._backward_hooks
    expected = Net()
    expected.load_state_dict({key: value * dict(net.named_buffers()).get(f"{key}_mask", torch.ones(()))
                              for key, value in before.items()})
    assert torch.equal(output, expected(x))
    output.sum().backward()
    assert teacher.rnn.weight_hh_l0.grad[~net.rnn.weight_hh_l0_mask].eq(0).all()
    assert net.rnn.weight_hh_l0 is dict(net.named_parameters())["rnn.weight_hh_l0"]  # its own are back


def test_a_pass_that_fails_puts_the_parameter_back():
    layer = nn.Linear(3, 2)
    mk.MagnitudePruner([(layer, "weight")]).step_to(0.5)
    layer.weight = own = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RuntimeError):
        layer(torch.ones(4, 5))
    assert layer.weight is own and not layer._forward_hooks


def test_torch_func_grad_sees_masked_weights_and_gives_masked_gradients():
    net, _ = pruned(0.5)
    x = torch.randn(5, 4, 3)
    values = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().sum())(values)
    for name, grad in grads.items():
        mask = dict(net.named_buffers()).get(f"{name}_mask")
        assert grad.ne(0).any() and (mask is None or grad[~mask].eq(0).all())


# --- leaving -----------------------------------------------------------------------------------------------------

def test_letting_go_of_one_weight_holds_the_others():
    net, _ = pruned()
    both = [(net.rnn, "weight_hh_l0"), (net.rnn, "weight_ih_l0")]
    mk.MagnitudePruner(both[:1]).remove_hooks()
    write_a_mutation(net)
    net(torch.randn(5, 4, 3))
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].ne(0).all()
    assert net.rnn.weight_ih_l0[~net.rnn.weight_ih_l0_mask].eq(0).all()
    mk.MagnitudePruner(both[:1])  # a new pruner holds it again
    write_a_mutation(net)
    net(torch.randn(5, 4, 3))
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all()


@pytest.mark.parametrize("parametrized", [
    lambda layer: nn.utils.parametrizations.weight_norm(layer),
    lambda layer: nn.utils.parametrizations.orthogonal(layer), lambda layer: nn.utils.spectral_norm(layer)])
def test_a_mask_that_would_count_no_more_is_an_error(parametrized):
    layer = nn.Linear(3, 3)
    pruner = mk.MagnitudePruner([(layer, "weight")])
    pruner.step_to(0.5)
    parametrized(layer)
    with pytest.raises(RuntimeError, match="^weight of .*Linear must be a plain Parameter while it has a mask"):
        layer(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="has lost its parameter"):
        pruner.step_to(0.6)
    del layer.weight_mask
    layer(torch.ones(2, 3))


@pytest.mark.parametrize(("mask", "words"), [
    (torch.rand(2, 3), r"torch.float32 \(2, 3\)"), (torch.ones(2, 1, dtype=torch.bool), r"torch.bool \(2, 1\)")])
def test_a_buffer_in_the_place_of_a_mask_that_would_mask_nothing_is_an_error(mask, words):
    layer = nn.Linear(3, 2)
    mk.MagnitudePruner([(layer, "weight")]).step_to(0.5)
    layer.weight_mask = mask
    with pytest.raises(RuntimeError, match=rf"^weight_mask of Linear must be a torch.bool mask \(2, 3\), got {words}"):
        layer(torch.ones(2, 3))
    layer.weight_mask = mask.bool().expand(2, 3).contiguous()
    layer(torch.ones(2, 3))
    del layer.weight_mask
    layer(torch.ones(2, 3))


# --- torch.nn.utils.prune over our masks -------------------------------------------------------------------------

METHODS = {
    "random": lambda m: prune.random_unstructured(m, "weight", amount=0.2),
    "magnitude": lambda m: prune.l1_unstructured(m, "weight", amount=0.2),
    "structured": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0),
    "global": lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.2),
    "custom": lambda m: prune.custom_from_mask(m, "weight", torch.ones(6, 8)),
    "twice": lambda m: prune.l1_unstructured(prune.random_unstructured(m, "weight", amount=0.2), "weight", amount=0.2),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_torchs_prune_over_a_mask_keeps_what_it_has_masked(method):
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    mk.MagnitudePruner([(layer, "weight")]).step_to(0.7)
    mask = layer.weight_mask.clone()
    method(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        layer(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    layer(torch.randn(4, 8))
    assert layer.weight[~mask].eq(0).all() and layer.weight_mask[~mask].eq(0).all()
    prune.remove(layer, "weight")
    assert layer.weight[~mask].eq(0).all()


def test_a_buffer_that_is_no_mask_of_ours_is_left_alone():
    layer = nn.Linear(3, 2)
    mk.MagnitudePruner([(layer, "weight")]).step_to(0.5)
    layer.register_buffer("attn_mask", torch.ones(2, 3))
    other = nn.Linear(3, 2)
    other.register_buffer("weight_mask", torch.full((2, 3), 0.5))
    assert layer.attn_mask.eq(1).all() and other.weight_mask.eq(0.5).all()


# --- a mask of a SparseRNN, without a pruner ---------------------------------------------------------------------

def test_a_mask_set_by_hand_is_held_as_well():
    net = mk.SparseRNN(3, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(5, 2, 3)
    for _ in range(2):
        net(x)[0].sum().backward()
        optimizer.step()
    net.set_mask("weight_hh_l0", torch.rand(8, 8) < 0.3)
    net(x)[0].sum().backward()
    optimizer.step()
    mask = net.weight_hh_l0_mask
    assert net.weight_hh_l0[~mask].eq(0).all() and not net._forward_pre_hooks  # it multiplies by its masks itself
    net.weight_hh_l0.data.normal_()
    assert net.state_dict()["weight_hh_l0"][~mask].eq(0).all()
    net.set_mask("weight_hh_l0", None)
    assert not net._state_dict_pre_hooks and not net.weight_hh_l0._backward_hooks


def test_what_holds_a_mask_is_registered_once():
    layer = nn.Linear(3, 2)
    for _ in range(3):
        masks.set_mask(layer, "weight", torch.ones(2, 3, dtype=torch.bool))
    assert len(layer._forward_pre_hooks) == len(layer.weight._backward_hooks) == 1 and masks.is_held(layer, "weight")
    masks.remove_mask(layer, "weight")
    assert not layer._forward_pre_hooks and not layer.weight._backward_hooks and not masks.is_held(layer, "weight")
