"""The compiled masked RNN where kept weights lie in blocks: against the reference, on every instruction set."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import runtime
from moduli_kernels.ops import masked_rnn as masked_rnn_op, torch_ops
from moduli_kernels.ops.found_blocks import FOUND_BLOCKS
from tests.support.rnn_op import STEPS, both, compiled

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(runtime.cpu_ops_error is not None, reason="needs the compiled CPU kernels")

# (side of the blocks, share of them, share of strays, share of a block's entries that is kept)
MASKS = [(16, 0.2, 0.0, 1.0), (8, 0.2, 0.0, 1.0), (32, 0.2, 0.02, 1.0), (16, 0.2, 0.05, 0.8), (8, 0.1, 0.02, 0.9)]
# (steps, batch, inputs, neurons): one lane, fewer lanes than a vector, several strips, neurons that fill no block
SIZES = [(3, 1, 40, 70), (2, 3, 33, 64), (3, 17, 70, 130), (2, 40, 16, 100), (2, 200, 24, 48)]


def mask_of_blocks(rows, columns, kind, row_order, column_order, generator):
    """A mask whose blocks show in these orders; None: in its own."""
    side, share, strays, inside = kind
    squares = torch.rand(-(-rows // side), -(-columns // side), generator=generator) < share
    squares[0, 0] = True
    ordered = squares.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
    ordered = ordered & (torch.rand(rows, columns, generator=generator) < inside)
    ordered = ordered | (torch.rand(rows, columns, generator=generator) < strays)
    mask = torch.empty_like(ordered)
    places = [torch.arange(n) if order is None else order for n, order in ((rows, row_order), (columns, column_order))]
    mask[places[0][:, None], places[1]] = ordered
    return mask


def drawn(sizes, kind, ordered, with_lengths, dtype, masked_inputs=True):
    """tensors, masks, lengths, orders and the gradients of output and last state. Masked weights are NaN."""
    steps, batch, inputs, hidden = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    order_x, order_h = (torch.randperm(n, generator=generator) if ordered else None for n in (inputs, hidden))
    masks = [mask_of_blocks(hidden, inputs, kind, order_h, order_x, generator) if masked_inputs else None,
             mask_of_blocks(hidden, hidden, kind, order_h, order_h, generator)]
    weights = [normal(hidden, inputs, scale=0.3), normal(hidden, hidden, scale=1 / hidden**0.5)]
    weights = [weight if mask is None else weight.masked_fill(~mask, float("nan"))
               for weight, mask in zip(weights, masks)]
    tensors = [normal(steps, batch, inputs), normal(batch, hidden), *weights, normal(hidden), normal(hidden)]
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator) if with_lengths else None
    return tensors, masks, (lengths, order_x, order_h), [normal(steps, batch, hidden), normal(batch, hidden)]


def check(dtype, sizes, ordered):
    limit = 1e-13 if dtype == torch.float64 else 1e-5
    reference = masked_rnn_op.MASKED_RNN.by_reference, masked_rnn_op.MASKED_RNN_GRADS.by_reference
    for k, kind in enumerate(MASKS):
        step = STEPS[k % len(STEPS)]
        tensors, masks, where, grads = drawn(sizes, kind, ordered, k % 2 == 1, dtype, masked_inputs=k != 2)
        doubled = [t.double() for t in tensors], masks, where, [t.double() for t in grads], step
        truth, own = both(*reference, *doubled), both(*reference, tensors, masks, where, grads, step)
        for got, rounded, expected in zip(compiled(tensors, masks, where, grads, step), own, truth, strict=True):
            assert got.shape == expected.shape and got.dtype == dtype
            error, reached = ((t.double() - expected).norm() for t in (got, rounded))
            assert error <= max(limit * expected.norm(), 3 * reached), (kind, step, error, expected.norm())


@pytest.mark.parametrize("ordered", [False, True], ids=["as they are", "in an order"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_reference(sizes, ordered):
    check(torch.float64, sizes, ordered)
    check(torch.float32, sizes, ordered)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa):
    program = ("import torch, tests.rnn.test_rnn_cpp_blocks as t\n"
               "for sizes in t.SIZES:\n"
               "    t.check(torch.float64, sizes, True); t.check(torch.float32, sizes, False)\n")
    settings = {"MODULI_KERNELS_ISA": isa, "OMP_NUM_THREADS": "1", "MODULI_KERNELS_POISON": "1",
                "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | settings)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("sizes", [(6, 70, 40, 400), (4, 20, 40, 200), (5, 1, 40, 600), (9, 200, 16, 300)], ids=str)
def test_bitwise_equal_for_any_number_of_threads(sizes, ordered):
    arguments = drawn(sizes, (16, 0.1, 0.01, 0.9), ordered, True, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(compiled(*arguments, STEPS[2]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_lane_that_is_not_a_number_stays_alone():
    tensors, masks, where, grads = drawn((3, 20, 16, 64), (16, 0.3, 0.02, 0.9), True, False, torch.float32)
    tensors[0][0, 7, 3] = float("nan")
    output = compiled(tensors, masks, where, grads, STEPS[0])[0]
    assert output[:, 7].isnan().any() and not output[:, torch.arange(20) != 7].isnan().any()


@pytest.mark.parametrize("order", [[0, 0, 2, 3], [0, 1, 2, 4], [0, 1, 2, -1], [0, 1, 2]], ids=str)
def test_an_order_that_is_no_permutation_is_refused(order):
    x, h, w = torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.zeros(4, 4)
    mask, order = torch.ones(4, 4, dtype=torch.bool), torch.tensor(order)
    with pytest.raises(RuntimeError, match="an order must"), torch._C._AutoDispatchBelowAutograd():
        torch_ops.masked_rnn(x, h, w, w, None, None, None, mask, *[None] * 6, order, "tanh", 1.0, False, False)


@pytest.mark.parametrize("batch", [1, 20])
def test_blocks_are_found_as_the_rule_says(batch):
    generator = torch.Generator().manual_seed(batch)
    for k in range(60):
        rows, columns = torch.randint(1, 150, (2,), generator=generator).tolist()
        kind = (*MASKS[k % len(MASKS)][:2], 0.03, 0.8)
        mask = mask_of_blocks(rows, columns, kind, None, None, generator)
        orders = [torch.randperm(n, generator=generator) for n in (rows, columns)] if k % 3 == 2 else [None, None]
        found = torch_ops.found_blocks(mask, *orders, batch)
        assert torch.equal(found, FOUND_BLOCKS.by_reference(mask, *orders, batch))
        side, blocks, inside, strays = found.tolist()
        assert inside + strays == mask.sum() and inside <= blocks * side**2


def test_a_net_multiplies_in_the_orders_of_its_layers():
    """Both layers and directions, W_ih and W_hh: the dense path's results, and explain() counts the blocks."""
    generator = torch.Generator().manual_seed(0)
    net = mk.SparseRNN(20, 96, 2, bidirectional=True, path="sparse")
    orders = {}
    for name in ("weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"):
        orders[name] = torch.randperm(96, generator=generator)
        net.set_order(name, orders[name])
        net.set_mask(name, mask_of_blocks(96, 96, MASKS[0], orders[name], orders[name], generator))
    inputs = torch.cat([orders["weight_hh_l0"], orders["weight_hh_l0_reverse"] + 96])
    for end in ("", "_reverse"):
        rows = orders[f"weight_hh_l1{end}"]
        net.set_mask(f"weight_ih_l1{end}", mask_of_blocks(96, 192, MASKS[0], rows, inputs, generator))
    x = torch.randn(5, 20, 20, generator=generator)
    found = gradients_of(net, x)
    words = net.explain()
    net.path = "dense"
    for got, want in zip(found, gradients_of(net, x), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
    assert words.count("100 % of them kept, and 0 stray weights, with neurons in the order set by set_order") == 6


def gradients_of(net, x):
    net.zero_grad()
    output, _ = net(x)
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in net.parameters())]


def test_a_compressed_net_keeps_its_orders():
    generator = torch.Generator().manual_seed(0)
    net, order = mk.SparseRNN(4, 64, path="sparse"), torch.randperm(64, generator=generator)
    net.set_order("weight_hh_l0", order)
    net.set_mask("weight_hh_l0", mask_of_blocks(64, 64, MASKS[0], order, order, generator))
    x, small = torch.randn(3, 1, 4, generator=generator), net.compress()
    loaded = mk.CompressedRNN(4, 64)
    loaded.load_state_dict(small.state_dict())
    with torch.no_grad():
        want = net(x)[0]
        for other in (small, loaded, loaded.to_sparse_rnn()):
            assert torch.equal(other.get_buffer("weight_hh_l0_order"), order)
            assert (other(x)[0] - want).norm() <= 1e-6 * want.norm()
    bad = small.state_dict() | {"weight_hh_l0_order": torch.zeros(64, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="must be an int64 permutation"):
        mk.CompressedRNN(4, 64).load_state_dict(bad)
