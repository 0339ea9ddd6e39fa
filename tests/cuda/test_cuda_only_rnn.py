"""What only a GPU can show of the masked RNN's kernels: programs that wait for each other, CUDA graphs, streams,
devices, synchronization and races; and agreement with the reference at the sizes that take each way.

    MODULI_KERNELS_TEST_DEVICE=cuda pytest tests/cuda/test_cuda_only_rnn.py
"""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels.ops import blocked_rnn as blocked_rnn_op
from moduli_kernels.ops.block_layout import lay_out_blocks
from moduli_kernels.reference import rnn as reference_rnn
from moduli_kernels.reference.rnn import Step
from tests.cuda.test_cuda_only import capture, same
from tests.support.penalty_cases import DEVICE, on_device
from tests.support.rnn_cases import assert_same, draw, net_of, plain_rnn, run

pytestmark = [on_device, pytest.mark.cuda, pytest.mark.skipif(
    DEVICE != "cuda", reason="needs a CUDA GPU, and MODULI_KERNELS_TEST_DEVICE=cuda")]
ops = torch.ops.moduli_kernels
NAMES = ("output", "h_n", "dx", "dh", "dw_ih", "dw_hh", "bias")
TANH = Step("tanh", 1.0, False)

# rows, batch, steps and further settings, by the way that the steps take on a large GPU
SETTINGS: dict[str, dict] = {
    "alone": {"n": 100, "batch": 33, "steps": 50},
    "alone, leak, lengths": {"n": 64, "batch": 5, "steps": 20, "step": Step("relu", 0.3, True), "lengths": True},
    "held": {"n": 650, "batch": 20, "steps": 35, "density": 0.1},
    "held, leak, lengths": {"n": 300, "batch": 40, "steps": 20, "step": Step("tanh", 0.5, True), "lengths": True},
    "held, several tiles": {"n": 1024, "batch": 200, "steps": 10},
    "held, bfloat16": {"n": 650, "batch": 20, "steps": 20, "dtype": torch.bfloat16},
    "streamed": {"n": 2200, "batch": 20, "steps": 10, "density": 0.1},
    "streamed, several parts": {"n": 3000, "batch": 300, "steps": 5, "dtype": torch.float16},
    "strays": {"n": 1500, "batch": 20, "steps": 20, "density": 0.02, "threshold": 99999},
    "strays, leak, lengths": {"n": 650, "batch": 33, "steps": 20, "density": 0.02, "threshold": 99999,
                              "step": Step("relu", 0.5, True), "lengths": True},
    "blocks": {"n": 1500, "batch": 200, "steps": 10, "density": 0.1, "threshold": 60},
    "blocks and strays": {"n": 650, "batch": 40, "steps": 20, "density": 0.02, "threshold": 100, "side": 16},
    "blocks of 64, bfloat16": {"n": 1000, "batch": 100, "steps": 10, "density": 0.1, "threshold": 200, "side": 64,
                               "dtype": torch.bfloat16},
    "float64": {"n": 40, "batch": 5, "steps": 5, "dtype": torch.float64},
}
# errors relative to the norm; tf32 rounds what it multiplies to 2^-11
TOLERANCE = {torch.float64: 1e-10, "ieee": 1e-5, "tf32": 2e-2, torch.bfloat16: 1e-1, torch.float16: 2e-2}


class Net:
    """A layer with random weights, drawn on the CPU. A call returns states and all gradients.

    threshold: of the block layout; the layer then goes through blocked_rnn, and its mask keeps a share `density` of the
    blocks and, outside them, a tenth of that in single entries.
    """

    def __init__(self, n: int, batch: int, steps: int, dtype: torch.dtype = torch.float32, density: float | None = None,
                 threshold: int | None = None, side: int = 32, step: Step = TANH, lengths: bool = False, seed: int = 0,
                 device: str = "cuda"):
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(device)

        def chance(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device="cpu").to(device)

        self.step, self.side = step, side
        self.x, self.h = draw(steps, batch, 24), draw(batch, n)
        scale = (n * (density or 1)) ** -0.5
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = draw(n, 24) / 5, draw(n, n) * scale, draw(n) / 9, draw(n) / 9
        self.grads = draw(steps, batch, n), draw(batch, n)
        self.mask_ih = self.mask_hh = self.lengths = self.layout = None
        if density is not None:
            self.mask_ih, self.mask_hh = chance(n, 24) < 0.5, chance(n, n) < density
        if threshold is not None:
            blocks = -(-n // side)
            whole = (chance(blocks, blocks) < density).repeat_interleave(side, 0).repeat_interleave(side, 1)[:n, :n]
            if threshold <= side * side:
                self.mask_hh = whole & (chance(n, n) < 0.5) | (chance(n, n) < density / 10)
            order = torch.randperm(n, generator=generator, device="cpu").to(device)
            back = order.argsort()
            self.mask_hh = self.mask_hh[back][:, back].contiguous()
            layout = lay_out_blocks(self.mask_hh, order, order, side=side, threshold=threshold)
            self.layout = blocked_rnn_op.flat(layout)
        if lengths:
            self.lengths = torch.randint(0, steps + 1, (batch,), generator=generator, device="cpu").to(device)

    def __call__(self) -> tuple[Tensor, ...]:
        weights, biases = (self.w_ih, self.w_hh), (self.b_ih, self.b_hh)
        if self.layout is None:
            masks = self.mask_ih, self.mask_hh
            output, h_n, s = ops.masked_rnn(self.x, self.h, *weights, *biases, *masks, *[None] * 4, self.lengths,
                                            None, None, *self.step, True)
            return output, h_n, *ops.masked_rnn_grads(*self.grads, self.x, self.h, *weights, *masks, self.lengths,
                                                      None, None, output, s, *self.step, *[True] * 5)
        masks = self.mask_ih, self.mask_hh, self.layout, self.side
        output, h_n, *kept = ops.blocked_rnn(self.x, self.h, *weights, *biases, *masks, self.lengths, *self.step, True)
        return output, h_n, *ops.blocked_rnn_grads(*self.grads, self.x, self.h, *weights, *masks, self.lengths, *kept,
                                                   *self.step, *[True] * 5)

    def expected(self) -> tuple[Tensor, ...]:
        def double(*tensors: Tensor | None) -> list[Tensor | None]:
            return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]

        x, h, w_ih, w_hh = double(self.x, self.h, self.w_ih, self.w_hh)
        rest = self.mask_ih, self.mask_hh, self.lengths
        output, h_n, s = reference_rnn.masked_rnn(x, h, w_ih, w_hh, *double(self.b_ih, self.b_hh), *rest, self.step)
        return output, h_n, *reference_rnn.masked_rnn_grads(*double(*self.grads), x, h, w_ih, w_hh, *rest, output, s,
                                                            self.step, *[True] * 5)

    def redraw(self, seed: int) -> None:
        """Puts other numbers into the same memory."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for tensor in (self.x, self.h, *self.grads):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.dtype))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_as_the_reference_has_it(settings, precision, monkeypatch):
    dtype = settings.get("dtype", torch.float32)
    if dtype != torch.float32 and precision == "ieee":
        pytest.skip("only float32 has two precisions")
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    net = Net(**settings)
    tolerance = TOLERANCE[precision if dtype == torch.float32 else dtype]
    for name, got, want in zip(NAMES, net(), net.expected()):
        assert (got.double() - want).norm() <= tolerance * want.norm(), name


def test_a_net_over_blocks_and_strays_as_nn_rnn(monkeypatch):
    """2048 neurons keep 2 % of the weights, then 1 %. The module chooses this form, and a new layout for each mask."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    net, x, hx = net_of(64, 2048, densities=(None, 0.05)), draw(20, 20, 64), draw(1, 20, 2048, seed=1)
    net.set_order("weight_hh_l0", torch.randperm(2048))
    pruner = mk.MagnitudePruner([(net, "weight_hh_l0")])
    for sparsity in (0.98, 0.99):
        pruner.step_to(sparsity)
        layout = net._layout("weight_hh_l0", net.weight_hh_l0, 20, {})
        assert int(layout.kept.sum()) + len(layout.strays) == int(net.weight_hh_l0_mask.sum())
        assert "stray weights, in the order set by set_order" in net.explain(20, 20)
        assert_same(net, run(net, x, hx), run(plain_rnn(net, torch.float64), x, hx), 1e-5)
    net.weight_hh_l0_mask.data.logical_not_()  # a write without a trace
    net.weight_hh_l0.data.div_(40)
    assert_same(net, run(net, x, hx), run(plain_rnn(net, torch.float64), x, hx), 1e-5)


def test_a_graph_reads_the_mask_that_is_there_when_it_is_replayed():
    """No layout is recorded: the op reads the mask itself, which may change in place between replays."""
    net, x = net_of(64, 2048, densities=(None, 0.02)), draw(20, 20, 64)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return net(x)

    graph, results = capture(step)
    for change in (lambda: None, lambda: net.weight_hh_l0_mask.data.copy_(net.weight_hh_l0_mask.t().clone())):
        change()
        graph.replay()
        with torch.no_grad():
            want = plain_rnn(net, torch.float64)(x.double())[0]
        assert (results[0].double() - want).norm() <= 2e-2 * want.norm()


def test_thousand_runs_are_alike():
    """They are, bit by bit, in each way in which programs wait for each other. A race may show in one run of many."""
    for name in ("held", "held, several tiles", "streamed", "strays", "blocks and strays"):
        net = Net(**SETTINGS[name] | {"steps": 10})
        first = [t.view(torch.int32) for t in net()]
        differ = torch.zeros((), dtype=torch.int64)
        for _ in range(1000):  # differences are counted on the device, so that nothing waits between two runs
            for t, bits in zip(net(), first):
                differ += (t.view(torch.int32) != bits).sum()
        assert int(differ) == 0, name


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_graph_of_forward_and_backward(settings):
    """Replayed on other inputs and states, it gives what eager mode gives, bit by bit."""
    net = Net(**settings)
    graph, results = capture(net)
    for seed in (1, 2):
        net.redraw(seed)
        graph.replay()
        replayed = tuple(t.clone() for t in results)
        assert same(replayed, net())


def test_two_streams_at_once():
    """The programs of each of two sequences fill the GPU. Neither takes the place that the other waits for."""
    nets = [Net(**SETTINGS["held"] | {"seed": seed}) for seed in (1, 2)]
    want = [net() for net in nets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in nets]
    found: list[tuple[Tensor, ...]] = []
    for _ in range(20):
        found = []
        for net, stream in zip(nets, streams):
            with torch.cuda.stream(stream):
                found.append(net())
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(found, want))


def test_runs_on_the_current_stream():
    net = Net(**SETTINGS["held"])
    net()
    fresh = Net(**SETTINGS["held"] | {"seed": 5})
    want = fresh()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of ms
        for name in ("x", "h", "w_ih", "w_hh", "b_ih", "b_hh", "mask_ih", "mask_hh"):
            getattr(net, name).copy_(getattr(fresh, name))
        for ours, other in zip(net.grads, fresh.grads):
            ours.copy_(other)
        found = net()
    stream.synchronize()
    assert same(found, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["alone", "held", "streamed", "blocks and strays"])
def test_the_second_device_as_the_first(name):
    want = [t.cpu() for t in Net(**SETTINGS[name])()]
    found = Net(**SETTINGS[name], device="cuda:1")()
    assert all(t.device == torch.device("cuda:1") for t in found) and torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_host_never_waits(settings):
    net = Net(**settings)
    net()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_multiprocessor_can_be_taken():
    """As many programs as the GPU has multiprocessors run over many steps. All have to run at once, or none ends."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    net = Net(n=16 * min(count, 128), batch=8, steps=300, step=Step("relu", 0.5, False))
    for _ in range(20):
        net()
    torch.cuda.synchronize()
