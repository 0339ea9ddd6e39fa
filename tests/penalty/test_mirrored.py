"""A square matrix over one set of points takes each pair's coefficient once, for W[i, j] and W[j, i]
(csrc/cpu/penalty/mirrored_task.h). Held against the same call with the points given twice, which takes it twice."""
from __future__ import annotations

import pytest
import torch

import moduli_kernels as mk
from tests.support.penalty_cases import (
    INHIBITORS,
    MANIFOLDS,
    POWERS,
    Result,
    assert_close,
    draw_points,
    draw_weight,
    needs_cpp,
    on_a_grid,
    penalty_and_gradients,
)

pytestmark = needs_cpp
CLOSE = {torch.float64: (1e-14, 1e-13), torch.float32: (2e-7, 5e-6), torch.bfloat16: (2e-7, 5e-3)}


@pytest.fixture(autouse=True)
def cpp():
    with mk.backend("cpp"):
        yield


def check(weight, points, **settings):
    shared = penalty_and_gradients(weight, points, **settings)
    twice = penalty_and_gradients(weight, points, points.clone(), **settings)
    want = Result(twice.value, twice.weight, twice.rows + twice.cols, None)
    assert_close(shared, want, *CLOSE[weight.dtype])
    frozen = weight.detach().requires_grad_()
    value = mk.moduli_penalty(frozen, points, **settings)
    value.backward()
    assert_close(Result(value.detach(), frozen.grad, None, None), want._replace(rows=None), *CLOSE[weight.dtype])
    with torch.no_grad():
        assert_close(Result(mk.moduli_penalty(weight, points, **settings), None, None, None),
                     Result(want.value, None, None, None), *CLOSE[weight.dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 48, 127, 128, 256, 257, 511, 530, 650])
def test_sizes(n, dtype):
    """Around whole squares of 16, tiles of 256 and 512 columns, and one or more bands of rows."""
    points = on_a_grid(draw_points("torus", n)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(draw_weight(n, n, dtype=dtype), points, manifold="torus")


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("inhibitor", [name for name in INHIBITORS if name != "callable"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_manifolds(manifold, inhibitor, power):
    m = MANIFOLDS[manifold]
    check(draw_weight(45, 45, dtype=torch.float64), draw_points(m, 45, dtype=torch.float64), manifold=m,
          inhibitor=INHIBITORS[inhibitor], power=power)


@pytest.mark.parametrize("manifold", ["torus", "sphere", "klein"])
def test_gradients_past_the_caches(manifold):
    """16 MB and more of dW go around the caches, in whole aligned lines."""
    check(draw_weight(2048, 2048), on_a_grid(draw_points(manifold, 2048)), manifold=manifold)


@pytest.mark.parametrize("n, stride", [(130, 130 + 7), (256, 512), (33, 4096)])
def test_rows_apart(n, stride):
    weight = draw_weight(n, stride)[:, :n]
    check(weight, on_a_grid(draw_points("torus", n)), manifold="torus")


@pytest.mark.parametrize("manifold", ["torus", "klein"])
def test_grid_of_ties(manifold):
    """Many pairs exactly half a period apart: each pulls as when it is met from the other side."""
    m = MANIFOLDS[manifold]
    points = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) * 1.25
    assert (m.distance(points, points) == m.distance(points, points).max()).sum() >= 16
    check(draw_weight(64, 64, dtype=torch.float64), points.double(), manifold=m)


def test_nothing_but_the_entries_is_written():
    """dW lies between guards; rows of 33 entries end in the middle of a square."""
    weight, points = draw_weight(33, 33), draw_points("torus", 33)
    before = torch.randn(33, 64)
    view = before.clone()
    view[:, :33] = weight
    gradient = penalty_and_gradients(view[:, :33], points, manifold="torus").weight
    assert torch.equal(view[:, 33:], before[:, 33:]) and torch.equal(view[:, :33], weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("where", [(0, 0), (3, 40), (40, 3), (44, 44), (17, 16)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_reaches_the_value(where, bad):
    weight = draw_weight(45, 45)
    weight[where] = bad
    got = penalty_and_gradients(weight, draw_points("torus", 45), manifold="torus")
    assert not got.value.isfinite()
    other = torch.ones_like(weight, dtype=torch.bool)
    other[where] = False
    assert got.weight[other].isfinite().all()
