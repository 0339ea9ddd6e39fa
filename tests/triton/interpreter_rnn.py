"""The Triton kernels of the masked RNN in Triton's interpreter, through the ops, compared with the float64 reference.
test_interpreter_rnn.py runs this file in a process with TRITON_INTERPRET=1.

The interpreter runs programs one after the other, so the launcher goes step by step, unless one program has all rows.
All that several programs add is the barrier, which interpreter_barrier.py tests. The interpreter truncates where it
should round to bfloat16.
"""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels.reference import rnn as reference_rnn
from moduli_kernels.reference.rnn import Step
from moduli_kernels.triton.device import INTERPRETED, Device, numbers_for
from moduli_kernels.triton.rnn import shares as shares_table
from moduli_kernels.triton.rnn.shares import Shares

# NumPy warns about what is right here: e^2x of large x, and inf - inf of poisoned weights
pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-12}
ops = torch.ops.moduli_kernels


@pytest.fixture
def taken(monkeypatch):
    """Lists the ways that launches take, as (way, tiles of the batch in a part)."""
    ways: list[tuple[str, int]] = []
    shares_for = shares_table.shares_for

    def noted(*arguments):
        shares = shares_for(*arguments)
        ways.append((shares.way, shares.tiles))
        return shares

    monkeypatch.setattr(shares_table, "shares_for", noted)
    return ways


def force(monkeypatch, way: str, n: int, batch: int, rows: int = 16, tile: int = 8, parts: int = 2, strips: int = 2,
          more: int = 0):
    """Takes one of the ways, at a size that would not take it."""
    depth = max(128 if way == "held" else 16, shares_table.power_of_2(n - more))
    tiles = shares_table.cdiv(shares_table.cdiv(batch, tile), parts)
    shares = {"alone": Shares("alone", depth, tile, depth, 1, 8, 1, shares_table.cdiv(batch, tile), 1),
              "held": Shares("held", rows, tile, depth, 8, 8, shares_table.cdiv(n, rows), parts, tiles, more=more),
              "streamed": Shares("streamed", rows, tile, 16, 1, 8, strips, parts, tiles)}[way]
    monkeypatch.setattr(shares_table, "shares_for", lambda *_: shares)


class Layer:
    """Random arguments of the ops. density: the share of entries that masks keep; None: no masks. last_only: only the
    last state has a gradient."""

    def __init__(self, n: int, batch: int = 5, steps: int = 3, inputs: int = 7, dtype: torch.dtype = torch.float32,
                 density: float | None = None, biases: str = "both", lengths: bool = False, poison: bool = False,
                 last_only: bool = False):
        generator = torch.Generator().manual_seed(n + batch + steps)
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.x, self.h = draw(steps, batch, inputs), draw(batch, n)
        self.w_ih, self.w_hh = draw(n, inputs) / inputs**0.5, draw(n, n) / n**0.5
        self.b_ih, self.b_hh = (draw(n) if biases in (name, "both") else None for name in ("ih", "hh"))
        self.mask_ih = self.mask_hh = self.lengths = None
        if density is not None:
            self.mask_ih = torch.rand(n, inputs, generator=generator) < density
            self.mask_hh = torch.rand(n, n, generator=generator) < density
            self.mask_hh[n // 2:n // 2 + 2] = density == 1  # empty rows
        if poison:
            self.w_ih[~self.mask_ih], self.w_hh[~self.mask_hh] = float("nan"), float("inf")
        if lengths:
            self.lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
        self.grads = None if last_only else draw(steps, batch, n), draw(batch, n)

    def weights(self) -> tuple:
        return self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.mask_ih, self.mask_hh

    def run(self, step: Step, needs: tuple[bool, ...] = (True,) * 5) -> dict[str, Tensor]:
        output, h_n, activations = ops.masked_rnn(self.x, self.h, *self.weights(), None, None, None, None, self.lengths,
                                                  None, None, *step, True)
        grads = ops.masked_rnn_grads(*self.grads, self.x, self.h, self.w_ih, self.w_hh, self.mask_ih, self.mask_hh,
                                     self.lengths, None, None, output, activations, *step, *needs)
        return dict(zip(("output", "h_n", "dx", "dh", "dw_ih", "dw_hh", "bias"), (output, h_n, *grads)))

    def expected(self, step: Step) -> dict[str, Tensor]:
        double = [t.double() if t is not None and t.is_floating_point() else t
                  for t in (self.x, self.h, *self.weights(), self.lengths, *self.grads)]
        x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, lengths, *grads = double
        output, h_n, activations = reference_rnn.masked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, lengths,
                                                            step)
        found = reference_rnn.masked_rnn_grads(*grads, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output, activations,
                                               step, True, True, True, True, True)
        return dict(zip(("output", "h_n", "dx", "dh", "dw_ih", "dw_hh", "bias"), (output, h_n, *found)))

    def check(self, step: Step = Step("tanh", 1.0, False)) -> dict[str, Tensor]:
        got, want = self.run(step), self.expected(step)
        for name, tensor in got.items():
            assert tensor.dtype == self.x.dtype and tensor.shape == want[name].shape, name
            scale = want[name].norm().clamp(min=1e-30)
            assert (tensor.double() - want[name]).norm() <= TOLERANCE[self.x.dtype] * scale, name
        for name, mask in (("dw_ih", self.mask_ih), ("dw_hh", self.mask_hh)):
            assert mask is None or not got[name][~mask].any()
        return got


# --- what is computed ------------------------------------------------------------------------------------------

STEPS = [Step("tanh", 1.0, False), Step("relu", 1.0, True), Step("tanh", 0.3, True), Step("relu", 0.6, False)]


@pytest.mark.parametrize(("step", "lengths"), [*((step, step.leak != 1) for step in STEPS), (STEPS[0], True),
                                               (STEPS[2], False)], ids=str)
@pytest.mark.parametrize("way", ["alone", "held", "streamed"])
def test_every_step_in_every_way(monkeypatch, way, step, lengths):
    force(monkeypatch, way, 17, 9)
    Layer(17, 9, density=0.4, lengths=lengths, poison=True).check(step)


def test_a_depth_in_two_parts(monkeypatch):
    """The depth need not be a power of 2: n = 650 takes 768, which is 512 + 256."""
    for n, parts, whole in [(650, 16, (512, 256)), (512, 16, (512, 0)), (769, 16, (1024, 0)), (1, 8, (128, 0)),
                            (150, 8, (256, 0)), (257, 8, (256, 128)), (1100, 16, (1024, 256)), (1290, 16, (1024, 512))]:
        assert shares_table.depths(n, parts) == whole
    force(monkeypatch, "held", 150, 9, more=128)
    Layer(150, 9, 2, density=0.4).check(STEPS[2])


@pytest.mark.parametrize("way", ["alone", "held", "streamed"])
def test_a_gradient_of_the_last_state_alone(monkeypatch, way):
    force(monkeypatch, way, 17, 9)
    Layer(17, 9, density=0.4, last_only=True).check(STEPS[3])


@pytest.mark.parametrize("step", STEPS[:3:2], ids=str)
@pytest.mark.parametrize(("way", "n"), [("alone", 17), ("held", 16), ("streamed", 37)])
def test_all_steps_in_one_launch(monkeypatch, way, n, step):
    """This is possible as on a GPU if one program has all rows, since it need not wait for another."""
    force(monkeypatch, way, n, 9, strips=1)
    Layer(n, 9, 4, density=0.4, lengths=step.leak == 0.3).check(step)


@pytest.mark.parametrize(("n", "batch", "steps"), [(1, 1, 1), (1, 5, 2), (17, 1, 7), (63, 33, 2), (130, 1, 1),
                                                  (64, 5, 2), (130, 20, 2)], ids=str)
def test_sizes(n, batch, steps, taken):
    Layer(n, batch, steps).check()
    assert {way for way, _ in taken} == {"alone" if n <= 128 else "held"}


@pytest.mark.parametrize(("way", "n", "batch"), [("held", 130, 17), ("held", 63, 5), ("streamed", 63, 17),
                                                 ("streamed", 40, 20), ("alone", 63, 33)], ids=str)
def test_sizes_in_ways_that_larger_ones_take(monkeypatch, way, n, batch):
    """More strips than programs, parts with several tiles, tiles and parts that reach beyond the batch."""
    force(monkeypatch, way, n, batch)
    Layer(n, batch, 2, density=0.5).check(Step("tanh", 0.5, False))


@pytest.mark.parametrize("density", [None, 0.0, 0.02, 1.0], ids=str)
def test_masks(density):
    Layer(40, density=density, poison=density is not None).check()


@pytest.mark.parametrize("biases", ["ih", "hh", "none"])
def test_biases(biases):
    Layer(20, biases=biases).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [20, 130])
def test_dtypes(n, dtype):
    """The reference serves float64."""
    Layer(n, 5, 2, dtype=dtype, density=0.5).check(Step("tanh", 0.5, False))


def test_tf32_is_switched_as_for_cudnn(monkeypatch):
    precision = lambda: numbers_for(torch.empty(1)).PRECISION  # noqa: E731
    assert precision() == "tf32"
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert precision() == "tf32x3"
    assert numbers_for(torch.empty(1, dtype=torch.bfloat16)).PRECISION == "tf32"
    Layer(130, 5, 2).check()


# --- limits ----------------------------------------------------------------------------------------------------

def test_tanh(monkeypatch):
    """Small, large and singular arguments go through a layer that passes them on."""
    force(monkeypatch, "alone", 1, 10_000, tile=1024)
    a = torch.cat([torch.logspace(-30, 4, 2000), torch.linspace(0, 12, 2000), torch.tensor([0.0, float("inf")])])
    a = torch.cat([a, -a])[None, :, None]
    output, *_ = ops.masked_rnn(a, torch.zeros(a.shape[1], 1), torch.ones(1, 1), torch.zeros(1, 1), None, None, None,
                                None, None, None, None, None, None, None, None, "tanh", 1.0, False, False)
    want = a.double().tanh()
    assert ((output.double() - want).abs() <= 2.1e-7 * want.abs()).all()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("n", [20, 130])
def test_nan_stays_with_its_element_of_the_batch(n, nonlinearity):
    layer = Layer(n, 5, 3, density=0.5)
    layer.x[1, 2, 0] = float("nan")
    got = layer.run(Step(nonlinearity, 1.0, False))
    others = torch.tensor([0, 1, 3, 4])
    assert got["output"][1, 2].isnan().any() and got["output"][0].isfinite().all()
    assert got["output"][:, others].isfinite().all() and got["dx"][:, others].isfinite().all()


@pytest.mark.parametrize("size", [(0, 5, 7), (3, 0, 7), (3, 5, 0)], ids=str)
def test_empty(size):
    steps, batch, inputs = size
    layer = Layer(4, max(batch, 1), max(steps, 1), max(inputs, 1))
    layer.x, layer.h = torch.rand(size), torch.rand(batch, 4)
    layer.w_ih, layer.grads = torch.rand(4, inputs), (torch.rand(steps, batch, 4), torch.rand(batch, 4))
    layer.check()


def test_only_what_is_needed():
    layer, step = Layer(20, 5, 3, density=0.5), Step("tanh", 1.0, False)
    want = layer.run(step)
    for which, name in enumerate(("dx", "dh", "dw_ih", "dw_hh", "bias")):
        needs = tuple(i == which for i in range(5))
        got = layer.run(step, needs)
        assert torch.equal(got[name], want[name])
        assert all(got[other].numel() == 0 for other in ("dx", "dh", "dw_ih", "dw_hh", "bias") if other != name)


def test_compressed_input_weight():
    layer = Layer(20, density=0.3)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), layer.mask_ih.sum(1).cumsum(0)])
    got, *_ = ops.masked_rnn(layer.x, layer.h, layer.w_ih[layer.mask_ih], layer.w_hh, layer.b_ih, layer.b_hh, None,
                             layer.mask_hh, crow, layer.mask_ih.nonzero()[:, 1], None, None, None, None, None, "tanh",
                             1.0, False, False)
    want = layer.expected(Step("tanh", 1.0, False))["output"]
    assert (got.double() - want).norm() <= 2e-6 * want.norm()


def test_runs_are_alike():
    layer = Layer(130, 5, 2, density=0.3)
    one, other = layer.run(STEPS[2]), layer.run(STEPS[2])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_other_backends_are_served_as_before():
    layer = Layer(20)
    with mk.backend("reference"):
        output, *_ = ops.masked_rnn(layer.x, layer.h, *layer.weights(), *[None] * 7, "tanh", 1.0, False, False)
    want = layer.expected(Step("tanh", 1.0, False))["output"]
    assert (output.double() - want).norm() <= 1e-6 * want.norm()


# --- how it is shared out --------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", [INTERPRETED, Device(9, 84, 99 * 1024), Device(9, 20, 64 * 1024)], ids=str)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_all_programs_fit_at_once_and_everything_is_done(itemsize, exact, device):
    for n in (1, 16, 63, 128, 129, 650, 1024, 2048, 2113, 4096, 20000):
        for batch in (1, 8, 20, 33, 200, 1000, 20000):
            s = shares_table.shares_for(n, batch, itemsize, exact, device)
            assert s.parts * s.tiles * s.batch >= batch > (s.parts * s.tiles - s.tiles) * s.batch
            assert s.way == "alone" or s.strips * s.parts <= device.multiprocessors
            assert s.way == "streamed" or s.rows * s.strips >= n and s.depth + s.more >= n
            assert s.depth % (16 * s.split) == 0 == s.more % (16 * s.split) and s.split in (1, s.warps)
            if s.way == "held":
                assert (s.depth + s.more) * itemsize * (s.rows + s.batch) <= device.shared
