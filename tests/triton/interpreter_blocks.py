"""The Triton kernels of the masked RNN over blocks and strays in Triton's interpreter, through the ops, compared with
the float64 reference. test_interpreter_rnn.py runs this file in a process with TRITON_INTERPRET=1."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels.ops import blocked_rnn as blocked_rnn_op
from moduli_kernels.ops.block_layout import lay_out_blocks
from moduli_kernels.reference.rnn import Step
from moduli_kernels.triton import device
from moduli_kernels.triton.device import Device
from moduli_kernels.triton.rnn import blocked, shares as shares_table
from tests.triton.interpreter_rnn import STEPS, Layer, ops

pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
]
ALL, NONE = 1, 99999  # thresholds: every block with a kept entry is taken as one; none is


class Blocked(Layer):
    """The same layer through the other ops. The mask keeps more in some rows and columns than in others."""

    def __init__(self, n: int, batch: int = 5, steps: int = 3, side: int = 16, threshold: int = 60,
                 density: float = 0.25, ordered: bool = True, same_order: bool = True, **settings):
        super().__init__(n, batch, steps, density=density, **settings)
        generator = torch.Generator().manual_seed(n)
        uneven = torch.rand(n, 1, generator=generator) * torch.rand(1, n, generator=generator) * 4
        if density not in (0, 1):
            self.mask_hh &= torch.rand(n, n, generator=generator) < uneven
        order = torch.randperm(n, generator=generator) if ordered else None
        other = order if same_order else torch.randperm(n, generator=generator)
        self.layout = lay_out_blocks(self.mask_hh, order, other, side=side, threshold=threshold)
        if settings.get("poison"):
            self.w_hh[~self.mask_hh] = float("nan")

    def run(self, step: Step, needs: tuple[bool, ...] = (True,) * 5) -> dict[str, Tensor]:
        layout, side = blocked_rnn_op.flat(self.layout), self.layout.side
        masks = self.mask_ih, self.mask_hh, layout, side
        output, h_n, *kept = ops.blocked_rnn(self.x, self.h, *self.weights()[:4], *masks, self.lengths, *step, True)
        grads = ops.blocked_rnn_grads(*self.grads, self.x, self.h, self.w_ih, self.w_hh, *masks, self.lengths, *kept,
                                      *step, *needs)
        return dict(zip(("output", "h_n", "dx", "dh", "dw_ih", "dw_hh", "bias"), (output, h_n, *grads)))


@pytest.fixture(params=["sampled", "whole"])
def gradient(request, monkeypatch):
    """Takes each of the two ways to the hidden weight's gradient, whichever would be chosen."""
    monkeypatch.setattr(blocked, "STRAY_COST", 0 if request.param == "sampled" else 10**9)
    return request.param


@pytest.mark.parametrize("threshold", [ALL, 20, NONE])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_every_step(step, threshold, monkeypatch):
    monkeypatch.setattr(blocked, "STRAY_COST", 0)
    layer = Blocked(37, threshold=threshold, lengths=step.leak != 1, poison=True)
    assert (len(layer.layout.kept) > 0) == (threshold != NONE) and (len(layer.layout.strays) > 0) == (threshold != ALL)
    layer.check(step)


@pytest.mark.parametrize(("n", "batch", "steps", "side"), [(1, 1, 1, 16), (17, 33, 2, 16), (63, 5, 2, 32),
                                                          (70, 9, 1, 64)], ids=str)
def test_sizes(n, batch, steps, side, gradient):
    Blocked(n, batch, steps, side, threshold=side * side // 6).check()


def test_a_gradient_of_the_last_state_alone():
    Blocked(37, threshold=20, last_only=True).check(STEPS[2])


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [ALL, NONE])
def test_masks(density, threshold):
    Blocked(20, density=density, threshold=threshold, poison=density == 0).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, gradient):
    Blocked(37, threshold=20, dtype=dtype).check(Step("tanh", 0.5, False))


@pytest.mark.parametrize(("ordered", "same_order"), [(False, True), (True, False)])
def test_orders(ordered, same_order, gradient):
    """No order, and one for rows that is not that of columns."""
    Blocked(37, threshold=20, ordered=ordered, same_order=same_order).check()


def test_more_strips_and_tiles_than_programs(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", Device(9, 3, 99 * 1024, interpreted=True))
    monkeypatch.setattr(shares_table, "KEPT_TILE", 256)
    Blocked(40, 33, 2, threshold=20).check(Step("tanh", 0.5, False))


@pytest.mark.parametrize("step", STEPS[:3:2], ids=str)
def test_all_steps_in_one_launch(monkeypatch, step):
    """This is possible as on a GPU if one program has all rows, since it need not wait for another."""
    monkeypatch.setattr(device, "INTERPRETED", Device(9, 1, 99 * 1024, interpreted=True))
    Blocked(37, 9, 4, threshold=20, lengths=step.leak == 0.3).check(step)


def test_only_what_is_needed():
    layer, step = Blocked(19, 5, 2, threshold=20), Step("tanh", 1.0, False)
    want = layer.run(step)
    for which, name in enumerate(("dx", "dh", "dw_ih", "dw_hh", "bias")):
        got = layer.run(step, tuple(i == which for i in range(5)))
        assert torch.equal(got[name], want[name])
        assert all(got[other].numel() == 0 for other in ("dx", "dh", "dw_ih", "dw_hh", "bias") if other != name)


def test_nan_stays_with_its_element_of_the_batch():
    layer = Blocked(37, threshold=20)
    layer.x[1, 2, 0] = float("nan")
    got, others = layer.run(Step("relu", 1.0, False)), torch.tensor([0, 1, 3, 4])
    assert got["output"][1, 2].isnan().any()
    assert got["output"][:, others].isfinite().all() and got["dx"][:, others].isfinite().all()


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_compressed_hidden_weight(density, lengths):
    """masked_rnn takes compressed rows."""
    layer = Layer(37, density=density, lengths=lengths)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), layer.mask_hh.sum(1).cumsum(0)])
    output, h_n, _ = ops.masked_rnn(
        layer.x, layer.h, layer.w_ih, layer.w_hh[layer.mask_hh], layer.b_ih, layer.b_hh, layer.mask_ih, None, None,
        None, crow, layer.mask_hh.nonzero()[:, 1], layer.lengths, None, None, "tanh", 0.5, True,
        False)
    want = layer.expected(Step("tanh", 0.5, True))
    for name, got in (("output", output), ("h_n", h_n)):
        assert (got.double() - want[name]).norm() <= 2e-6 * want[name].norm()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autograd_and_the_checks_of_ops(backend):
    layer, step = Blocked(19, 5, 2, threshold=20), ("tanh", 0.5, False)
    leaves = [t.requires_grad_() for t in (layer.x, layer.h, layer.w_ih, layer.w_hh, layer.b_ih, layer.b_hh)]
    arguments = (*leaves, layer.mask_ih, layer.mask_hh, blocked_rnn_op.flat(layer.layout), 16, None, *step, True)
    with mk.backend(backend):
        output, h_n, *_ = ops.blocked_rnn(*arguments)
        found = torch.autograd.grad((output, h_n), leaves, layer.grads)
        if backend == "reference":
            torch.library.opcheck(ops.blocked_rnn.default, arguments, test_utils=(
                "test_schema", "test_autograd_registration", "test_faketensor"))
    want = layer.expected(Step(*step))
    names = ("dx", "dh", "dw_ih", "dw_hh", "bias", "bias")
    assert all((got.double() - want[name]).norm() <= 2e-6 * want[name].norm() for got, name in zip(found, names))


@pytest.mark.parametrize("gpu", [device.INTERPRETED, Device(9, 20, 64 * 1024)], ids=str)
def test_all_programs_fit_at_once_and_everything_is_done(gpu):
    for side in (None, 16, 32, 64):
        for n in (1, 63, 650, 2113, 4096, 20000):
            for pitch in (8, 24, 40, 200, 1000, 20000):
                for strays in (0, n, n * n // 50):
                    s = shares_table.kept_shares(n, pitch, side, strays, 4, gpu)
                    assert s.parts * s.tiles * s.batch >= pitch > (s.parts * s.tiles - s.tiles) * s.batch
                    assert s.strips * s.parts <= gpu.multiprocessors and s.rows == (side or s.rows)
                    assert s.rows * s.batch * s.entries <= shares_table.KEPT_TILE and s.stages in (3, 5, 7)
