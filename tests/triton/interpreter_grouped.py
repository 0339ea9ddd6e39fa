"""The kernels of several weights in Triton's interpreter: they give what single calls give, in as few launches as they
should. test_interpreter_grouped.py runs this file in a process with TRITON_INTERPRET=1."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import runtime
from moduli_kernels.penalty import grouped
from moduli_kernels.triton.penalty import dense, finish, grouped as grouped_kernels, scale, tiles
from tests.penalty.test_grouped import check, kernels, layer, leaf, three  # noqa: F401 - kernels is a fixture
from tests.support.penalty_cases import INHIBITORS, draw_points, draw_weight

assert runtime.triton_interpreted, "run with TRITON_INTERPRET=1"
# NumPy warns about log2(0), which is right here
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows x 1 vector, so that small weights have many tiles, strips and groups."""
    tile = tiles.Tile(1, 1, 6, True)
    monkeypatch.setattr(tiles, "OVERRIDES", dict.fromkeys(tiles.TABLE[9], tile))
    monkeypatch.setattr(tiles, "FEWEST_ROWS", 4)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels in the order in which they are launched."""
    made: list[str] = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            made.append(self.name)
            return self.kernel[grid]

    for module in (dense, finish, scale, grouped_kernels):
        for name in ("penalty_kernel", "finish_kernel", "scale_kernel", "penalties_kernel", "finish_penalties_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    return made


def test_three_trained_layers_are_three_launches(launches):
    """Forward and backward together. Nothing else touches the device, except what autograd begins with."""
    leaves = [(leaf(draw_weight(n, n)), leaf(draw_points("torus", n))) for n in (32, 16, 20)]
    total, _ = grouped.penalties([layer(*pair) for pair in leaves])
    assert launches == ["penalties_kernel", "finish_penalties_kernel"]
    operations = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        total.backward()
    assert launches[2:] == ["scale_kernel"]
    launched = [name for name in operations if not name.startswith(("aten.detach", "aten.expand", "aten.view"))]
    assert launched == ["aten.ones_like.default", "moduli_kernels.scale_penalties_grads_.default"]


def test_repeated_backward_is_two_launches(launches):
    leaves = [(leaf(draw_weight(n, n)), leaf(draw_points("torus", n))) for n in (32, 16, 20)]
    total, _ = grouped.penalties([layer(*pair) for pair in leaves])
    total.backward(retain_graph=True)
    launches.clear()
    total.backward()
    assert launches == ["penalties_kernel", "finish_penalties_kernel"]


def test_kinds_of_layers_are_launches_of_their_own(launches, monkeypatch):
    """Two squares share a launch; a convolution, a weight without entries and a large one get their own."""
    monkeypatch.setattr(grouped_kernels, "LARGEST", 1000)
    points = {n: draw_points("torus", n) for n in (0, 9, 20, 40)}
    tensors = [(draw_weight(20, 20), points[20]), (draw_weight(9, 9), points[9]), (draw_weight(9, 20, 2), points[9],
               points[20]), (torch.empty(0, 0), points[0]), (draw_weight(40, 40), points[40])]
    grouped.penalties([layer(*pair) for pair in tensors])
    assert launches.count("penalties_kernel") == 1 and launches.count("penalty_kernel") == 2
    check([(pair, {}) for pair in tensors])


@pytest.mark.parametrize(("manifold", "dtype"), [("torus", torch.float32), ("mixed", torch.bfloat16)], ids=str)
def test_many_programs(small_tiles, manifold, dtype):
    """Strips and groups differ from layer to layer."""
    shapes = ((13, 40), (5, 20), (1, 1))
    check([((leaf(draw_weight(*shape, dtype=dtype)), leaf(draw_points(manifold, shape[0], 1)),
             leaf(draw_points(manifold, shape[1], 2))), {"strength": 1.0 + i}) for i, shape in enumerate(shapes)],
          [1.0, -2.0, 3.0], manifold=manifold, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_doubles_and_halves(dtype):
    """Doubles are sent as three numbers each; halves make their gradients after the factor is known."""
    check(list(three(dtype=dtype)), [1.0, -2.0, 0.5])


@pytest.mark.parametrize("name", ["constant", "tabulated"])
def test_inhibitors(name):
    check(list(three()), inhibitor=INHIBITORS[name], power=1.5, tolerance=1e-5)


def test_frozen_points():
    check(list(three(trained=False)))


def test_like_one_weight_to_the_bit():
    """Layers of one shape are cut as each would be alone."""
    tensors = [(leaf(draw_weight(64, 64, seed=s)), leaf(draw_points("torus", 64, s))) for s in range(2)]
    leaves = [t for pair in tensors for t in pair]
    _, values = grouped.penalties([layer(*pair) for pair in tensors])
    singles = [mk.moduli_penalty(*pair, manifold="torus") for pair in tensors]
    assert torch.equal(values, torch.stack(singles))
    got, want = torch.autograd.grad(values.sum(), leaves), torch.autograd.grad(sum(singles), leaves)
    assert all(map(torch.equal, got, want))
