"""MagnitudePruner: exact counts, the ranking, nothing revived, gradients, state, errors."""
from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from moduli_kernels.pruning import MagnitudePruner


class Weights(nn.Module):
    """A module that owns the given tensors as w0, w1, ..."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"w{i}", nn.Parameter(tensor))

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self, name) for name in self._parameters]


class Net(nn.Module):
    """Encoder, recurrent net, read-out: (steps, batch, 3) -> (batch, 2)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(3, 6)
        self.rnn = nn.RNN(6, 8)
        self.decoder = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.rnn(self.encoder(x))[0][-1])

    def targets(self) -> list[tuple[nn.Module, str]]:
        return [(self.encoder, "weight"), (self.rnn, "weight_hh_l0"), (self.rnn, "weight_ih_l0"),
                (self.decoder, "weight")]


def loss_of(net: nn.Module, seed: int = 1) -> torch.Tensor:
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(seed))
    return (net(x) - 1).square().sum()


def cut_count(targets) -> int:
    return sum(int((~getattr(m, f"{n}_mask")).sum()) for m, n in targets)


def brute_force(weights: list[np.ndarray], masks: list[np.ndarray], count: int) -> np.ndarray:
    """The specification: sort by (kept, |w|, position), cut the first `count`; the flat mask, True = kept."""
    magnitude = np.concatenate([np.abs(w.astype(np.float64)).ravel() for w in weights])
    kept = np.concatenate([m.ravel() for m in masks])
    order = np.lexsort((np.arange(len(kept)), magnitude, kept))
    mask = np.ones(len(kept), dtype=bool)
    mask[order[:count]] = False
    return mask


# --- counts and ranking -------------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**20), levels=st.sampled_from([1, 2, 4, 1000]),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_ranking_equals_brute_force(data, seed, levels, dtype):
    """Few levels of magnitude make ties (and zeros) everywhere; weights change between the steps."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=4))
    steps = sorted(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4)))
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return (torch.randint(-levels, levels + 1, shape, generator=generator) / 3).to(dtype)

    module = Weights(*map(draw, shapes))
    pruner = MagnitudePruner(module.targets())
    total = sum(p.numel() for p in module.parameters())
    for sparsity in steps:
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(draw(p.shape))
        weights = [p.detach().double().numpy().copy() for p in module.parameters()]
        before = [m.numpy().copy() for m in pruner.masks.values()]
        pruner.step_to(sparsity)
        count = round(sparsity * total)
        after = np.concatenate([m.numpy().ravel() for m in pruner.masks.values()])
        assert (~after).sum() == count
        np.testing.assert_array_equal(after, brute_force(weights, before, count))
        for p, w, m in zip(module.parameters(), weights, pruner.masks.values()):
            np.testing.assert_array_equal(p.detach().double().numpy(), np.where(m.numpy(), w, 0))


@pytest.mark.parametrize("value", [1.0, -2.5, 0.0, float("inf")])
def test_all_equal_weights_are_cut_in_order(value):
    module = Weights(torch.full((3, 4), value), torch.full((5,), -value))
    pruner = MagnitudePruner(module.targets())
    for count in range(18):
        pruner.step_to(count / 17)
        flat = torch.cat([m.reshape(-1) for m in pruner.masks.values()])
        assert flat.tolist() == [False] * count + [True] * (17 - count)


def test_zero_weights_go_first_and_are_told_from_masked_ones():
    module = Weights(torch.tensor([0.0, 3.0, 0.0, 1.0, -0.0, 2.0]))
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(2 / 6)
    assert module.w0_mask.tolist() == [False, True, False, True, True, True]
    with torch.no_grad():
        module.w0[0] = 9.0  # masked stays first whatever is written into it
    pruner.step_to(4 / 6)
    assert module.w0_mask.tolist() == [False, True, False, False, False, True]
    assert module.w0.tolist() == [0, 3, 0, 0, 0, 2]


@pytest.mark.parametrize("sparsity, n, count", [(0.1, 25, 2), (0.3, 5, 2), (0.5, 7, 4), (0.35, 10, 4),
                                                (np.float32(0.5), 8, 4), (1, 8, 8), (0, 8, 0)])
def test_rounding_is_pythons(sparsity, n, count):
    module = Weights(torch.arange(1.0, n + 1))
    MagnitudePruner(module.targets()).step_to(sparsity)
    assert cut_count(module.targets()) == count == round(float(sparsity) * n)


def test_asking_again_for_what_is_cut_is_no_step():
    """The sparsity read back names the same count, however the division rounds."""
    for n in range(1, 60):
        module = Weights(torch.arange(1.0, n + 1))
        pruner = MagnitudePruner(module.targets())
        for count in range(n + 1):
            pruner.step_to(count / n)
            mask = module.w0_mask.clone()
            pruner.step_to(pruner.sparsity)
            assert cut_count(module.targets()) == count
            assert torch.equal(mask, module.w0_mask)


def test_mixed_dtypes_and_layouts_are_ranked_together():
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    half = torch.randn(4, 4, generator=generator).bfloat16()
    turned = torch.randn(5, 7, generator=generator).t()  # its flat index is row-major all the same
    turned[:, 2] = 0.25
    images = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    module = Weights(wide, half, turned, images)
    weights = [p.detach().double().numpy().copy() for p in module.parameters()]
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(0.4)
    kept = np.concatenate([m.numpy().ravel() for m in pruner.masks.values()])
    ones = [np.ones(w.shape, dtype=bool) for w in weights]
    np.testing.assert_array_equal(kept, brute_force(weights, ones, round(0.4 * kept.size)))


def test_progressive_pruning_equals_torch_global_unstructured():
    ours, theirs = Net(), Net()
    pruner = MagnitudePruner(ours.targets())
    total = sum(getattr(m, n).numel() for m, n in ours.targets())
    done = 0
    for sparsity in (0.1, 0.35, 0.36, 0.8, 0.95):
        pruner.step_to(sparsity)
        count = round(sparsity * total)
        torch_prune.global_unstructured(theirs.targets(), torch_prune.L1Unstructured, amount=count - done)
        done = count
        for (m, n), (t, _) in zip(ours.targets(), theirs.targets()):
            assert torch.equal(getattr(m, f"{n}_mask"), getattr(t, f"{n}_mask") == 1)
            assert torch.equal(getattr(m, n), getattr(t, n))


def test_reading():
    net = Net()
    pruner = MagnitudePruner(net.targets())
    assert pruner.sparsity == 0 and set(pruner.densities().values()) == {1.0}
    pruner.step_to(0.5)
    assert list(pruner.masks) == ["0.weight", "1.weight_hh_l0", "2.weight_ih_l0", "3.weight"]
    assert pruner.masks["1.weight_hh_l0"] is net.rnn.weight_hh_l0_mask
    sizes = [getattr(m, n).numel() for m, n in net.targets()]
    kept = [d * s for d, s in zip(pruner.densities().values(), sizes)]
    assert sum(kept) == pytest.approx((1 - pruner.sparsity) * sum(sizes))
    assert pruner.sparsity == round(0.5 * sum(sizes)) / sum(sizes)
    assert repr(pruner) == "MagnitudePruner(0.weight, 1.weight_hh_l0, 2.weight_ih_l0, 3.weight)"


def test_no_weights_at_all():
    pruner = MagnitudePruner(Weights(torch.empty(0, 3)).targets())
    pruner.step_to(0.9)
    assert pruner.sparsity == 0 and pruner.densities() == {"0.w0": 1.0}


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


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_pruned_weight_never_comes_back(make):
    net = Net()
    optimizer = make(net.parameters())
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    ever_cut = {key: ~mask for key, mask in pruner.masks.items()}
    remembered = 0
    for step in range(60):
        if step % 12 == 11:  # momentum is well built up when a weight is cut
            pruner.step_to(0.15 * (step // 12 + 1))
        optimizer.zero_grad()
        loss_of(net, seed=step).backward()
        for module, name in net.targets():
            assert getattr(module, name).grad[~getattr(module, f"{name}_mask")].eq(0).all()
        optimizer.step()
        for (module, name), key in zip(net.targets(), pruner.masks):
            weight, mask = getattr(module, name), getattr(module, f"{name}_mask")
            assert not (mask & ever_cut[key]).any()
            ever_cut[key] |= ~mask
            assert weight[~mask].eq(0).all()
            assert weight[mask].ne(0).all()
            buffers = optimizer.state[weight]
            remembered += sum(int(v[~mask].ne(0).any()) for v in buffers.values() if v.shape == mask.shape)
    assert pruner.sparsity == pytest.approx(0.75, abs=0.01)
    assert remembered > 0  # the optimizer would revive them by itself, so this test can fail


def test_without_an_optimizer_apply_zeroes_by_hand():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pruner = MagnitudePruner(net.targets())
    for _ in range(3):
        loss_of(net).backward()
        optimizer.step()
    pruner.step_to(0.5)
    loss_of(net).backward()
    optimizer.step()
    assert any(w[~m].ne(0).any() for (mod, n), m in zip(net.targets(), pruner.masks.values())
               for w in [getattr(mod, n)])
    pruner.apply()
    for (module, name), mask in zip(net.targets(), pruner.masks.values()):
        assert getattr(module, name)[~mask].eq(0).all()


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
    assert net.rnn.weight_hh_l0.grad is grad  # in place: views of gradient buckets stay valid
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


# --- ties, copies, moves, lifetime --------------------------------------------------------------------------

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.encoder.weight

    def targets(self):
        return [(self.encoder, "weight"), (self.decoder, "weight")]


def test_a_tied_parameter_counts_once_and_both_modules_share_the_mask():
    net = Tied()
    pruner = MagnitudePruner(net.targets() + [(net.encoder, "weight")])
    pruner.step_to(0.5)
    assert list(pruner.masks) == ["0.weight"]
    assert int((~net.encoder.weight_mask).sum()) == 14
    assert net.decoder.weight_mask is net.encoder.weight_mask
    net.decoder(net.encoder(torch.tensor([1, 2]))).sum().backward()
    assert net.encoder.weight.grad[~net.encoder.weight_mask].eq(0).all()
    # module.to(device) replaces each module's buffer by a copy of its own; the next step shares it again
    net.decoder.weight_mask = net.decoder.weight_mask.clone()
    pruner.step_to(0.75)
    assert net.decoder.weight_mask is net.encoder.weight_mask and pruner.sparsity == 21 / 28
    copied = copy.deepcopy(net)
    assert copied.decoder.weight_mask is copied.encoder.weight_mask


def test_tied_masks_that_differ_and_ties_that_part_are_refused():
    net = Tied()
    net.encoder.register_buffer("weight_mask", torch.ones(7, 4, dtype=torch.bool))
    net.decoder.register_buffer("weight_mask", torch.zeros(7, 4, dtype=torch.bool))
    message = "the modules that share 0.weight must have one mask, got masks that differ; delete all but one."
    with pytest.raises(ValueError, match=re.escape(message)):
        MagnitudePruner(net.targets())
    net = Tied()
    pruner = MagnitudePruner(net.targets())
    net.decoder.weight = nn.Parameter(torch.ones(7, 4))
    message = "0.weight was one tied parameter and is several now; make a new MagnitudePruner."
    with pytest.raises(RuntimeError, match=re.escape(message)):
        pruner.step_to(0.5)


def test_a_deepcopy_has_the_masks_and_a_new_pruner_takes_them_over():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    MagnitudePruner(net.targets(), optimizer=optimizer).step_to(0.5)
    copied = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=0.1)
    pruner = MagnitudePruner(copied.targets(), optimizer=optimizer)
    assert torch.equal(copied.rnn.weight_hh_l0_mask, net.rnn.weight_hh_l0_mask)
    assert copied.rnn.weight_hh_l0_mask is not net.rnn.weight_hh_l0_mask
    pruner.step_to(0.7)
    loss_of(copied).backward()
    optimizer.step()
    assert copied.rnn.weight_hh_l0[~copied.rnn.weight_hh_l0_mask].eq(0).all()
    assert cut_count(net.targets()) < cut_count(copied.targets())


def test_an_adopted_mask_is_the_same_buffer_and_cuts_at_once():
    module = Weights(torch.tensor([3.0, 1.0, 2.0]))
    mask = torch.tensor([False, True, True])
    module.register_buffer("w0_mask", mask)
    pruner = MagnitudePruner(module.targets())
    assert module.w0_mask is mask and module.w0.tolist() == [0, 1, 2] and pruner.sparsity == 1 / 3
    pruner.step_to(2 / 3)
    assert module.w0.tolist() == [0, 0, 2]


def test_a_second_pruner_adds_no_second_hook():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        MagnitudePruner(net.targets(), optimizer=optimizer)
    assert len(net.rnn.weight_hh_l0._backward_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == len(net.targets())


def test_dropping_the_pruner_keeps_the_net_masked_and_hooks_keep_nothing_alive():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    gone = weakref.ref(pruner)
    gc.disable()  # no reference cycle: it goes at once, without the collector
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
    assert encoder() is None  # though the optimizer lives on, with its hooks
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
    pruner.apply()
    for _ in range(2):
        layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        assert torch.equal(layer.weight.grad != 0, layer.weight_mask)
        layer.weight.grad = None
        pruner.remove_hooks()
        layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        assert layer.weight.grad.ne(0).all()
        layer.weight.grad = None
        pruner = MagnitudePruner([(layer, "weight")])


def test_the_optimizer_step_hooks_a_replaced_parameter():
    net = Net()
    MagnitudePruner(net.targets()).step_to(0.5)
    net.encoder.weight = nn.Parameter(torch.randn(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    MagnitudePruner(net.targets(), optimizer=optimizer)
    net.encoder.weight = nn.Parameter(torch.randn(6, 3))
    optimizer.step()
    loss_of(net).backward()
    mask = net.encoder.weight_mask
    assert net.encoder.weight[~mask].eq(0).all() and net.encoder.weight.grad[~mask].eq(0).all()


def test_remove_hooks_stops_masking_but_keeps_masks():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    pruner.remove_hooks()
    assert not optimizer._optimizer_step_post_hooks and not net.rnn.weight_hh_l0._backward_hooks
    loss_of(net).backward()
    optimizer.step()
    mask = net.rnn.weight_hh_l0_mask
    assert net.rnn.weight_hh_l0.grad[~mask].ne(0).any() and net.rnn.weight_hh_l0[~mask].ne(0).any()
    pruner.apply()
    assert net.rnn.weight_hh_l0[~mask].eq(0).all() and not net.rnn.weight_hh_l0._backward_hooks


def test_pickles_without_a_word():
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, optimizer, pruner = pickle.loads(pickle.dumps((net, optimizer, pruner)))
    pruner.step_to(0.6)  # hooks the copies
    loss_of(net).backward()
    optimizer.step()
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_the_masks_are_the_cpus(deterministic):
    """Moved between steps; ties included; the optimizer fused; masks as on the CPU."""
    cpu, gpu = Tied(), Tied()
    for net in (cpu, gpu):
        with torch.no_grad():
            net.encoder.weight.copy_(torch.arange(28.0).remainder(5).view(7, 4))
    pruners = [MagnitudePruner(net.targets()) for net in (cpu, gpu)]
    for pruner in pruners:
        pruner.step_to(0.2)
    gpu.cuda()
    optimizer = torch.optim.Adam(gpu.parameters(), lr=1e-9, weight_decay=0.1, fused=True)
    pruners[1] = MagnitudePruner(gpu.targets(), optimizer=optimizer)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for sparsity in (0.2, 0.5, 0.9):
            for pruner in pruners:
                pruner.step_to(sparsity)
            assert torch.equal(cpu.encoder.weight_mask, gpu.encoder.weight_mask.cpu())
            assert gpu.decoder.weight_mask is gpu.encoder.weight_mask
            gpu.encoder.weight.sum().backward()
            optimizer.step()
            assert gpu.encoder.weight[~gpu.encoder.weight_mask].eq(0).all()
            assert gpu.encoder.weight.grad[~gpu.encoder.weight_mask].eq(0).all()
            cpu.load_state_dict(gpu.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)


# --- state --------------------------------------------------------------------------------------------------

def test_make_permanent_leaves_plain_modules():
    net, plain = Net(), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer)
    pruner.step_to(0.5)
    output = net(torch.ones(2, 1, 3))
    pruner.make_permanent()
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert not optimizer._optimizer_step_post_hooks and not net.rnn.weight_hh_l0._backward_hooks
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(torch.ones(2, 1, 3)), output)
    message = ("0.weight has lost its parameter or its bool buffer weight_mask (made permanent, handed to "
               "torch.nn.utils.prune, or deleted); make a new MagnitudePruner.")
    for use in (lambda: pruner.step_to(0.6), pruner.apply, lambda: pruner.sparsity, pruner.make_permanent):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            use()


def test_state_dict_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    net, other = Net(), Net(seed=1)
    pruner = MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    state = pruner.state_dict()
    save_file(state, tmp_path / "masks.safetensors")
    pruner.step_to(0.8)
    saved = load_file(tmp_path / "masks.safetensors")
    assert int(sum((~m).sum() for m in saved.values())) == round(0.5 * pruner._size())
    assert all(torch.equal(state[key], saved[key]) for key in state)  # copies, not the live masks
    loaded = MagnitudePruner(other.targets())
    loaded.load_state_dict(saved)
    assert loaded.sparsity == pytest.approx(0.5, abs=0.01)
    for (module, name), mask in zip(other.targets(), saved.values()):
        assert torch.equal(getattr(module, f"{name}_mask"), mask)
        assert getattr(module, name)[~mask].eq(0).all()
    pruner.load_state_dict(saved)  # earlier masks too
    assert pruner.sparsity == loaded.sparsity


def test_masks_travel_in_the_models_state_dict():
    net, other = Net(), Net(seed=1)
    MagnitudePruner(net.targets()).step_to(0.5)
    pruner = MagnitudePruner(other.targets())
    other.load_state_dict(net.state_dict())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    pruner.step_to(0.75)
    assert cut_count(other.targets()) == round(0.75 * pruner._size())


def test_state_dicts_that_do_not_fit_change_nothing():
    net = Net()
    pruner = MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    before = pruner.state_dict()
    good = {key: torch.zeros_like(mask) for key, mask in before.items()}
    keys = "0.weight, 1.weight_hh_l0, 2.weight_ih_l0, 3.weight"
    cases = [
        ({**good, "7.weight": torch.ones(2, dtype=torch.bool)},
         f"state_dict must hold a mask for each of {keys}, got '7.weight': a mask that fits no parameter; "
         "give the pruner the targets it was saved with."),
        ({k: v for k, v in good.items() if k != "3.weight"},
         "state_dict['3.weight'] must be a torch.bool mask (2, 8), got none; give the pruner the targets it "
         "was saved with."),
        ({**good, "3.weight": torch.ones(8, 2, dtype=torch.bool)},
         "state_dict['3.weight'] must be a torch.bool mask (2, 8), got torch.bool (8, 2); give the pruner "
         "the targets it was saved with."),
        ({**good, "3.weight": torch.ones(2, 8)},
         "state_dict['3.weight'] must be a torch.bool mask (2, 8), got torch.float32 (2, 8); give the pruner "
         "the targets it was saved with."),
    ]
    for state, message in cases:
        with pytest.raises(ValueError) as error:
            pruner.load_state_dict(state)
        assert str(error.value) == message
        assert all(torch.equal(before[k], m) for k, m in pruner.masks.items())


# --- torch.nn.utils.prune -----------------------------------------------------------------------------------

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
    assert pruner.sparsity == sum(int((~m).sum()) for m in masks.values()) / pruner._size()
    assert torch.equal(net(torch.ones(2, 1, 3)), output)
    assert {id(p) for p in net.parameters()} == objects
    assert set(net.state_dict()) == {k for k in Net().state_dict()} | {
        "encoder.weight_mask", "rnn.weight_hh_l0_mask", "rnn.weight_ih_l0_mask", "decoder.weight_mask"}
    assert not torch_prune.is_pruned(net)
    pruner.step_to(0.8)
    before = net.rnn.weight_hh_l0.detach().clone()
    for seed in range(3):
        step(net, optimizer, seed)
    assert not torch.equal(before, net.rnn.weight_hh_l0)  # the optimizer still trains what the net uses
    assert net.rnn.weight_hh_l0[~net.rnn.weight_hh_l0_mask].eq(0).all()


def test_to_torch_prune_goes_on_as_torch_would():
    """Both ways train alike, step by step: plain SGD has no memory of cut weights."""
    ours, theirs = Net(), Net()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (ours, theirs)]
    objects = {id(p) for p in ours.parameters()}
    pruner = MagnitudePruner(ours.targets(), optimizer=optimizers[0])
    pruner.step_to(0.6)
    total = pruner._size()
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
        output.sum().backward()  # reaches the Parameters
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
    assert torch.equal(net.encoder.weight_mask, mask) and list(pruner.masks) == ["0.weight"]
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
        (net.parameters(), TypeError, "optimizer must be a torch.optim.Optimizer, got a generator; pass the "
                                      "one that steps these weights, or None and call apply() after each "
                                      "step."),
        (None, ValueError, "weight_mask of Linear must hold only 0 and 1, got other values; make these "
                           "weights permanent with torch.nn.utils.prune.remove first."),
    ]:
        with pytest.raises(kind) as error:
            MagnitudePruner.from_torch_prune(net, optimizer)
        assert str(error.value) == message
        assert torch_prune.is_pruned(net.encoder) and torch_prune.is_pruned(net.decoder)


# --- errors, word for word ----------------------------------------------------------------------------------

def layer_with(**buffers):
    layer = nn.Linear(3, 2)
    for name, value in buffers.items():
        layer.register_buffer(name, value)
    return layer


PASS = "pass e.g. [(model.rnn, 'weight_hh_l0')]."
BAD_TARGETS = [
    (lambda: nn.Linear(3, 2), TypeError,
     f"targets must be a list of (module, parameter name), got a Linear; {PASS}"),
    (lambda: 3, TypeError, f"targets must be a list of (module, parameter name), got a int; {PASS}"),
    (lambda: (nn.Linear(3, 2), "weight"), TypeError,
     f"targets[0] must be a pair (module, parameter name), got a Linear; {PASS}"),
    (lambda: ["weight"], TypeError, f"targets[0] must be a pair (module, parameter name), got a str; {PASS}"),
    (lambda: [], ValueError, f"targets must name at least one parameter, got an empty list; {PASS}"),
    (lambda: [(nn.Linear(3, 2), "weight"), (nn.Linear(3, 2, bias=False), "bias")], ValueError,
     "targets[1] must name a parameter the module itself owns, got 'bias' of Linear; it owns: weight."),
    (lambda: [(nn.Sequential(nn.Linear(3, 2)), "0.weight")], ValueError,
     "targets[0] must name a parameter the module itself owns, got '0.weight' of Sequential; it owns: none."),
    (lambda: [(nn.LazyLinear(2), "weight")], ValueError,
     "targets[0] must be initialized, got the lazy LazyLinear.weight; run one forward pass first."),
    (lambda: [(Weights(torch.ones(2, dtype=torch.complex64)), "w0")], TypeError,
     "targets[0] must be a floating-point weight, got Weights.w0 with torch.complex64; integer and complex "
     "weights are not pruned, leave it out."),
    (lambda: [(torch_prune.identity(nn.Linear(3, 2), "weight"), "weight")], ValueError,
     "targets[0] must be a plain parameter, got Linear.weight pruned by torch.nn.utils.prune; use "
     "MagnitudePruner.from_torch_prune(...)."),
    (lambda: [(layer_with(weight_mask=torch.ones(3, 2, dtype=torch.bool)), "weight")], ValueError,
     "weight_mask of targets[0] must be a torch.bool buffer (2, 3), got torch.bool (3, 2): a mask that fits "
     "no parameter; delete it from the Linear or give it that shape."),
    (lambda: [(layer_with(weight_mask=torch.ones(2, 3)), "weight")], ValueError,
     "weight_mask of targets[0] must be a torch.bool buffer (2, 3), got torch.float32 (2, 3): a mask that "
     "fits no parameter; delete it from the Linear or give it that shape."),
]


@pytest.mark.parametrize("make, kind, message", BAD_TARGETS)
def test_bad_targets(make, kind, message):
    with pytest.raises(kind) as error:
        MagnitudePruner(make())
    assert str(error.value) == message


def test_integer_weights_are_refused():
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError) as error:
        MagnitudePruner([(module, "w")])
    assert str(error.value) == ("targets[0] must be a floating-point weight, got Module.w with torch.int64; "
                                "integer and complex weights are not pruned, leave it out.")


def test_a_refused_pruner_leaves_no_trace():
    good, bad = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError):
        MagnitudePruner([(good, "weight"), (bad, "bias")])
    assert list(good._buffers) == [] and not good.weight._backward_hooks


@pytest.mark.parametrize("given_, kind, message", [
    (1.5, ValueError, "sparsity must be in [0, 1], got 1.5; pass a fraction, e.g. 0.9 for 90 %."),
    (-0.1, ValueError, "sparsity must be in [0, 1], got -0.1; pass a fraction, e.g. 0.9 for 90 %."),
    (float("nan"), ValueError, "sparsity must be in [0, 1], got nan; pass a fraction, e.g. 0.9 for 90 %."),
    (90, ValueError, "sparsity must be in [0, 1], got 90; pass a fraction, e.g. 0.9 for 90 %."),
    ("0.5", TypeError, "sparsity must be a number in [0, 1], got a str; pass e.g. sparsity=0.9."),
    (True, TypeError, "sparsity must be a number in [0, 1], got a bool; pass e.g. sparsity=0.9."),
    (0.3, ValueError, "sparsity must be at least the 0.5 already cut (4 of 8 weights), got 0.3; pruned "
                      "weights never come back, load earlier masks to go back."),
])
def test_bad_sparsity(given_, kind, message):
    module = Weights(torch.arange(1.0, 9.0))
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(0.5)
    with pytest.raises(kind) as error:
        pruner.step_to(given_)
    assert str(error.value) == message
    assert module.w0.tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def test_nan_among_the_weights_is_refused_before_anything_changes():
    module = Weights(torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 0.5]))
    pruner = MagnitudePruner(module.targets())
    with pytest.raises(ValueError) as error:
        pruner.step_to(0.25)
    assert str(error.value) == ("weights must not hold NaN when they are ranked, got NaN in 1.w1; no mask "
                                "was changed, look at the loss and the learning rate.")
    assert pruner.sparsity == 0 and module.w1[1] == 0.5
    module.w1_mask[0] = False  # a NaN that is cut already is just zeroed
    pruner.step_to(0.5)
    assert module.w0.tolist() == [1, 2] and module.w1.tolist() == [0, 0]


def test_bad_optimizer_and_block_mode():
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError) as error:
        MagnitudePruner([(layer, "weight")], optimizer=layer.parameters())
    assert str(error.value) == ("optimizer must be a torch.optim.Optimizer, got a generator; pass the one "
                                "that steps these weights, or None and call apply() after each step.")
    for extra in ({"block": (16, 16)}, {"order": {}}):
        with pytest.raises(NotImplementedError) as error:
            MagnitudePruner([(layer, "weight")], **extra)
        assert str(error.value) == ("block and order must be None: pruning in blocks comes with SparseRNN's "
                                    "block pruning; leave them out to rank weight by weight.")


def test_a_weight_that_no_longer_fits_its_mask():
    layer = nn.Linear(3, 2)
    pruner = MagnitudePruner([(layer, "weight")])
    layer.weight = nn.Parameter(torch.ones(2, 4))
    with pytest.raises(RuntimeError) as error:
        pruner.step_to(0.5)
    assert str(error.value) == ("0.weight and its mask must have one shape and device, got (2, 4) on cpu and "
                                "(2, 3) on cpu; move the module with module.to(...), not the parameter "
                                "alone.")
