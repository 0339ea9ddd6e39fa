"""Checks the hooks on gradients and optimizer steps that keep pruned weights at 0, until they are removed."""
from __future__ import annotations

import copy
import gc
import pickle
import pickletools
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from moduli_kernels.pruning.pruner import MagnitudePruner
from tests.support.penalty_cases import on_device
from tests.support.pruning_cases import Net, Weights, loss_of

pytestmark = on_device


# --- nothing comes back -------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam_decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov_foreach": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, nesterov=True, foreach=True),
    "rmsprop_momentum": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9),
}


def state_of(optimizer, weight) -> list[torch.Tensor]:
    """What the optimizer has gathered of each entry of a weight."""
    state = optimizer.state[weight].values() if weight in optimizer.state else ()
    return [v for v in state if isinstance(v, torch.Tensor) and v.shape == weight.shape]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_pruned_weight_never_comes_back(make):
    net = Net()
    optimizer = make(net.parameters())
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    ever_cut = {key: ~mask for key, mask in pruner.masks.items()}
    remembered = 0
    for step in range(60):
        if step % 12 == 11:  # momentum has built up when a weight is masked
            gathered = [[v.clone() for v in state_of(optimizer, getattr(*target))] for target in net.targets()]
            pruner.step_to(0.15 * (step // 12 + 1))
            remembered += sum(int(v[~mask].ne(0).any())
                              for state, mask in zip(gathered, pruner.masks.values()) for v in state)
        optimizer.zero_grad()
        loss_of(net, seed=step).backward()
        for module, name in net.targets():
            weight, mask = getattr(module, name), getattr(module, f"{name}_mask")
            assert weight.grad[~mask].eq(0).all()
        optimizer.step()
        for (module, name), key in zip(net.targets(), pruner.masks):
            weight, mask = getattr(module, name), getattr(module, f"{name}_mask")
            assert not (mask & ever_cut[key]).any()
            ever_cut[key] |= ~mask
            assert weight[~mask].eq(0).all()
            assert weight[mask].ne(0).all()
            assert all(v[~mask].eq(0).all() for v in state_of(optimizer, weight))
    assert pruner.sparsity == pytest.approx(0.75, abs=0.01)
    assert remembered > 0  # without the hooks the optimizer would revive them, so this test can fail


def test_apply_zeroes_at_once_what_was_written_by_hand():
    net = Net()
    pruner = MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    with torch.no_grad():
        for module, name in net.targets():
            getattr(module, name).add_(1)
    pruner.apply()
    for (module, name), mask in zip(net.targets(), pruner.masks.values()):
        assert getattr(module, name)[~mask].eq(0).all() and getattr(module, name)[mask].ne(0).all()


def test_lbfgs_with_a_closure():
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    optimizer.step(closure)
    for (module, name), mask in zip(net.targets(), pruner.masks.values()):
        assert getattr(module, name)[~mask].eq(0).all()


def test_a_compiled_model_trains_masked():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pruner = MagnitudePruner([(net.encoder, "weight"), (net.decoder, "weight")], optimizer=optimizer)
    chain = nn.Sequential(net.encoder, nn.Tanh(), nn.Linear(6, 8), net.decoder)
    run = torch.compile(chain, backend="aot_eager")
    for sparsity in (0.0, 0.5, 0.7):
        pruner.step_to(sparsity)
        optimizer.zero_grad()
        run(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        for module in (net.encoder, net.decoder):
            assert module.weight[~module.weight_mask].eq(0).all()
            assert module.weight.grad[~module.weight_mask].eq(0).all()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", [lambda layer: layer, copy.deepcopy])
def test_a_compiled_model_sees_masked_weights_whoever_wrote_them(how, grad):
    torch._dynamo.reset()
    layer = nn.Linear(6, 8)
    MagnitudePruner([(layer, "weight")]).step_to(0.5)
    net = nn.Sequential(how(layer), nn.Tanh())
    run, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(4, 6)
    for value in (1.0, 2.0):
        net[0].weight.data.fill_(value)
        with torch.set_grad_enabled(grad):
            seen = run(x)
        torch.testing.assert_close(seen, nn.functional.linear(x, value * net[0].weight_mask, net[0].bias).tanh())


@pytest.mark.parametrize("looks_for_hooks", [False, True])
@pytest.mark.parametrize("before", [lambda net, run: run(net), lambda net, run: run(Net())])
def test_a_model_that_was_compiled_dense_before(before, looks_for_hooks):
    """torch.compile runs the old graph of the model, or of another one of its class, unless it looks for hooks."""
    torch._dynamo.reset()
    net, x = Net(), torch.ones(2, 3)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not looks_for_hooks):
        compiled = torch.compile(lambda net, x: net.encoder(x) * 1, backend="aot_eager")
        before(net, lambda each: compiled(each, x))
        pruner = MagnitudePruner([(net.encoder, "weight")])
        pruner.step_to(0.5)
        weight, mask = net.encoder.weight, net.encoder.weight_mask
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            compiled(net, x).sum().backward()
            assert weight.grad[~mask].eq(0).all() and weight.grad[mask].ne(0).all()
            optimizer.step()
            assert weight[~mask].eq(0).all()
        weight.data.fill_(1)
        if not looks_for_hooks:
            pruner.apply()
        seen = compiled(net, x)
        torch.testing.assert_close(seen, nn.functional.linear(x, mask.float(), net.encoder.bias))


# --- gradients ----------------------------------------------------------------------------------------------

def test_gradients_are_masked_before_clipping_as_torch_prune_does():
    ours, theirs, bare = Net(), Net(), Net()
    MagnitudePruner(ours.targets()).step_to(0.9)
    total = sum(getattr(m, n).numel() for m, n in theirs.targets())
    torch_prune.global_unstructured(theirs.targets(), torch_prune.L1Unstructured, amount=round(0.9 * total))
    bare.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.endswith("_mask")})
    norms = []
    for net in (ours, theirs, bare):
        loss_of(net).backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.25))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
    assert norms[2] > 1.05 * norms[0]
    for module, name in ours.targets():
        assert getattr(module, name).grad[~getattr(module, f"{name}_mask")].eq(0).all()


def test_accumulated_gradients_are_masked_at_every_arrival_and_at_the_step():
    net = Net()
    pruner = MagnitudePruner(net.targets())
    loss_of(net).backward()
    grad = net.rnn.weight_hh_l0.grad
    pruner.step_to(0.5)
    assert net.rnn.weight_hh_l0.grad is grad  # written in place, so views of gradient buckets stay valid
    for _ in range(2):
        for module, name in net.targets():
            mask, grad = getattr(module, f"{name}_mask"), getattr(module, name).grad
            assert grad[~mask].eq(0).all() and grad[mask].ne(0).any()
        loss_of(net, seed=5).backward()


def test_a_non_finite_gradient_of_a_cut_weight_is_dropped():
    module = Weights(torch.tensor([1.0, 2.0]))
    MagnitudePruner(module.targets()).step_to(0.5)
    (module.w0 * torch.tensor([float("inf"), 3.0])).sum().backward()
    assert module.w0.grad.tolist() == [0, 3]


def test_sparse_gradients():
    table = nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    pruner = MagnitudePruner([(table, "weight")], optimizer=optimizer)
    table(torch.tensor([1, 1, 4])).sum().backward()
    pruner.step_to(0.5)
    table(torch.tensor([0, 4])).sum().backward()
    assert table.weight.grad.is_sparse
    expected = torch.tensor([1, 2, 0, 0, 2, 0])[:, None] * table.weight_mask
    assert torch.equal(table.weight.grad.to_dense(), expected.float())
    optimizer.step()
    assert table.weight[~table.weight_mask].eq(0).all()


def test_zeroing_between_forward_and_backward_is_autograds_error():
    module = Weights(torch.tensor([1.0, 2.0]))
    pruner = MagnitudePruner(module.targets())
    loss = module.w0.square().sum()
    pruner.step_to(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_weights_are_pruned_and_hooked_once_they_train():
    module = Weights(torch.tensor([1.0, 2.0]))
    module.w0.requires_grad_(False)
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(0.5)
    assert module.w0.tolist() == [0, 2]
    module.w0.requires_grad_(True)
    pruner.apply()
    module.w0.sum().backward()
    assert module.w0.grad.tolist() == [0, 1]


# --- moves, lifetime, leaving -------------------------------------------------------------------------------

def test_a_second_pruner_adds_no_second_hook():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        MagnitudePruner(net.targets(), optimizer=optimizer)
    assert len(net.rnn.weight_hh_l0._backward_hooks) == 1 and not optimizer._optimizer_step_post_hooks
    for hooks in (net.rnn._forward_pre_hooks, net.rnn._state_dict_pre_hooks, net.rnn._load_state_dict_post_hooks):
        assert len(hooks) == 1


def test_dropping_the_pruner_keeps_the_net_masked_and_hooks_keep_nothing_alive():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    gone = weakref.ref(pruner)
    gc.disable()  # there is no reference cycle, so it is freed at once, without the collector
    try:
        del pruner
        assert gone() is None
    finally:
        gc.enable()
    loss_of(net).backward()
    optimizer.step()
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all()
    encoder = weakref.ref(net.encoder)
    del net
    gc.collect()
    assert encoder() is None  # although the optimizer is still there, with its hooks
    optimizer.step()


def test_double_moves_the_hooks_along():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    net.double()
    assert net.rnn.weight_hh_l0_mask.dtype == torch.bool
    net(torch.randn(2, 1, 3, dtype=torch.float64)).sum().backward()
    assert net.rnn.weight_hh_l0.grad[~net.rnn.weight_hh_l0_mask].eq(0).all()
    optimizer.step()
    pruner.step_to(0.6)
    assert net.rnn.weight_hh_l0.dtype == torch.float64


@pytest.mark.parametrize("flag", ["set_swap_module_params_on_conversion",
                                  "set_overwrite_module_params_on_conversion"])
def test_replaced_and_swapped_parameters_are_hooked_again(flag):
    layer = nn.Linear(4, 3)
    pruner = MagnitudePruner([(layer, "weight")])
    pruner.step_to(0.5)
    getattr(torch.__future__, flag)(True)
    try:
        layer.double()
    finally:
        getattr(torch.__future__, flag)(False)
    for _ in range(2):
        layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        assert torch.equal(layer.weight.grad != 0, layer.weight_mask)
        layer.weight.grad = None
        pruner.remove_hooks()
        layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        assert layer.weight.grad.ne(0).all()
        layer.weight.grad = None
        pruner = MagnitudePruner([(layer, "weight")])


def test_a_replaced_parameter_is_masked_in_forward_and_gradient_and_hooked_once_it_is_masked():
    net, x = Net(), torch.randn(5, 3)
    MagnitudePruner(net.targets()).step_to(0.5)
    net.encoder.weight = nn.Parameter(torch.randn(6, 3))
    mask = net.encoder.weight_mask
    output = net.encoder(x)
    torch.testing.assert_close(output, x @ (net.encoder.weight * mask).T + net.encoder.bias)
    output.sum().backward()
    assert net.encoder.weight.grad[~mask].eq(0).all() and net.encoder.weight.grad[mask].ne(0).any()
    assert net.encoder.state_dict()["weight"][~mask].eq(0).all()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.encoder(x)
    net.encoder.weight.grad.fill_(1)  # past the hooks
    optimizer.step()
    assert net.encoder.weight[~mask].eq(0).all() and net.encoder.weight[mask].ne(0).any()


def test_remove_hooks_stops_masking_but_keeps_masks():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    pruner.remove_hooks()
    assert not net.rnn.weight_hh_l0._backward_hooks
    loss_of(net).backward()
    optimizer.step()
    mask = net.rnn.weight_hh_l0_mask
    assert net.rnn.weight_hh_l0.grad[~mask].ne(0).any() and net.rnn.weight_hh_l0[~mask].ne(0).any()
    pruner.apply()
    assert net.rnn.weight_hh_l0[~mask].eq(0).all() and not net.rnn.weight_hh_l0._backward_hooks


def test_pickling_gives_no_warning():
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, optimizer, pruner = pickle.loads(pickle.dumps((net, optimizer, pruner)))
    pruner.step_to(0.6)  # this hooks the copies
    loss_of(net).backward()
    optimizer.step()
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all()


LOADED_WITHOUT_THE_PACKAGE = """
import pickle, sys, torch
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moduli_kernels":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
net, optimizer = pickle.load(sys.stdin.buffer)
net(torch.ones(2, 3))
net.load_state_dict(net.state_dict())
print("loaded")
"""


@pytest.mark.parametrize("copied", [False, True])
def test_a_pickled_net_and_its_optimizer_need_nothing_of_this_package(copied):
    """A checkpoint opens where the package is missing, and where it is there the net is still held."""
    net = nn.Sequential(nn.Linear(3, 6), nn.RNN(6, 8))
    optimizer = torch.optim.AdamW(net.parameters())
    MagnitudePruner([(net[0], "weight"), (net[1], "weight_hh_l0")], optimizer=optimizer).step_to(0.5)
    if copied:
        net, optimizer = copy.deepcopy((net, optimizer))
    saved = pickle.dumps((net, optimizer))
    loaded, _ = pickle.loads(saved)
    mask = loaded[1].weight_hh_l0_mask
    loaded[1].weight_hh_l0.data.fill_(1)
    loaded(torch.ones(2, 3))
    assert loaded.state_dict()["1.weight_hh_l0"][~mask].eq(0).all() and not mask.all()
    command = [sys.executable, "-c", LOADED_WITHOUT_THE_PACKAGE]
    run = subprocess.run(command, input=saved, capture_output=True, check=False)
    assert run.stdout.strip() == b"loaded", run.stderr.decode()


def test_a_pickled_pruner_names_no_class_of_this_package_but_its_own():
    net = nn.RNN(6, 8)
    targets, order = [(net, "weight_hh_l0")], torch.arange(8)
    pruner = MagnitudePruner(targets, block=(2, 2), order={targets[0]: (order, order)})
    pruner.step_to(0.5)
    saved = pickle.dumps(pruner)
    words = {word for _, word, _ in pickletools.genops(saved) if isinstance(word, str) and "moduli_kernels" in word}
    assert words == {MagnitudePruner.__module__}
    twins = pickle.loads(saved), copy.deepcopy(pruner)
    for each in (pruner, *twins):
        each.step_to(0.8)
    assert all(torch.equal(pruner.masks["0.weight_hh_l0"], twin.masks["0.weight_hh_l0"]) for twin in twins)
