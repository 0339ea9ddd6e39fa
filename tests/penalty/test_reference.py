"""reference.py against a double loop in plain Python and against autograd."""
import cmath
import itertools
import math

import numpy as np
import pytest
import torch

import moduli_kernels as mk
from moduli_kernels import reference
from moduli_kernels.geometry.inhibitors import inhibitor as resolve_inhibitor
from tests.support.penalty_cases import INHIBITORS, MANIFOLDS, draw_points, draw_weight, generator

# torch says once a process that its CSR tensors are young
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")


def penalty(manifold="torus", inhibitor="dog", power=1.0, blocks=1, scale=1.0):
    inhibitor = resolve_inhibitor(INHIBITORS[inhibitor])
    return reference.Penalty(MANIFOLDS[manifold], inhibitor, power, blocks, scale)


def run(weight, rows, cols=None, mask=None, what=penalty(), need_weight=True, need_points=True):
    return reference.penalty_with_grads(weight, rows, cols, mask, what, need_weight, need_points)


def points(name, n, seed=0, dtype=torch.float64):
    return draw_points(name, n, seed, dtype)


def draw_mask(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed)) < 0.6


# --- against a double loop -------------------------------------------------------------------------------

def around(d, period):
    """Distance on a circle of that length, through the complex plane."""
    return abs(cmath.phase(cmath.exp(2j * math.pi * d / period))) * period / (2 * math.pi)


def pair_distance(name, x, y):
    if name == "torus":
        return math.hypot(around(x[0] - y[0], 10), around(x[1] - y[1], 10))
    if name == "klein":
        return min(math.hypot(x[0] - y[0] - 10 * i, x[1] - (-1) ** i * y[1] - 10 * j)
                   for i in range(-3, 4) for j in range(-4, 5))
    if name == "sphere":
        return 5 * math.acos(np.dot(x, y) / math.sqrt(np.dot(x, x) * np.dot(y, y)))
    if name == "r3":
        return math.dist(x, y)
    assert name == "mixed"
    return math.hypot(pair_distance("sphere", x[:3], y[:3]), pair_distance("torus", x[3:], y[3:]))


def dog(d):
    peak = math.log(20) / 3.8
    return 100 * (math.exp(-peak / 5) - math.exp(-4 * peak) - math.exp(-d * d / 5) + math.exp(-4 * d * d))


def double_loop(name, weight, rows, cols, mask, power, blocks, scale):
    """Value and dR/dW, entry by entry."""
    weight, mask = np.asarray(weight, float), np.asarray(mask)
    value, gradient = 0.0, np.zeros_like(weight)
    for i, j in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        f = dog(pair_distance(name, rows[i % (len(weight) // blocks)], cols[j]))
        kernel = np.where(mask[i, j], weight[i, j], 0)
        size = math.sqrt((kernel**2).sum())
        value += scale * f * size**power
        if size:
            gradient[i, j] = np.where(mask[i, j], scale * f * power * size ** (power - 1) * kernel / size, 0)
    return value, gradient


def by_differences(function, points, step=1e-5):
    gradient = np.zeros_like(points)
    for place in np.ndindex(*points.shape):
        shifted = [points.copy(), points.copy()]
        shifted[0][place] += step
        shifted[1][place] -= step
        gradient[place] = (function(shifted[0]) - function(shifted[1])) / (2 * step)
    return gradient


def compare(name, weight, mask, power, blocks, got_weight, mask_argument, shared):
    R, C = weight.shape[0] // blocks, weight.shape[1]
    rows = points(name, R)
    cols = rows if shared else points(name, C, seed=1)
    what = penalty(name, power=power, blocks=blocks, scale=0.3)
    value, grads = run(got_weight, rows, None if shared else cols, mask_argument, what)

    def loop(x, y):
        return double_loop(name, weight, x, y, mask, power, blocks, 0.3)

    x, y = rows.numpy(), cols.numpy()
    expected, expected_weight = loop(x, y)
    assert float(value) == pytest.approx(expected, rel=1e-11)
    dense = grads.weight.to_dense() if grads.weight.layout == torch.sparse_csr else grads.weight
    np.testing.assert_allclose(dense.numpy(), expected_weight, rtol=1e-10, atol=1e-12)
    tolerance = {"rtol": 0, "atol": 1e-7 * abs(expected)}
    if shared:
        assert grads.cols is None
        np.testing.assert_allclose(grads.rows, by_differences(lambda p: loop(p, p)[0], x), **tolerance)
    else:
        np.testing.assert_allclose(grads.rows, by_differences(lambda p: loop(p, y)[0], x), **tolerance)
        np.testing.assert_allclose(grads.cols, by_differences(lambda p: loop(x, p)[0], y), **tolerance)


@pytest.mark.parametrize("name", ["torus", "klein", "sphere", "r3", "mixed"])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("blocks, shape", [(1, (4, 3)), (3, (9, 2)), (1, (3, 2, 3)), (2, (4, 2, 2, 2))])
@pytest.mark.parametrize("masked", [False, True])
def test_against_a_double_loop(name, power, blocks, shape, masked):
    weight = draw_weight(*shape, dtype=torch.float64)
    weight.flatten()[::5] = 0
    mask = draw_mask(*shape) if masked else torch.ones(shape, dtype=torch.bool)
    compare(name, weight, mask, power, blocks, weight, mask if masked else None, shared=False)


@pytest.mark.parametrize("name", ["torus", "klein", "r3"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_shared_points_against_a_double_loop(name, blocks):
    weight = draw_weight(4 * blocks, 4, dtype=torch.float64)
    compare(name, weight, torch.ones(4 * blocks, 4, dtype=torch.bool), 1.0, blocks, weight, None, shared=True)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_compressed_rows_against_a_double_loop(blocks, power, index):
    mask = draw_mask(4 * blocks, 3)
    mask[1] = False  # a row of nothing
    weight = torch.where(mask, draw_weight(4 * blocks, 3, dtype=torch.float64), 0)
    csr = weight.to_sparse_csr()
    crow, col = csr.crow_indices().to(index), csr.col_indices().to(index)
    csr = torch.sparse_csr_tensor(crow, col, csr.values(), csr.shape, check_invariants=True)
    compare("torus", weight, mask, power, blocks, csr, None, shared=False)
    gradient = run(csr, points("torus", 4), points("torus", 3), what=penalty(blocks=blocks))[1].weight
    assert torch.equal(gradient.crow_indices(), crow) and torch.equal(gradient.col_indices(), col)


def test_a_stored_zero_of_compressed_rows_has_gradient_0():
    values = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    csr = torch.sparse_csr_tensor([0, 2, 3], [0, 1, 1], values, (2, 2), check_invariants=True)
    gradient = run(csr, points("torus", 2))[1].weight.values()
    assert gradient[0] == 0 and gradient[1] > 0 > gradient[2]


@pytest.mark.parametrize("reduction, strength", [("mean", 1.0), ("sum", 1.0), ("mean", 0.25), ("sum", -2.0)])
def test_reduction_and_strength(reduction, strength):
    weight, mask = draw_weight(6, 4, 2, dtype=torch.float64), draw_mask(6, 4, 2)
    rows, cols = points("torus", 3), points("torus", 4, seed=1)
    with mk.backend("reference"):
        got = mk.moduli_penalty(weight, rows, cols, manifold="torus", blocks=2, mask=mask,
                                reduction=reduction, strength=strength)
    scale = strength / (24 if reduction == "mean" else 1)  # kernel slices, masked or not
    expected = double_loop("torus", weight, rows.numpy(), cols.numpy(), mask, 1.0, 2, scale)[0]
    assert float(got) == pytest.approx(expected, rel=1e-12)


# --- against autograd ------------------------------------------------------------------------------------

def assert_autograd_agrees(weight, rows, cols, mask, what):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (weight, rows, cols)]
    value = reference.penalty_formula(*leaves, mask, what)
    wanted = [leaf for leaf in leaves if leaf is not None]
    expected = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))
    got, grads = run(weight, rows, cols, mask, what)
    torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=0)
    for leaf, g in zip(leaves, grads):
        assert (g is None) == (leaf is None)
        if g is not None:
            torch.testing.assert_close(g, next(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_against_autograd(name, inhibitor, power):
    weight = draw_weight(6, 5, dtype=torch.float64)
    rows, cols = points(name, 3), points(name, 5, seed=1)
    assert_autograd_agrees(weight, rows, cols, draw_mask(6, 5), penalty(name, inhibitor, power, 2, 0.7))


@pytest.mark.parametrize("f", [*INHIBITORS.values(), *(mk.Diffusion(1.0, e) for e in (0.5, 1.0, 1.5, 3.0))])
@pytest.mark.parametrize("shape", [(5, 5), (10, 5), (5, 5, 3)])
def test_shared_points_against_autograd(f, shape):
    """Every point meets itself, at distance 0."""
    what = reference.Penalty(mk.FlatTorus(), resolve_inhibitor(f), 1.0, shape[0] // 5, 0.7)
    assert_autograd_agrees(draw_weight(*shape, dtype=torch.float64), points("torus", 5), None, None, what)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("kernel", [(), (1,), (3,), (2, 2)])
def test_zero_weights_have_gradient_0(power, kernel):
    weight = torch.zeros(3, 4, *kernel)
    rows, cols = draw_points("torus", 3), draw_points("torus", 4, seed=1)
    value, grads = run(weight, rows, cols, what=penalty(power=power))
    assert value == 0 and all((g == 0).all() for g in grads)


# --- shapes, dtypes, needs -------------------------------------------------------------------------------

@pytest.mark.parametrize("R, C", [(0, 0), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kernel", [(), (2,)])
def test_empty_and_single(R, C, blocks, kernel):
    weight = draw_weight(R * blocks, C, *kernel)
    for mask in (None, weight > 0):
        value, grads = run(weight, draw_points("sphere", R), draw_points("sphere", C), mask,
                           penalty("sphere", blocks=blocks))
        assert value.shape == () and (R * C > 0 or value == 0)
        assert [g.shape for g in grads] == [weight.shape, (R, 3), (C, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    weight = draw_weight(6, 5, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert reference.compute_dtype(weight) == compute
    rows, cols = draw_points("klein", 6, dtype=compute), draw_points("klein", 5, seed=1, dtype=compute)
    value, grads = run(weight, rows, cols, what=penalty("klein"))
    exact, exact_grads = run(weight.double(), rows.double(), cols.double(), what=penalty("klein"))
    assert value.dtype == compute
    assert [g.dtype for g in grads] == [dtype, compute, compute]
    assert float(value) == pytest.approx(float(exact), rel=1e-6)
    for g, e in zip(grads, exact_grads):
        error = max(torch.finfo(g.dtype).eps, 1e-15 if compute == torch.float64 else 1e-6)
        assert (g.double() - e).norm() <= error * e.norm()


@pytest.mark.parametrize("arrange", [
    lambda w: w.t().contiguous().t(),
    lambda w: torch.stack([w, w], 2)[:, :, 0],
    lambda w: torch.cat([w, w], 1)[:, :w.shape[1]],
    lambda w: torch.cat([w[:1], w])[1:],
])
def test_strides_do_not_matter(arrange):
    weight = draw_weight(6, 5, dtype=torch.float64)
    rows, cols = points("torus", 3), points("torus", 5, seed=1)
    value, grads = run(weight, rows, cols, what=penalty(blocks=2))
    other, other_grads = run(arrange(weight), rows, cols, what=penalty(blocks=2))
    assert other == value and all(torch.equal(a, b) for a, b in zip(grads, other_grads))
    assert other_grads.weight.is_contiguous()


@pytest.mark.parametrize("need_weight, need_points", [*itertools.product([False, True], repeat=2)])
def test_only_what_is_needed_is_made(need_weight, need_points):
    weight, rows = draw_weight(5, 5), draw_points("torus", 5)
    full, grads = run(weight, rows)
    value, some = run(weight, rows, need_weight=need_weight, need_points=need_points)
    assert value == full and some.cols is None
    assert torch.equal(some.weight, grads.weight) if need_weight else some.weight is None
    assert torch.equal(some.rows, grads.rows) if need_points else some.rows is None


def test_the_scale_may_be_a_tensor():
    weight, rows = draw_weight(5, 5), draw_points("torus", 5)
    value, grads = run(weight, rows, what=penalty(scale=0.5))
    other, other_grads = run(weight, rows, what=penalty(scale=torch.tensor(0.5)))
    assert other == value and other.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(grads[:2], other_grads[:2]))
