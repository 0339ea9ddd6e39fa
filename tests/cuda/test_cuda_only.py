"""What only a GPU can show: CUDA graphs, streams, several devices, synchronization, the caching allocator, races.

    MODULI_KERNELS_TEST_DEVICE=cuda pytest tests/cuda/test_cuda_only.py
"""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moduli_kernels as mk
from moduli_kernels import backends
from tests.support.penalty_cases import (
    DEVICE,
    MANIFOLDS,
    draw_points,
    draw_weight,
    expected,
    generator,
    on_device,
    relative_error,
)

pytestmark = [on_device, pytest.mark.cuda, pytest.mark.skipif(
    DEVICE != "cuda", reason="needs a CUDA GPU, and MODULI_KERNELS_TEST_DEVICE=cuda")]

# what a training step may ask for; each is compiled first and then checked in the same way
SETTINGS: dict[str, dict] = {
    "trained": {},
    "frozen": {"trained": False},
    "klein": {"manifold": "klein"},
    "mixed, power 2.7": {"manifold": "mixed", "power": 2.7},
    "blocks": {"blocks": 4},
    "masked": {"masked": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


class Step:
    """A penalty and its backward, which returns value and gradients."""

    def __init__(self, n: int = 130, dtype: torch.dtype = torch.float32, trained: bool = True, masked: bool = False,
                 manifold: str = "torus", blocks: int = 1, grad: float = 1.0, **settings):
        points = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = draw_weight(blocks * n, n, dtype=dtype).requires_grad_()
        self.rows = draw_points(manifold, n, dtype=points).requires_grad_(trained)
        mask = torch.rand(self.weight.shape, generator=generator()) < 0.3 if masked else None
        self.settings = {"manifold": manifold, "blocks": blocks, "mask": mask, **settings}
        self.grad = torch.tensor(grad, dtype=points)

    def __call__(self) -> tuple[Tensor, ...]:
        self.weight.grad = self.rows.grad = None
        value = mk.moduli_penalty(self.weight, self.rows, **self.settings)
        value.backward(self.grad)
        return value.detach(), *(leaf.grad for leaf in (self.weight, self.rows) if leaf.requires_grad)


def capture(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Captures a call; returns its graph and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def test_triton_serves_the_gpu():
    assert backends.active("cuda") == "triton"


# --- CUDA graphs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grad", [1.0, -2.5])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_graph_of_forward_and_backward(settings, grad):
    """Replayed on other weights and points, it gives what eager mode gives, bit by bit."""
    step = Step(grad=grad, **settings)
    graph, results = capture(step)
    for seed in (1, 2):
        with torch.no_grad():
            step.weight.copy_(draw_weight(*step.weight.shape, seed=seed))
            step.rows.copy_(draw_points(settings.get("manifold", "torus"), len(step.rows), seed))
        graph.replay()
        replayed = [t.clone() for t in results]
        assert same(replayed, step())


def test_graph_of_three_layers():
    net = nn.RNN(16, 128, num_layers=3)
    reg = mk.regularize(net, trainable=True, strength=0.1, generator=generator())
    leaves = [p for name, p in net.named_parameters() if name.startswith("weight_hh")] + list(reg.parameters())

    def step() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        value = reg()
        value.backward()
        return value.detach(), *(leaf.grad for leaf in leaves)

    graph, results = capture(step)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.75)
    graph.replay()
    replayed = [t.clone() for t in results]
    assert same(replayed, step())


def test_graph_of_the_gradient_in_place():
    step = Step(masked=True)

    def accumulate() -> tuple[Tensor, ...]:
        return (mk.accumulate_penalty_grad_(step.weight, step.rows, **step.settings),)

    want = [t.clone() for t in step()]
    graph, (value,) = capture(accumulate)
    for leaf in (step.weight, step.rows):
        leaf.grad.zero_()
    graph.replay()
    assert torch.equal(value, want[0])
    assert relative_error(step.weight.grad, want[1]) <= 1e-6 and relative_error(step.rows.grad, want[2]) <= 1e-6


# --- streams, devices, synchronization --------------------------------------------------------------------

def test_runs_on_the_current_stream():
    """The stream is kept busy before the weight is written: work on another stream would read the old weight."""
    step = Step()
    fresh = draw_weight(*step.weight.shape, seed=7)
    want = expected(fresh, step.rows, manifold="torus")
    step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of ms
        with torch.no_grad():
            step.weight.copy_(fresh, non_blocking=True)
        value, dweight, drows = step()
    stream.synchronize()
    assert relative_error(value, want.value) <= 1e-6
    assert relative_error(dweight, want.weight) <= 1e-5 and relative_error(drows, want.rows) <= 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_second_device_as_the_first(settings):
    first = Step(**settings)
    want = [t.cpu() for t in first()]
    second = Step(**settings)
    second.weight, second.rows, second.grad = (
        t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in (first.weight, first.rows, first.grad))
    if first.settings["mask"] is not None:
        second.settings["mask"] = first.settings["mask"].to("cuda:1")
    assert torch.cuda.current_device() == 0
    found = second()
    assert all(t.device == torch.device("cuda:1") for t in found) and torch.cuda.current_device() == 0
    assert same(tuple(t.cpu() for t in found), tuple(want))


@pytest.mark.parametrize("grad", [1.0, 3.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_host_never_waits(settings, grad):
    step = Step(grad=grad, **settings)
    step()  # compiles the kernels, and copies tables to the device

    def again() -> None:
        value = mk.moduli_penalty(step.weight, step.rows, **step.settings)
        value.backward(step.grad, retain_graph=True)
        value.backward(step.grad)  # makes the gradients again
        with torch.no_grad():
            mk.moduli_penalty(step.weight, step.rows, **step.settings)

    again()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- with torch's machinery -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_with_a_loss_scale(dtype):
    step = Step()
    want = expected(step.weight, step.rows, manifold="torus", grad=2.0**12)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    with torch.autocast("cuda", dtype=dtype):
        value = mk.moduli_penalty(step.weight, step.rows, **step.settings)
    scaler.scale(value).backward()
    assert value.dtype == torch.float32 and relative_error(value, want.value) <= 1e-6
    assert relative_error(step.weight.grad, want.weight) <= 1e-5
    assert relative_error(step.rows.grad, want.rows) <= 1e-5


# torch warns on the way
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_in_one_graph(mode):
    """It is one graph in both modes; in the second inductor captures CUDA graphs of it."""
    step = Step()
    compiled = torch.compile(lambda w, e: mk.moduli_penalty(w * 2, e, manifold="torus"), fullgraph=True, mode=mode)
    want = expected(2 * step.weight, step.rows, manifold="torus")
    for _ in range(4):  # warm-up, capture, replay
        step.weight.grad = step.rows.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(step.weight, step.rows)
        value.backward()
        assert relative_error(value, want.value) <= 1e-6
        assert relative_error(step.weight.grad, 2 * want.weight) <= 1e-5
        assert relative_error(step.rows.grad, want.rows) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_in_a_graph(reentrant):
    """The forward runs again in backward. No random state is saved, since that would wait for the device."""
    step = Step()

    def call() -> tuple[Tensor, ...]:
        step.weight.grad = step.rows.grad = None
        value = checkpoint(lambda w, e: mk.moduli_penalty(w, e, manifold="torus"), step.weight, step.rows,
                           use_reentrant=reentrant, preserve_rng_state=False)
        value.backward()
        return value.detach(), step.weight.grad, step.rows.grad

    graph, results = capture(call)
    graph.replay()
    replayed = [t.clone() for t in results]
    assert same(replayed, step())


# --- races, memory, size ----------------------------------------------------------------------------------

def test_ten_thousand_runs_are_alike():
    """Value, dW and dE are equal bit by bit: if something is left to chance, one of many runs shows it."""
    weight, rows = draw_weight(200, 200).requires_grad_(), draw_points("mixed", 200).requires_grad_()

    def run() -> list[Tensor]:
        value = mk.moduli_penalty(weight, rows, manifold="mixed")
        return [value.detach(), *torch.autograd.grad(value, (weight, rows))]

    first = [t.view(torch.int32) for t in run()]
    differ = torch.zeros((), dtype=torch.int64)
    for _ in range(10_000):  # differences are counted on the device, so that nothing waits between two runs
        for t, bits in zip(run(), first):
            differ += (t.view(torch.int32) != bits).sum()
    assert int(differ) == 0


MEMORY = [("torus", False)]
MEMORY += [(manifold, True) for manifold in ("torus", "circle", "sphere", "klein", "torus6", "mixed")]


@pytest.mark.parametrize("manifold,trained", MEMORY)
def test_memory_beyond_the_weight_and_its_gradient(manifold, trained):
    """It stays under 1 % of the weight for each column of a point."""
    step = Step(4096, manifold=manifold, trained=trained)
    step()
    step.weight.grad = step.rows.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results[1:])
    assert beyond <= 0.01 * MANIFOLDS[manifold].ambient_dim * step.weight.nbytes


def test_more_entries_than_32_bits_count():
    """Two halves of the rows, each with fewer than 2^31 entries, give what the whole gives."""
    n = 46_400
    assert n * n > 2**31 > n * n // 2
    needed = 4 * 2 * n * n  # bytes: the weight, its gradient, that of a half, and room to compare
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    weight = torch.randn(n, n, dtype=torch.bfloat16)
    rows, cols = draw_points("torus", n, 1), draw_points("torus", n, 2)

    def run(part: slice) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (weight[part], rows[part], cols)]
        value = mk.moduli_penalty(*leaves, manifold="torus", reduction="sum")
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    value, dweight, drows, dcols = run(slice(None))
    parts = torch.zeros(()), torch.zeros_like(dcols)
    for part in (slice(0, n // 2), slice(n // 2, n)):
        half = run(part)
        assert torch.equal(dweight[part], half[1]) and relative_error(drows[part], half[2]) <= 1e-5
        parts = parts[0] + half[0], parts[1] + half[3]
    assert relative_error(value, parts[0]) <= 1e-6 and relative_error(dcols, parts[1]) <= 1e-4
