"""Where derivatives jump or diverge, and what is not finite: both backends finite and alike, or NaN and
infinite alike."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    KERNELS,
    MANIFOLDS,
    TOLERANCE,
    VARIANTS,
    assert_close,
    draw_points,
    draw_weight,
    expected,
    generator,
    needs_kernels,
    on_device,
    penalty_and_gradients,
    tiled_warning,
)

pytestmark = [tiled_warning, on_device]

EVERY_INHIBITOR = INHIBITORS | VARIANTS
DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(params=BACKENDS)
def either(request):
    with mk.backend(request.param):
        yield request.param


def check(weight: Tensor, rows: Tensor, cols: Tensor | None = None, **settings) -> None:
    """Finite, and the float64 reference's, signs and zeros of the gradients included."""
    got, want = penalty_and_gradients(weight, rows, cols, **settings), expected(weight, rows, cols,
                                                                                **settings)
    assert_close(got, want, *TOLERANCE[got.value.dtype])
    for g, w in zip(got[1:], want[1:]):
        if g is not None:
            assert g.isfinite().all()
            # what the reference has as exactly 0 (a convention at a singular point) is 0 up to rounding
            scale = float(w.abs().max())
            assert (g.double() - w).abs().max() <= 1e-4 * scale


# --- identical points -------------------------------------------------------------------------------------

@DTYPE
@pytest.mark.parametrize("inhibitor", EVERY_INHIBITOR)
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_identical_points(either, manifold, inhibitor, dtype):
    """Some rows at the very place of a column: f(0), and no force between them."""
    m = MANIFOLDS[manifold]
    cols = draw_points(m, 19, 1, dtype)
    rows = torch.cat([cols[:5], draw_points(m, 6, 2, dtype)])
    check(draw_weight(11, 19, dtype=dtype), rows, cols, manifold=m, inhibitor=EVERY_INHIBITOR[inhibitor])


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_all_neurons_at_one_point(either, manifold):
    """A collapsed embedding: value f(0) |w|, gradients of the points exactly 0."""
    m = MANIFOLDS[manifold]
    weight, rows = draw_weight(9, 9), draw_points(m, 1).repeat(9, 1)
    got = penalty_and_gradients(weight, rows, manifold=m)
    f = mk.DifferenceOfGaussians()(torch.zeros(()))
    assert float(got.value) == pytest.approx(float(f * weight.abs().mean()), rel=1e-6)
    assert torch.equal(got.rows, torch.zeros_like(rows))
    assert torch.allclose(got.weight, f * weight.sign() / 81, rtol=1e-6)


@pytest.mark.parametrize("manifold", ["sphere", "s3", "product"])
def test_nearly_identical_points(either, manifold):
    """Distances down to 1e-7 of the radius: the slope at 0 is finite and reached without loss."""
    m = MANIFOLDS[manifold]
    base = draw_points(m, 8, dtype=torch.float64)
    cols = base + 1e-6 * torch.randn(base.shape, dtype=torch.float64,
                                     generator=generator())
    check(draw_weight(8, 8, dtype=torch.float64), base, cols, manifold=m)
    got = penalty_and_gradients(draw_weight(8, 8), base.float(), cols.float(), manifold=m)
    assert all(t.isfinite().all() for t in got)


# --- cut loci ---------------------------------------------------------------------------------------------

@DTYPE
@pytest.mark.parametrize("inhibitor", ["dog", "diffusion", "tabulated"])
@pytest.mark.parametrize("scale", [1.0, 3.0, -2.5])
@pytest.mark.parametrize("manifold", ["sphere", "s3"])
def test_antipodes(either, manifold, scale, inhibitor, dtype):
    """x and -x exactly, of equal or other length: d = pi r, and no direction is preferred."""
    rows = torch.eye(MANIFOLDS[manifold].ambient_dim, dtype=dtype) * 3
    cols = torch.cat([-scale * rows, draw_points(manifold, 3, 1, dtype)])
    weight = draw_weight(len(rows), len(cols), dtype=dtype)
    check(weight, rows, cols, manifold=manifold, inhibitor=INHIBITORS[inhibitor])
    distances = mk.manifold(manifold).distance(rows, cols)
    assert float((distances[0, 0] - (0 if scale < 0 else 5 * math.pi)).abs()) <= 1e-6


def at_periods(periods: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs exactly half a period apart in each coordinate, both signs, also 1.5 and 2.5 periods away. Every
    number is a multiple of 1/4 and so exact."""
    multiples = torch.tensor([-2.5, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.5], dtype=dtype)
    base = torch.tensor([0.0, 1.25, 5.0, 7.5], dtype=dtype)
    rows = base[:, None].expand(4, len(periods))
    offsets = multiples[:, None] * torch.tensor(periods, dtype=dtype)
    cols = (rows[:, None] + offsets).reshape(-1, len(periods))
    return rows.contiguous(), cols


@DTYPE
@pytest.mark.parametrize("inhibitor", ["dog", "diffusion", "sinusoid", "tabulated"])
@pytest.mark.parametrize("periods", [(10.0,), (10.0, 10.0), (10.0, 6.0, 2.5)], ids=str)
def test_cut_locus_of_the_torus(either, periods, inhibitor, dtype):
    rows, cols = at_periods(periods, dtype)
    check(draw_weight(len(rows), len(cols), dtype=dtype), rows, cols, manifold=mk.FlatTorus(periods),
          inhibitor=INHIBITORS[inhibitor])


@pytest.mark.parametrize("row, col, delta", [(0, 5, -5), (5, 0, 5), (0, -5, -5), (15, 0, 5), (2.5, 17.5, -5),
                                             (7.5, -7.5, 5)])
def test_side_of_the_cut_locus(either, row, col, delta):
    """At exactly half a period the difference of the reduced coordinates stays as it is, so two points pull at
    each other with opposite gradients."""
    rows, cols = torch.full((1, 1), float(row)), torch.full((1, 1), float(col))
    got = penalty_and_gradients(torch.ones(1, 1), rows, cols, manifold=mk.FlatTorus((10.0,)),
                                inhibitor=mk.Diffusion())
    assert (float(got.value), float(got.rows), float(got.cols)) == (25.0, 2 * delta, -2 * delta)


@DTYPE
@pytest.mark.parametrize("period", [10.0, 7.3, 2 * math.pi * 5])
def test_beside_the_cut_locus(either, period, dtype):
    """A few roundings from half a period the side is the one that the rounded difference is on."""
    ulps = torch.tensor([-64, -16, -4, -2, 2, 4, 16, 64], dtype=dtype) * torch.finfo(dtype).eps * period / 2
    rows, cols = torch.zeros(1, 1, dtype=dtype), torch.cat([period / 2 + ulps, -period / 2 + ulps])[:, None]
    got = penalty_and_gradients(torch.ones(1, 16, dtype=dtype), rows, cols, manifold=mk.FlatTorus((period,)),
                                inhibitor=mk.Diffusion(), reduction="sum")
    want = torch.where(ulps < 0, 1.0, -1.0)  # of d s/d column, column by column
    assert torch.equal(got.cols[:8, 0].sign(), want) and torch.equal(got.cols[8:, 0].sign(), want)


@DTYPE
@pytest.mark.parametrize("inhibitor", ["dog", "diffusion"])
@pytest.mark.parametrize("size", [(10.0, 10.0), (6.0, 2.5)], ids=str)
def test_cut_locus_of_the_klein_bottle(either, size, inhibitor, dtype):
    """Half the width and half the height apart, straight and flipped, so that both candidate images tie."""
    width, height = size
    x = torch.arange(-6, 7, dtype=dtype) * (width / 2)
    y = torch.arange(-4, 5, dtype=dtype) * (height / 4)
    points = torch.cartesian_prod(x, y)
    rows = torch.tensor([[0.0, 0.0], [width / 2, height / 4], [width, 0.75 * height], [1.25, 0.5]],
                        dtype=dtype)
    check(draw_weight(len(rows), len(points), dtype=dtype), rows, points,
          manifold=mk.KleinBottle(width, height),
          inhibitor=INHIBITORS[inhibitor])


@DTYPE
@pytest.mark.parametrize("manifold", ["torus", "klein", "circle", "torus6"])
def test_coordinates_of_any_size(either, manifold, dtype):
    """Points many periods from the fundamental domain, on both sides, as training may leave them: the same
    points."""
    m = MANIFOLDS[manifold]
    rows, cols = ((draw_points(m, n, n) * 64).round().to(dtype) / 64 for n in (13, 17))
    periods = {"klein": (20.0, 10.0)}.get(manifold) or m.column_periods
    jumps = torch.randint(-20, 21, rows.shape, generator=generator())
    shifted = rows + jumps * torch.tensor(periods, dtype=dtype)
    weight = draw_weight(13, 17, dtype=dtype)
    near, far = (penalty_and_gradients(weight, x, cols, manifold=m) for x in (rows, shifted))
    exact = all(float(p).is_integer() for p in periods)
    tolerance = TOLERANCE[dtype][0] if exact else 1e5 * torch.finfo(dtype).eps
    for a, b in zip(near, far):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


# --- zero weights -----------------------------------------------------------------------------------------

@DTYPE
@pytest.mark.parametrize("kernel", [(), (3,)], ids=str)
@pytest.mark.parametrize("power", [1.0, 1.001, 1.5, 2.0, 2.7])
def test_zero_weights(either, power, kernel, dtype):
    """0 and -0 cost nothing and have gradient 0: l = 1 takes 0 among the subgradients."""
    weight = draw_weight(8, 21, *kernel, dtype=dtype)
    weight[::2] = 0.0
    weight[1, :] = -0.0
    rows, cols = draw_points("torus", 8, 1, dtype), draw_points("torus", 21, 2, dtype)
    got = penalty_and_gradients(weight, rows, cols, manifold="torus", power=power)
    assert not got.weight[::2].any() and not got.weight[1].any() and not got.rows[::2].any()
    check(weight, rows, cols, manifold="torus", power=power)
    nothing = penalty_and_gradients(torch.zeros_like(weight), rows, cols, manifold="torus", power=power)
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 2.7])
def test_weights_of_any_size(either, power):
    """From subnormal to 1e6; powers underflow to 0 and do not become NaN."""
    weight = torch.logspace(-44, 6, 21 * 5, dtype=torch.float64).reshape(5, 21).float()
    weight[:, ::2] *= -1
    rows, cols = draw_points("torus", 5, 1), draw_points("torus", 21, 2)
    check(weight, rows, cols, manifold="torus", power=power)


# --- what is not finite -----------------------------------------------------------------------------------

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@BAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inhibitor", INHIBITORS)
@pytest.mark.parametrize("place", [(0, 0), (6, 20)])
def test_non_finite_weights_reach_the_value(either, place, inhibitor, dtype, bad):
    weight = draw_weight(7, 21, dtype=dtype)
    weight[place] = bad
    rows, cols = draw_points("torus", 7, 1), draw_points("torus", 21, 2)
    for power in (1.0, 2.0, 2.7):
        value = mk.moduli_penalty(weight, rows, cols, manifold="torus", inhibitor=INHIBITORS[inhibitor],
                                  power=power)
        assert value.isnan() if math.isnan(bad) else float(value) == math.inf


@BAD
@pytest.mark.parametrize("side", ["rows", "cols", "both"])
@pytest.mark.parametrize("inhibitor", ["dog", "constant", "tabulated"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_non_finite_points_reach_the_value(either, manifold, inhibitor, side, bad):
    """As NaN, whichever coordinate it is, and wherever f is flat; so do the gradients of the point."""
    m = MANIFOLDS[manifold]
    weight = draw_weight(7, 7)
    for column in range(m.ambient_dim):
        rows, cols = draw_points(m, 7, 1), None if side == "both" else draw_points(m, 7, 2)
        (cols if side == "cols" else rows)[3, column] = bad
        got = penalty_and_gradients(weight, rows, cols, manifold=m, inhibitor=INHIBITORS[inhibitor])
        assert got.value.isnan()
        assert (got.cols if side == "cols" else got.rows)[3].isnan().any()


@pytest.mark.parametrize("inhibitor", ["dog", "constant", "tabulated"])
@pytest.mark.parametrize("manifold", ["sphere", "s3", "mixed"])
def test_zero_vector_on_a_sphere_reaches_the_value(either, manifold, inhibitor):
    """ManifoldEmbedding refuses it; where training makes one, the penalty says so."""
    rows = draw_points(manifold, 7)
    rows[3] = 0
    assert mk.moduli_penalty(draw_weight(7, 7), rows, manifold=manifold,
                             inhibitor=INHIBITORS[inhibitor]).isnan()


@needs_kernels
@BAD
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_non_finite_points_are_alike(manifold, bad):
    """The same gradients are NaN in the kernels and in the reference, the others equal."""
    m = MANIFOLDS[manifold]
    weight, rows, cols = draw_weight(7, 9), draw_points(m, 7, 1), draw_points(m, 9, 2)
    rows[2, -1] = bad
    with mk.backend(KERNELS):
        got = penalty_and_gradients(weight, rows, cols, manifold=m)
    want = expected(weight, rows, cols, manifold=m)
    for g, w in zip(got, want):
        assert torch.equal(g.isnan(), w.isnan())
        assert torch.allclose(g.double(), w, rtol=1e-4, atol=1e-5 * float(w.nan_to_num().abs().max()),
                              equal_nan=True)


def test_masked_entries_cost_nothing_even_where_not_finite(either):
    """Weights: at all. Points, all of whose entries are masked: in value and dW."""
    weight, rows, cols = draw_weight(7, 21, 2), draw_points("torus", 7, 1), draw_points("torus", 21, 2)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    mask[2], mask[:, 5], mask[0, 0, 1] = False, False, False
    want = expected(weight, rows, cols, manifold="torus", mask=mask)
    weight[2], weight[:, 5], weight[0, 0, 1] = math.nan, -math.inf, math.inf
    assert_close(penalty_and_gradients(weight, rows, cols, manifold="torus", mask=mask), want,
                 *TOLERANCE[torch.float32])
    rows[2], cols[5, 1] = math.nan, math.inf
    got = penalty_and_gradients(weight, rows, cols, manifold="torus", mask=mask)
    assert_close(got._replace(rows=None, cols=None), want._replace(rows=None, cols=None),
                 *TOLERANCE[torch.float32])
