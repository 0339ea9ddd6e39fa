"""MagnitudePruner in blocks: compares the ranking with brute force and checks what a step must not change.

The errors are tested in test_errors.py.
"""
from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moduli_kernels as mk
from moduli_kernels.pruning.pruner import MagnitudePruner
from tests.support.penalty_cases import draw_weight, generator, on_device
from tests.support.pruning_cases import Net, Tied, Weights, cut_count, loss_of, size_of

pytestmark = on_device

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Cut(NamedTuple):
    """Says how a matrix is divided: the sides of a block, and the rows and columns in order."""

    height: int
    width: int
    rows: list[int]
    columns: list[int]


def brute_force(weights: list[np.ndarray], masks: list[np.ndarray], cuts: list[Cut | None],
                count: int) -> list[np.ndarray]:
    """Returns the masks by the specification, in exact fractions: rank blocks and entries, mask from the bottom up."""
    ranked = []
    for t, (weight, mask, cut) in enumerate(zip(weights, masks, cuts, strict=True)):
        groups: dict[tuple, list[tuple]] = {}
        if cut is None:
            groups = {index: [index] for index in np.ndindex(weight.shape)}
        else:
            for i, row in enumerate(cut.rows):
                for j, column in enumerate(cut.columns):
                    groups.setdefault((i // cut.height, j // cut.width), []).append((row, column))
        for place, entries in groups.items():
            kept = [index for index in entries if mask[index]]
            mean = sum(abs(Fraction(float(weight[index]))) for index in kept) / len(entries)
            ranked.append((mean, t, place, kept))
    after = [mask.copy() for mask in masks]
    cut = sum(int((~mask).sum()) for mask in masks)
    for _, t, _, kept in sorted(one for one in ranked if one[3]):
        cut += len(kept)
        if cut > count:
            break
        for index in kept:
            after[t][index] = False
    return after


def permutation(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed))


def made(weights, block, seed=0, **more) -> tuple[Weights, MagnitudePruner]:
    """Makes a pruner that prunes all its matrices in blocks, each in an order of its own."""
    module = Weights(*weights)
    order = {(module, name): (permutation(len(p), seed + i), permutation(p.shape[1], seed + i + 50))
             for i, (name, p) in enumerate(module.named_parameters())}
    return module, MagnitudePruner(module.targets(), block=block, order=order, **more)


def arrays(tensors) -> list[np.ndarray]:
    return [t.detach().cpu().numpy().copy() if t.dtype == torch.bool else t.detach().double().cpu().numpy().copy()
            for t in tensors]


# --- the ranking --------------------------------------------------------------------------------------------

@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**20), levels=st.sampled_from([1, 2, 4, 10**5]),
       block=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_ranking_equals_brute_force(data, seed, levels, block):
    """Ties are frequent (few levels), some weights are masked before, and weights change between the steps."""
    source = generator(seed)
    matrices = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=2))
    others = data.draw(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=2))
    mixed = data.draw(st.permutations([(shape, True) for shape in matrices] + [(shape, False) for shape in others]))
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in mixed]
    steps = sorted(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=4)))

    def draw(shape, dtype):
        return (torch.randint(-levels, levels + 1, shape, generator=source) / 8).to(dtype)

    module = Weights(*(draw(shape, dtype) for (shape, _), dtype in zip(mixed, dtypes)))
    order, cuts = {}, []
    for i, (shape, ordered) in enumerate(mixed):
        pair = tuple(torch.randperm(size, generator=source) for size in shape)
        cuts.append(Cut(*block, *(p.tolist() for p in pair)) if ordered else None)
        if ordered:
            order[module, f"w{i}"] = pair
        if data.draw(st.booleans()):
            module.register_buffer(f"w{i}_mask", torch.rand(shape, generator=source) < 0.8)
    pruner = MagnitudePruner(module.targets(), block=block, order=order)
    total = sum(p.numel() for p in module.parameters())
    for sparsity in (step / 50 for step in steps):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(draw(p.shape, p.dtype))
        weights, before = arrays(module.parameters()), arrays(pruner.masks.values())
        count = round(sparsity * total)
        if count < sum((~m).sum() for m in before):
            continue
        pruner.step_to(sparsity)
        after = arrays(pruner.masks.values())
        for got, want in zip(after, brute_force(weights, before, cuts, count), strict=True):
            np.testing.assert_array_equal(got, want)
        for p, w, m in zip(arrays(module.parameters()), weights, after, strict=True):
            np.testing.assert_array_equal(p, np.where(m, w, 0))


def test_the_run_ends_before_the_first_block_that_does_not_fit():
    """Neither an entry of that block is masked, nor a single weight that ranks higher and would fit."""
    module = Weights(torch.tensor([[1.0, 1, 5, 5], [1, 1, 5, 5]]), torch.tensor([0.5, 2, 3, 6]))
    order = {(module, "w0"): (torch.arange(2), torch.arange(4))}
    pruner = MagnitudePruner(module.targets(), block=(2, 2), order=order)
    cut = {}
    for count in range(13):
        pruner.step_to(count / 12)
        cut[count] = [int((~mask).sum()) for mask in pruner.masks.values()]
    assert cut == {0: [0, 0], 1: [0, 1], 2: [0, 1], 3: [0, 1], 4: [0, 1], 5: [4, 1], 6: [4, 2], 7: [4, 3], 8: [4, 3],
                   9: [4, 3], 10: [4, 3], 11: [8, 3], 12: [8, 4]}


def test_blocks_of_one_entry_are_the_ranking_weight_by_weight():
    """With ties this holds only where the order is that of the matrix, since ties go by place in the order."""
    coarse = [(draw_weight(7, 9) * 2).round(), (draw_weight(5, 4, seed=1) * 2).round()]
    fine = [draw_weight(7, 9), draw_weight(5, 4, seed=1)]
    for weights, shuffled in ((coarse, False), (fine, True)):
        ours, plain = (Weights(*(w.clone() for w in weights)) for _ in range(2))
        order = {(ours, f"w{i}"): tuple(permutation(n, i) if shuffled else torch.arange(n) for n in w.shape)
                 for i, w in enumerate(weights)}
        pruners = [MagnitudePruner(ours.targets(), block=(1, 1), order=order), MagnitudePruner(plain.targets())]
        for sparsity in (0.1, 0.37, 0.5, 0.93, 1):
            for pruner in pruners:
                pruner.step_to(sparsity)
            assert all(torch.equal(a, b) for a, b in zip(*(pruner.masks.values() for pruner in pruners)))


def test_ties_go_by_order_of_targets_and_then_by_place_in_the_given_order():
    module = Weights(torch.ones(4, 4), torch.ones(2), torch.ones(2, 4))
    order = {(module, "w0"): (torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])),
             (module, "w2"): (torch.tensor([1, 0]), torch.arange(4))}
    pruner = MagnitudePruner(module.targets(), block=(2, 2), order=order)
    expected = [(0, 2, 1), (0, 2, 0), (0, 3, 1), (0, 3, 0)]  # target, a row and a column of each block of w0
    for done, (_, row, column) in enumerate(expected):
        assert module.w0_mask[row, column] and int(module.w0_mask.sum()) == 16 - 4 * done
        pruner.step_to(4 * (done + 1) / 26)
        assert not module.w0_mask[row, column]
    pruner.step_to(18 / 26)
    assert not module.w1_mask.any() and module.w2_mask.all()
    pruner.step_to(22 / 26)
    assert module.w2_mask.tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("dtype, large", [(torch.float32, 2.0**24), (torch.bfloat16, 2.0**8), (torch.float16, 2.0**11)])
def test_means_are_of_exact_sums(dtype, large):
    """In the weights' own dtype large + 1 is large, so the first block would rank lower, or tie and be masked first."""
    module = Weights(torch.tensor([[large, 1, 1, 1, large, 2, 0, 0]], dtype=dtype))
    pruner = MagnitudePruner(module.targets(), block=(1, 4), order={(module, "w0"): (torch.arange(1), torch.arange(8))})
    pruner.step_to(0.5)
    assert module.w0_mask.tolist() == [[True] * 4 + [False] * 4]


def test_blocks_and_single_weights_are_compared_in_float64():
    module = Weights(torch.ones(2, 2, dtype=torch.bfloat16),
                     torch.tensor([1 + 2**-40, 1 - 2**-40], dtype=torch.float64))
    pruner = MagnitudePruner(module.targets(), block=(2, 2), order={(module, "w0"): (torch.arange(2),) * 2})
    pruner.step_to(1 / 6)
    assert module.w1_mask.tolist() == [True, False] and module.w0_mask.all()
    pruner.step_to(5 / 6)
    assert module.w1_mask.tolist() == [True, False] and not module.w0_mask.any()


def test_infinite_weights_rank_last_and_zeros_first():
    weight = torch.ones(6, 6)
    weight[0, 5], weight[4:, :2] = -float("inf"), 0
    module = Weights(weight)
    pruner = MagnitudePruner(module.targets(), block=(2, 2), order={(module, "w0"): (torch.arange(6),) * 2})
    pruner.step_to(4 / 36)
    assert not module.w0_mask[4:, :2].any() and int(module.w0_mask.sum()) == 32
    pruner.step_to(32 / 36)
    assert module.w0_mask[:2, 4:].all() and int(module.w0_mask.sum()) == 4
    pruner.step_to(1)
    assert not module.w0_mask.any() and not module.w0.any()


# --- what a step leaves -------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:1.w1 keeps:UserWarning")
@pytest.mark.parametrize("block", [(4, 4), (1, 7), (5, 2), (30, 3), (10**12, 1), (64, 10**12)])
def test_blocks_are_wholly_cut_or_kept_and_never_come_back(block):
    module, pruner = made([draw_weight(26, 31), draw_weight(13, 26, seed=1)], block)
    orders = [(permutation(len(p), i), permutation(p.shape[1], i + 50)) for i, p in enumerate(module.parameters())]
    total, largest = 26 * 31 + 13 * 26, max(min(block[0], r) * min(block[1], c) for r, c in ((26, 31), (13, 26)))
    before = [torch.ones_like(mask) for mask in pruner.masks.values()]
    for step in range(1, 11):
        with torch.no_grad():
            for i, p in enumerate(module.parameters()):
                p.copy_(draw_weight(*p.shape, seed=10 * step + i))
        pruner.step_to(step / 10)
        cut = total - sum(int(mask.sum()) for mask in pruner.masks.values())
        assert round(step / 10 * total) - largest < cut <= round(step / 10 * total)
        for mask, earlier, (rows, columns) in zip(pruner.masks.values(), before, orders):
            assert not (mask & ~earlier).any()
            for strip in mask[rows][:, columns].split(block[0]):
                for piece in strip.split(block[1], dim=1):
                    assert piece.all() or not piece.any()
        before = [mask.clone() for mask in pruner.masks.values()]
    assert pruner.sparsity == 1


def test_the_same_sparsity_again_changes_nothing():
    module, pruner = made([draw_weight(20, 20), draw_weight(9, 20, seed=1)], (3, 4))
    for sparsity in (0.2, 0.5, 0.9):
        pruner.step_to(sparsity)
        masks, weights = pruner.state_dict(), arrays(module.parameters())
        pruner.step_to(sparsity)
        pruner.step_to(pruner.sparsity)
        assert all(torch.equal(masks[key], mask) for key, mask in pruner.masks.items())
        for before, after in zip(weights, arrays(module.parameters())):
            np.testing.assert_array_equal(before, after)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw_weight(*p.shape, seed=7))
    pruner.step_to(0.9)  # as many are masked already, whatever the weights are now
    assert all(torch.equal(masks[key], mask) for key, mask in pruner.masks.items())
    with pytest.raises(ValueError, match="sparsity must be at least"):
        pruner.step_to(0.5)


def test_masks_do_not_depend_on_threads_layout_or_the_device_of_the_order():
    weight = draw_weight(70, 50) * torch.logspace(-30, 0, 50)  # sums depend on the order of additions
    results = []
    for threads, turned, device in ((1, False, "cpu"), (2, False, "cpu"), (2, True, None)):
        module = Weights(weight.clone() if not turned else weight.t().contiguous().t())
        order = {(module, "w0"): (permutation(70, 0).to(device or weight.device),
                                  permutation(50, 1).to(device or weight.device))}
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            MagnitudePruner(module.targets(), block=(4, 8), order=order).step_to(0.7)
        finally:
            torch.set_num_threads(before)
        results.append(module.w0_mask)
    assert all(torch.equal(results[0], mask) for mask in results[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_masks_are_the_cpus():
    masks = []
    for device in ("cpu", "cuda"):
        module = Weights(draw_weight(300, 200).to(device), draw_weight(40, seed=1).to(device))
        order = {(module, "w0"): (permutation(300, 0).cpu(), permutation(200, 1).cpu())}
        pruner = MagnitudePruner(module.targets(), block=(16, 8), order=order)
        pruner.step_to(0.4)
        pruner.step_to(0.9)
        masks.append([mask.cpu() for mask in pruner.masks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*masks))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def test_no_float64_copy_of_the_weights_is_made():
    module, pruner = made([draw_weight(256, 256)], (16, 16))
    with Largest() as largest:
        pruner.step_to(0.9)
    assert largest.bytes == 256 * 256 * 4  # the tensor of |w|
    assert pruner.sparsity == pytest.approx(0.9, abs=256 / 256**2)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(shape):
    module, pruner = made([torch.empty(shape), draw_weight(4, 4)], (2, 2))
    pruner.step_to(0.5)
    assert int(module.w1_mask.sum()) == 8 and pruner.densities() == {"0.w0": 1.0, "1.w1": 0.5}
    module, pruner = made([torch.empty(shape)], (2, 2))
    pruner.step_to(0.5)
    assert pruner.sparsity == 0 and module.w0_mask.shape == shape


def test_an_order_of_nothing_ranks_weight_by_weight():
    module, plain = Weights(draw_weight(5, 5)), Weights(draw_weight(5, 5))
    MagnitudePruner(module.targets(), block=(5, 5), order={}).step_to(0.5)
    MagnitudePruner(plain.targets()).step_to(0.5)
    assert torch.equal(module.w0_mask, plain.w0_mask)


# --- nets ---------------------------------------------------------------------------------------------------

def recurrent_blocks(net: Net) -> dict:
    points = mk.manifold("torus").sample(8, generator=generator(4))
    order = mk.manifold_order(points, "torus")
    return {"block": (2, 4), "order": {(net.rnn, "weight_hh_l0"): (order, order)}}


def test_a_net_in_training_keeps_what_is_cut_at_zero():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    pruner = MagnitudePruner(net.targets(), optimizer=optimizer, **recurrent_blocks(net))
    remembered = 0
    for step in range(30):
        masked = [(getattr(module, name), mask) for (module, name), mask in zip(net.targets(), pruner.masks.values())]
        if step % 10 == 9:  # momentum has built up when a weight is masked
            gathered = [optimizer.state[weight]["exp_avg"].clone() for weight, _ in masked]
            pruner.step_to(0.25 * (step // 10 + 1))
            remembered += sum(int(momentum[~mask].ne(0).any()) for momentum, (_, mask) in zip(gathered, masked))
        optimizer.zero_grad()
        loss_of(net, seed=step).backward()
        optimizer.step()
        for weight, mask in masked:
            assert weight[~mask].eq(0).all() and weight.grad[~mask].eq(0).all() and weight[mask].ne(0).all()
            assert optimizer.state[weight]["exp_avg"][~mask].eq(0).all()
    cut, size = cut_count(net.targets()), size_of(pruner)
    assert round(0.75 * size) - 8 < cut <= round(0.75 * size)
    assert 0 < pruner.densities()["1.weight_hh_l0"] < 1
    assert remembered > 0  # without the hooks the optimizer would revive them


def test_state_dict_round_trip():
    net, other = Net(), Net(seed=1)
    pruner = MagnitudePruner(net.targets(), **recurrent_blocks(net))
    pruner.step_to(0.6)
    state = pruner.state_dict()
    loaded = MagnitudePruner(other.targets(), **recurrent_blocks(other))
    loaded.load_state_dict(state)
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(state[key], mask) for key, mask in loaded.masks.items())
    for each in (pruner, loaded):
        each.step_to(0.8)
    assert all(torch.equal(mask, loaded.masks[key]) for key, mask in pruner.masks.items())
    assert any((mask != state[key]).any() for key, mask in pruner.masks.items())


@pytest.mark.parametrize("named", ["encoder", "decoder", "both"])
def test_a_tied_weight_is_cut_in_blocks_whichever_owner_the_order_names(named):
    net, plain = Tied(), Weights(torch.empty(7, 4))
    with torch.no_grad():
        plain.w0.copy_(net.encoder.weight)
    pair = (permutation(7, 0), permutation(4, 1))
    owners = (net.encoder, net.decoder) if named == "both" else (getattr(net, named),)
    pruner = MagnitudePruner(net.targets(), block=(2, 3), order={(owner, "weight"): pair for owner in owners})
    MagnitudePruner(plain.targets(), block=(2, 3), order={(plain, "w0"): pair}).step_to(0.5)
    pruner.step_to(0.5)
    assert torch.equal(net.encoder.weight_mask, plain.w0_mask) and net.decoder.weight_mask is net.encoder.weight_mask


def test_masks_taken_over_from_torch_prune_go_on_in_blocks():
    layer = nn.Linear(6, 6)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=5)
    cut = layer.weight == 0
    targets = [(layer, "weight")]
    MagnitudePruner.from_torch_prune(targets)
    pruner = MagnitudePruner(targets, block=(3, 3), order={targets[0]: (torch.arange(6),) * 2})
    assert torch.equal(layer.weight_mask, ~cut)
    pruner.step_to(0.8)
    assert not layer.weight_mask[cut].any()
    whole = [piece.any() for strip in layer.weight_mask.split(3) for piece in strip.split(3, dim=1)]
    assert 0 < sum(map(int, whole)) < 4


def test_nan_is_refused_and_no_mask_changes():
    module, pruner = made([draw_weight(6, 6), draw_weight(4, 4, seed=1)], (2, 2))
    pruner.step_to(0.3)
    masks = pruner.state_dict()
    kept = tuple(module.w1_mask.nonzero()[0].tolist())
    with torch.no_grad():
        module.w1[kept] = float("nan")
    with pytest.raises(ValueError) as error:
        pruner.step_to(0.6)
    assert str(error.value) == ("weights must not hold NaN when they are ranked, got NaN in 1.w1; no mask was "
                                "changed, look at the loss and the learning rate.")
    assert all(torch.equal(masks[key], mask) for key, mask in pruner.masks.items())
    module.w1_mask[kept] = False  # a NaN that is masked already is set to 0
    pruner.step_to(0.6)
    assert not module.w1.isnan().any() and pruner.sparsity > 0.45


def test_the_order_is_copied():
    module = Weights(draw_weight(6, 6))
    order = permutation(6, 0)
    pruner = MagnitudePruner(module.targets(), block=(3, 3), order={(module, "w0"): (order, order)})
    before = order.clone()
    order.zero_()
    pruner.step_to(0.5)
    assert all(piece.all() or not piece.any() for strip in module.w0_mask[before][:, before].split(3)
               for piece in strip.split(3, dim=1))
