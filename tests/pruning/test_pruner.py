"""Checks MagnitudePruner: exact counts, the ranking, who owns the masks, reading, saving and loading."""
from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils import prune as torch_prune

from moduli_kernels.pruning.pruner import MagnitudePruner
from tests.support.penalty_cases import generator, on_device
from tests.support.pruning_cases import Net, Tied, Weights, cut_count, loss_of, size_of

pytestmark = on_device


def brute_force(weights: list[np.ndarray], masks: list[np.ndarray], count: int) -> np.ndarray:
    """Returns the flat mask by the specification: sort by (kept, |w|, position), mask the first `count`."""
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
    """Ties and zeros are frequent (few levels of magnitude), and weights change between the steps."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=4))
    steps = sorted(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4)))
    source = generator(seed)

    def draw(shape):
        return (torch.randint(-levels, levels + 1, shape, generator=source) / 3).to(dtype)

    module = Weights(*map(draw, shapes))
    pruner = MagnitudePruner(module.targets())
    total = sum(p.numel() for p in module.parameters())
    for sparsity in steps:
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(draw(p.shape))
        weights = [p.detach().double().cpu().numpy().copy() for p in module.parameters()]
        before = [m.cpu().numpy().copy() for m in pruner.masks.values()]
        pruner.step_to(sparsity)
        count = round(sparsity * total)
        after = np.concatenate([m.cpu().numpy().ravel() for m in pruner.masks.values()])
        assert (~after).sum() == count
        np.testing.assert_array_equal(after, brute_force(weights, before, count))
        for p, w, m in zip(module.parameters(), weights, pruner.masks.values()):
            np.testing.assert_array_equal(p.detach().double().cpu().numpy(), np.where(m.cpu().numpy(), w, 0))


@pytest.mark.parametrize("value", [1.0, -2.5, 0.0, float("inf")])
def test_all_equal_weights_are_cut_in_order(value):
    module = Weights(torch.full((3, 4), value), torch.full((5,), -value))
    pruner = MagnitudePruner(module.targets())
    for count in range(18):
        pruner.step_to(count / 17)
        flat = torch.cat([m.reshape(-1) for m in pruner.masks.values()])
        assert flat.tolist() == [False] * count + [True] * (17 - count)


def test_zero_weights_go_first_after_those_that_are_masked():
    module = Weights(torch.tensor([0.0, 3.0, 0.0, 1.0, -0.0, 2.0]))
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(2 / 6)
    assert module.w0_mask.tolist() == [False, True, False, True, True, True]
    with torch.no_grad():
        module.w0[0] = 9.0  # a masked weight stays first whatever is written into it
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
    """The sparsity that is read back gives the same count, however the division rounds."""
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
    source = generator(3)
    wide = torch.randn(6, 5, generator=source, dtype=torch.float64)
    half = torch.randn(4, 4, generator=source).bfloat16()
    turned = torch.randn(5, 7, generator=source).t()  # its flat index is row-major, although its memory is not
    turned[:, 2] = 0.25
    images = torch.randn(2, 3, 4, 4, generator=source).to(memory_format=torch.channels_last)
    module = Weights(wide, half, turned, images)
    weights = [p.detach().double().cpu().numpy().copy() for p in module.parameters()]
    pruner = MagnitudePruner(module.targets())
    pruner.step_to(0.4)
    kept = np.concatenate([m.cpu().numpy().ravel() for m in pruner.masks.values()])
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_the_masks_are_the_cpus(deterministic):
    """The net moves between steps, ties occur and the optimizer is fused; the masks equal those on the CPU."""
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


# --- masks that are tied, adopted, copied, given up ---------------------------------------------------------

def test_a_tied_parameter_counts_once_and_both_modules_share_the_mask():
    net = Tied()
    pruner = MagnitudePruner(net.targets() + [(net.encoder, "weight")])
    pruner.step_to(0.5)
    assert list(pruner.masks) == ["0.weight"]
    assert int((~net.encoder.weight_mask).sum()) == 14
    assert net.decoder.weight_mask is net.encoder.weight_mask
    net.decoder(net.encoder(torch.tensor([1, 2]))).sum().backward()
    assert net.encoder.weight.grad[~net.encoder.weight_mask].eq(0).all()
    # module.to(device) replaces each module's buffer by a copy; the next step makes both modules share one again
    net.decoder.weight_mask = net.decoder.weight_mask.clone()
    pruner.step_to(0.75)
    assert net.decoder.weight_mask is net.encoder.weight_mask and pruner.sparsity == 21 / 28
    copied = copy.deepcopy(net)
    assert copied.decoder.weight_mask is copied.encoder.weight_mask


def test_an_adopted_mask_is_the_same_buffer_and_cuts_at_once():
    module = Weights(torch.tensor([3.0, 1.0, 2.0]))
    mask = torch.tensor([False, True, True])
    module.register_buffer("w0_mask", mask)
    pruner = MagnitudePruner(module.targets())
    assert module.w0_mask is mask and module.w0.tolist() == [0, 1, 2] and pruner.sparsity == 1 / 3
    pruner.step_to(2 / 3)
    assert module.w0.tolist() == [0, 0, 2]


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


# --- reading and state --------------------------------------------------------------------------------------

def test_masks_sparsity_and_densities():
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


def test_state_dict_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    net, other = Net(), Net(seed=1)
    pruner = MagnitudePruner(net.targets())
    pruner.step_to(0.5)
    state = pruner.state_dict()
    save_file(state, tmp_path / "masks.safetensors")
    pruner.step_to(0.8)
    saved = load_file(tmp_path / "masks.safetensors")
    assert int(sum((~m).sum() for m in saved.values())) == round(0.5 * size_of(pruner))
    assert all(torch.equal(state[key], saved[key]) for key in state)  # state_dict() has copied them
    loaded = MagnitudePruner(other.targets())
    loaded.load_state_dict(saved)
    assert loaded.sparsity == pytest.approx(0.5, abs=0.01)
    for (module, name), mask in zip(other.targets(), saved.values()):
        assert torch.equal(getattr(module, f"{name}_mask"), mask)
        assert getattr(module, name)[~mask].eq(0).all()
    pruner.load_state_dict(saved)  # denser masks may be loaded too
    assert pruner.sparsity == loaded.sparsity


def test_masks_travel_in_the_models_state_dict():
    net, other = Net(), Net(seed=1)
    MagnitudePruner(net.targets()).step_to(0.5)
    pruner = MagnitudePruner(other.targets())
    other.load_state_dict(net.state_dict())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    pruner.step_to(0.75)
    assert cut_count(other.targets()) == round(0.75 * size_of(pruner))
