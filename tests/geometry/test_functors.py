"""The compiled maths of csrc/ agrees, function by function, with SciPy and NumPy in float64."""
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import moduli_kernels as mk

F = pytest.importorskip(
    "moduli_kernels._functors",
    reason="moduli_kernels._functors is not built (make build does, where pybind11 and a compiler are)",
)

FLOATS = (np.float32, np.float64)
EPS = {np.float32: 2.0**-24, np.float64: 2.0**-53}  # half a unit in the last place, relative
SUBNORMAL, TINY, LARGE = np.float32([1e-42, 1.2e-38, 3e38])


def uniform(low, high, n=200_000, seed=0):
    """float32 values, so that float32 and float64 functions see the same arguments."""
    return np.random.default_rng(seed).uniform(low, high, n).astype(np.float32)


def spread(low, high, n=200_000, seed=0):
    """float32 values of all orders of magnitude from 10^low to 10^high."""
    return (10.0 ** np.random.default_rng(seed).uniform(low, high, n)).astype(np.float32)


def double(x):
    return np.asarray(x, np.float64)


def close(got, want, dtype, *, float_error, double_error=1e-13):
    """got has that dtype, and |got - want| <= error * |want|."""
    assert np.asarray(got).dtype == dtype
    error = {np.float32: float_error, np.float64: double_error}[dtype]
    np.testing.assert_allclose(double(got), want, rtol=error, atol=0)


def near(got, want, dtype, *, float_error, double_error=1e-13):
    """got has that dtype, and |got - want| <= error."""
    assert np.asarray(got).dtype == dtype
    error = {np.float32: float_error, np.float64: double_error}[dtype]
    np.testing.assert_allclose(double(got), want, rtol=0, atol=error)


each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])


# 2.3e-9 of the polynomial; rounding of the quotient, of the polynomial's last sum, of pi/2 and of a sum there
ATAN2_ERROR = 2.3e-9 + 4 * 2.0**-24

# --- elementary functions --------------------------------------------------------------------------------

@each_dtype
def test_exp2(dtype):
    y = np.concatenate([uniform(-126, 0), uniform(-1, 0), -spread(-40, 0), np.float32([0, -0.0, -1, -126])])
    # 9.1e-8 of the polynomial, and the rounding of its last two sums
    error = 9.1e-8 + 2 * EPS[np.float32]
    close(F.exp2_of_nonpositive(y.astype(dtype)), np.exp2(double(y)), dtype, float_error=error)


def test_exp2_below_the_normal_numbers_is_at_most_the_smallest_of_them():
    low = F.exp2_of_nonpositive(np.float32([-126.5, -127, -150, -1e4, -1e30, -3e38, -np.inf]))
    assert (low >= 0).all() and (low <= 2.0**-126).all()
    assert np.isnan(F.exp2_of_nonpositive(np.float32([np.nan]))).all()


@each_dtype
@pytest.mark.parametrize("limit", [4.0, 100.0, 5e3])
def test_cos_sinc(dtype, limit):
    special = np.float32([0, -0.0, SUBNORMAL, -TINY, math.pi / 2, math.pi])
    x = np.concatenate([uniform(-limit, limit), special])
    cosine, sinc = F.cos_sinc(x.astype(dtype))
    # 4.9e-9 of the polynomial, rounding of the reduced angle (up to pi/2), of the last sum and of the result
    near(cosine, np.cos(double(x)), dtype, float_error=4.9e-9 + 3 * EPS[np.float32])
    near(sinc, np.sinc(double(x) / np.pi), dtype, float_error=4.9e-9 + 3 * EPS[np.float32])


def test_cos_of_large_angles_errs_by_no_more_than_their_last_place():
    x = spread(3, 4.39)
    cosine, sinc = F.cos_sinc(x)
    assert (np.abs(cosine - np.cos(double(x))) <= 2e-7 + np.spacing(x)).all()
    assert (np.abs(sinc - np.sinc(double(x) / np.pi)) <= 2e-7).all()


@each_dtype
def test_cos_sinc_of_non_finite_angles_is_nan(dtype):
    cosine, sinc = F.cos_sinc(np.array([np.nan, np.inf, -np.inf], dtype))
    assert np.isnan(cosine).all() and np.isnan(sinc).all()


@each_dtype
def test_atan2(dtype):
    special = np.float32([0, 1, 1, 0, 1, SUBNORMAL, 1, LARGE])
    a = np.concatenate([uniform(0, 1), spread(-37, 37), special])
    b = np.concatenate([uniform(0, 1, seed=1), spread(-37, 37, seed=1), special[[1, 0, 2, 7, 5, 4, 7, 6]]])
    got = F.atan2_positive(a.astype(dtype), b.astype(dtype))
    near(got, np.arctan2(double(a), double(b)), dtype, float_error=ATAN2_ERROR)
    assert np.isnan(F.atan2_positive(np.array([np.nan, 1], dtype), np.array([1, np.nan], dtype))).all()


@each_dtype
def test_atan2_of_small_quotients_keeps_its_relative_precision(dtype):
    a, b = spread(-30, -4), uniform(0.5, 2)
    close(F.atan2_positive(a.astype(dtype), b.astype(dtype)), np.arctan2(double(a), double(b)), dtype,
          float_error=4 * EPS[np.float32])


@each_dtype
@pytest.mark.parametrize("e", [0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 2.75, 7.5])
def test_power(dtype, e):
    reach = 37 / max(e, 1)
    a = np.concatenate([spread(-reach, reach), uniform(0.9, 1.1), np.float32([1])])
    # 3e-10 of the polynomials and one rounding
    close(F.power_positive(a.astype(dtype), e), double(a) ** e, dtype, float_error=3e-10 + EPS[np.float32])


@each_dtype
@pytest.mark.parametrize("e", [0.5, 1.5, 3.0])
def test_power_at_the_ends_of_the_numbers(dtype, e):
    assert F.power_positive(np.array([0, np.inf], dtype), e).tolist() == [0, np.inf]
    assert np.isnan(F.power_positive(np.array([np.nan], dtype), e)).all()
    with np.errstate(over="ignore"):
        want = (double([SUBNORMAL, TINY, LARGE]) ** e).astype(dtype)
    got = F.power_positive(np.array([SUBNORMAL, TINY, LARGE], dtype), e)
    # float32: what is subnormal in the result has one unit there
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1.5e-45 if dtype is np.float32 else 0)


# --- distances -------------------------------------------------------------------------------------------

def wrap(d, period):
    return d - period * np.floor(d / period + 0.5)


@each_dtype
@pytest.mark.parametrize("period", [10.0, 0.5, 31.4, 0.0])
def test_flat_axis(dtype, period):
    x, y = uniform(-40, 40), uniform(-40, 40, seed=1)
    got = F.flat_axis_difference(x.astype(dtype), y.astype(dtype), period)
    d = double(x) - double(y)
    assert got.dtype == dtype
    if not period:
        np.testing.assert_array_equal(got, x.astype(dtype) - y.astype(dtype))
        return
    p = float(dtype(period))
    error = 8 * 40 * EPS[dtype]  # x, y and their reductions are rounded at up to 40
    assert (np.abs(wrap(double(got) - d, p)) <= error).all()
    assert (np.abs(got) <= p / 2 + error).all()


@each_dtype
def test_flat_axis_leaves_half_a_period_between_reduced_coordinates(dtype):
    x = np.array([5, 7.5, 0, 2.5, 15, -5, 9.75], dtype)
    y = np.array([0, 2.5, 5, 7.5, 0, 0, 0], dtype)
    assert F.flat_axis_difference(x, y, 10).tolist() == [5, 5, -5, -5, 5, 5, -0.25]
    assert F.flat_axis_difference(y, x, 10).tolist() == [-5, -5, 5, 5, -5, -5, 0.25]


@each_dtype
def test_flat_axis_hands_nan_through(dtype):
    x, y = np.array([[np.nan, np.inf, 1], [1, 1, np.nan]], dtype)
    assert np.isnan(F.flat_axis_difference(x, y, 10)).all()


@each_dtype
@pytest.mark.parametrize("width, height", [(10.0, 10.0), (3.0, 7.5), (7.5, 3.0)])
def test_klein_bottle(dtype, width, height):
    """Against all images; the derivatives against the vector from the nearest one."""
    xa, ya, xb, yb = (uniform(-15, 15, 3000, seed) for seed in range(4))
    images = [((-1) ** i, double(xb) + i * width, (-1) ** i * double(yb) + j * height)
              for i in range(-14, 15) for j in range(-14, 15)]
    vectors = np.stack([np.stack([xa - x, ya - y, np.full_like(x, sign)]) for sign, x, y in images])
    squares = (vectors[:, :2] ** 2).sum(1)
    first, second = np.sort(squares, 0)[:2]
    nearest = np.take_along_axis(vectors, squares.argmin(0)[None, None], 0)[0]

    s, g_xa, g_ya, g_xb, g_yb = F.klein_bottle(*(v.astype(dtype) for v in (xa, ya, xb, yb)), width, height)
    np.testing.assert_array_equal(g_xb, -g_xa)
    rounding = 16 * 15 * EPS[dtype]
    near(s, first, dtype, float_error=2 * 8 * rounding, double_error=2 * 8 * rounding)
    clear = second - first > 1e-3  # elsewhere two geodesics are as short, and either is right
    assert clear.mean() > 0.99
    for got, want in ((g_xa, nearest[0]), (g_ya, nearest[1]), (g_yb, -nearest[1] * nearest[2])):
        near(got[clear], want[clear], dtype, float_error=rounding, double_error=rounding)


@each_dtype
def test_klein_bottle_takes_the_straight_way_at_a_tie(dtype):
    s, *g = F.klein_bottle(*(np.array([v], dtype) for v in (0, 0, 5, 5)), 10, 10)
    assert (s.item(), [v.item() for v in g]) == (50, [-5, -5, 5, 5])  # in xa, ya, xb, yb


def angles():
    """Angles in (0, pi), dense at both ends, with |u - v|^2 and |u + v|^2 of unit vectors at them."""
    small = 10.0 ** np.linspace(-7, 0, 20000)
    theta = np.concatenate([small, math.pi - small, np.linspace(0.9, 2.3, 20000)])
    return theta, 4 * np.sin(theta / 2) ** 2, 4 * np.cos(theta / 2) ** 2


@each_dtype
def test_sphere(dtype):
    theta, minus, plus = angles()
    s, factor = F.sphere(minus.astype(dtype), plus.astype(dtype), 3.0)
    angle_error = {np.float32: 2 * ATAN2_ERROR, np.float64: 1e-15}[dtype]
    assert np.abs(np.sqrt(double(s)) / 3 - theta).max() <= angle_error
    close(s, (3 * theta) ** 2, dtype, float_error=1e-6)
    # theta / sin(theta) of the rounded arguments: it is no better conditioned than they are
    theta = 2 * np.arctan2(np.sqrt(double(minus.astype(dtype))), np.sqrt(double(plus.astype(dtype))))
    close(factor, 9 * theta / np.sin(theta), dtype, float_error=1e-6, double_error=1e-9)


@each_dtype
def test_sphere_at_coincidence_and_antipodes(dtype):
    s, factor = F.sphere(np.array([0, 4], dtype), np.array([4, 0], dtype), 2)
    assert s[0] == 0 and s[1] == pytest.approx(4 * math.pi**2, rel=4 * EPS[dtype])
    assert factor.tolist() == [4, 0]
    assert np.isnan(F.sphere(np.array([np.nan], dtype), np.array([1], dtype), 2)[0]).all()


# --- inhibitors ------------------------------------------------------------------------------------------

S = np.concatenate([spread(-12, 2, 5000), np.linspace(0, 60, 2001)[1:].astype(np.float32)])
ROOT = np.sqrt(double(S))
PEAK = 2 / math.sqrt(3 * 1.3 * math.sqrt(math.pi))


def dog(s, c, sigma1, sigma2):
    return c * (np.exp(-s / sigma2) - np.exp(-s / sigma1))


# function, parameters, f(s), df/ds, scale of f and of df/ds on S: float errors are relative to these
INHIBITORS = [
    (F.difference_of_gaussians, {"c": 100, "sigma1": 0.25, "sigma2": 5, "offset": 81.1},
     lambda s: 81.1 - dog(s, 100, 0.25, 5),
     lambda s: 20 * np.exp(-s / 5) - 400 * np.exp(-4 * s), 81, 380),
    (F.difference_of_gaussians, {"c": 3, "sigma1": 1.5, "sigma2": 2.5, "offset": 3},
     lambda s: 3 - dog(s, 3, 1.5, 2.5), lambda s: 1.2 * np.exp(-s / 2.5) - 2 * np.exp(-s / 1.5), 3, 0.8),
    (F.sinusoid, {"c": 10, "mu": 2}, lambda s: 10 + 10 * np.cos(2 * np.sqrt(s)),
     lambda s: -20 * np.sinc(2 / np.pi * np.sqrt(s)), 20, 20),
    (F.ricker_wavelet, {"sigma": 1.3, "c": 2},
     lambda s: 2 * (PEAK - PEAK * (1 - s / 1.69) * np.exp(-s / 3.38)),
     lambda s: 2 * PEAK * (3 - s / 1.69) * np.exp(-s / 3.38) / 3.38, 2 * PEAK, 3 * 2 * PEAK / 3.38),
]


@each_dtype
@pytest.mark.parametrize("function, parameters, f, slope, height, steepness", INHIBITORS)
def test_bounded_inhibitors(dtype, function, parameters, f, slope, height, steepness):
    got, got_slope = function(S.astype(dtype), **parameters)
    near(got, f(double(S)), dtype, float_error=1e-6 * height, double_error=1e-14 * height)
    near(got_slope, slope(double(S)), dtype, float_error=1e-6 * steepness, double_error=1e-14 * steepness)
    at_zero, slope_at_zero = function(np.zeros(1, dtype), **parameters)
    assert at_zero.item() == pytest.approx(float(f(np.float64(0))), rel=4 * EPS[dtype], abs=1e-30)
    assert slope_at_zero.item() == pytest.approx(float(slope(np.float64(0))), rel=4 * EPS[dtype])


@each_dtype
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.75, 2.0, 3.0, 4.5])
def test_diffusion(dtype, exponent):
    f, slope = F.diffusion(S.astype(dtype), 2.5, exponent)
    close(f, 2.5 * double(S) ** (exponent / 2), dtype, float_error=3e-7)
    close(slope, 2.5 * exponent / 2 * double(S) ** (exponent / 2 - 1), dtype, float_error=3e-7)
    f, slope = F.diffusion(np.zeros(1, dtype), 2.5, exponent)
    assert f.item() == 0 and slope.item() == (2.5 if exponent == 2 else 0)


@each_dtype
def test_constant(dtype):
    f, slope = F.constant(S.astype(dtype), 2.5)
    assert (f == 2.5).all() and (slope == 0).all()


@each_dtype
def test_tabulated(dtype):
    def bump(d):
        return 2 + (0.7 * d).cos() * (-0.05 * d * d).exp()

    table = mk.TabulatedInhibitor(bump, max_distance=8.0, samples=2048)
    f, slope = F.tabulated(S.astype(dtype), table.table().numpy(), 8.0)
    d = np.minimum(ROOT, 8)
    decay = np.exp(-0.05 * d * d)
    near(f, 2 + np.cos(0.7 * d) * decay, dtype, float_error=3e-7, double_error=1e-11)
    change = -(0.7 * np.sin(0.7 * d) + 0.1 * d * np.cos(0.7 * d)) * decay
    inside = (ROOT < 8) & (ROOT > 1e-2)
    near(slope[inside], (change / (2 * d))[inside], dtype, float_error=2e-4, double_error=1e-7)
    assert (slope[ROOT >= 8] == 0).all()
    assert F.tabulated(np.zeros(1, dtype), table.table().numpy(), 8.0)[1] == 0


def test_tabulated_wants_cubics():
    for shape in ((1, 4), (5, 3), (8,)):
        with pytest.raises(ValueError, match=r"table must have shape \(samples, 4\) with samples >= 2"):
            F.tabulated(np.ones(2), np.ones(shape), 1.0)


@each_dtype
@pytest.mark.parametrize("function", [
    lambda s: F.difference_of_gaussians(s, 100, 0.25, 5, 81), lambda s: F.diffusion(s, 1, 2),
    lambda s: F.diffusion(s, 1, 1), lambda s: F.diffusion(s, 1, 1.5), lambda s: F.sinusoid(s, 10, 2),
    lambda s: F.ricker_wavelet(s, 1, 1), lambda s: F.constant(s, 1),
    lambda s: F.tabulated(s, np.ones((9, 4)), 1.0)])
def test_nan_reaches_value_and_slope(dtype, function):
    f, slope = function(np.array([1, np.nan, 0], dtype))
    assert np.isnan(f).tolist() == np.isnan(slope).tolist() == [False, True, False]


# --- arrays ----------------------------------------------------------------------------------------------

def test_float32_only_where_every_array_is():
    single, whole = np.ones(3, np.float32), np.ones(3, int)
    assert F.flat_axis_difference(single, single, 10).dtype == np.float32
    assert F.flat_axis_difference(single, single.astype(float), 10).dtype == np.float64
    assert F.flat_axis_difference(whole, whole, 10).dtype == np.float64
    assert F.constant(single, c=2)[0].dtype == np.float32
    assert F.tabulated(single, np.ones((9, 4)), 1)[0].dtype == np.float32


@given(st.sampled_from([(), (1,), (0,), (2, 3), (3, 1, 4)]), st.sampled_from([(), (1,), (4,), (1, 1)]))
def test_arrays_broadcast(a, b):
    try:
        shape = np.broadcast_shapes(a, b)
    except ValueError:
        return
    s, factor = F.sphere(np.full(a, 2.0), np.full(b, 2.0), 1.0)
    assert np.shape(s) == np.shape(factor) == shape
    np.testing.assert_allclose(s, np.full(shape, math.pi**2 / 4), rtol=1e-15)


def test_strided_arrays_are_read_in_place_of_their_elements():
    s = np.arange(24.0).reshape(4, 6)
    np.testing.assert_array_equal(F.diffusion(s.T[::2], 1, 2)[0], s.T[::2])
