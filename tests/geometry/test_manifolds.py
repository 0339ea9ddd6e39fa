"""Compares distances with hand values, brute force and 60 digits; tests the metric axioms and gradients."""
import math

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

import moduli_kernels as mk
from moduli_kernels import geometry
from moduli_kernels.geometry.maths import reduced, wrap
from moduli_kernels.geometry.presets import PRESETS
from tests.support.penalty_cases import with_every_class

MANIFOLDS = with_every_class({
    **PRESETS,
    "small circle": mk.Circle(0.5),
    "S^1": mk.Sphere(1, 2.0),
    "uneven torus": mk.FlatTorus((3.0, 7.0, 0.5)),
    "wide klein": mk.KleinBottle(9.0, 4.0),
    "product": mk.Product(mk.Circle(1.0), mk.KleinBottle(3.0, 5.0), mk.Sphere(3, 2.0), mk.Euclidean(2)),
}, geometry.MANIFOLDS)
every_manifold = pytest.mark.parametrize("m", MANIFOLDS.values(), ids=MANIFOLDS.keys())


def sample(m, n, seed=0, dtype=torch.float64):
    return m.sample(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def between(m, x, y):
    """The distance of two single points."""
    return float(m.distance(torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)))


# --- values ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m, x, y, d", [
    (mk.Circle(5.0), [0.0], [5 * math.pi], 5 * math.pi),
    (mk.Circle(5.0), [1.0], [10 * math.pi - 1.0], 2.0),
    (mk.FlatTorus(), [0.5, 0.5], [9.5, 9.0], math.sqrt(1 + 2.25)),
    (mk.FlatTorus(), [1.0, 2.0], [4.0, 6.0], 5.0),
    (mk.FlatTorus(), [0.0, 0.0], [5.0, 5.0], math.sqrt(50)),
    (mk.FlatTorus((10.0,) * 6), [0.0] * 6, [9.0] * 6, math.sqrt(6)),
    (mk.Euclidean(), [0.0, 0.0, 0.0], [3.0, 4.0, 12.0], 13.0),
    (mk.KleinBottle(), [1.0, 2.0], [9.0, 8.0], 2.0),           # through (0, y) ~ (10, 10 - y)
    (mk.KleinBottle(), [1.0, 2.0], [9.0, 2.0], math.sqrt(20)),  # the same way, 4 apart in y
    (mk.KleinBottle(), [3.0, 0.0], [3.0, 10.0], 0.0),
    (mk.KleinBottle(), [0.0, 3.0], [10.0, 7.0], 0.0),
    (mk.KleinBottle(), [2.0, 1.0], [2.0, 9.5], 1.5),
    (mk.Sphere(), [5.0, 0.0, 0.0], [0.0, 5.0, 0.0], 5 * math.pi / 2),
    (mk.Sphere(), [0.1, 0.0, 0.0], [30.0, 30.0, 0.0], 5 * math.pi / 4),  # only directions count
    (mk.Sphere(), [1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], 5 * math.pi),
    (mk.Sphere(3), [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], 5 * math.pi / 3),
    (mk.Product(mk.Euclidean(1), mk.Euclidean(1)), [0.0, 0.0], [3.0, 4.0], 5.0),
    (mk.Product(mk.Circle(), mk.Sphere()), [0.0, 1.0, 0.0, 0.0], [3.0, 0.0, 1.0, 0.0],
     math.hypot(3, 5 * math.pi / 2)),
])
def test_hand_values(m, x, y, d):
    assert between(m, x, y) == pytest.approx(d, rel=1e-15, abs=1e-15)


def test_distances_are_pairwise_roots_of_the_squared_ones():
    m = mk.manifold("mixed")
    x, y = sample(m, 4), sample(m, 6, seed=1)
    d = m.distance(x, y)
    assert d.shape == (4, 6)
    assert torch.equal(d, m.squared_distance(x, y).sqrt())
    assert float(d[2, 5]) == float(m.distance(x[2:3], y[5:]))
    assert m.distance(x[:0], y).shape == (0, 6) and m.distance(x, y[:0]).shape == (4, 0)


@pytest.mark.parametrize("width, height", [(10.0, 10.0), (3.0, 7.0), (7.0, 3.0), (40.0, 1.0), (1.0, 40.0)])
def test_klein_bottle_against_all_images(width, height):
    """(x, y) -> (x + width, -y) and (x, y) -> (x, y + height) generate the images of a point."""
    m = mk.KleinBottle(width, height)
    x, y = sample(m, 150).numpy(), sample(m, 150, seed=1).numpy()
    nearest = np.full((150, 150), np.inf)
    for i in range(-4, 5):
        for j in range(-5, 6):
            image = np.stack([y[:, 0] + i * width, (-1) ** i * y[:, 1] + j * height], 1)
            nearest = np.minimum(nearest, np.hypot(*(x[:, None] - image[None]).transpose(2, 0, 1)))
    got = m.distance(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    np.testing.assert_allclose(got, nearest, rtol=0, atol=4e-16 * max(width, height))


# --- the sphere's accuracy -------------------------------------------------------------------------------

def pairs_at_angles(dtype):
    """Vectors of different lengths; pair l is at about the l-th angle of a list that is dense at 0 and at pi."""
    generator = torch.Generator().manual_seed(0)
    small = 10 ** torch.linspace(-12, 0, 40, dtype=torch.float64)
    between = torch.linspace(1, 2.2, 20, dtype=torch.float64)
    angle = torch.cat([small, math.pi - small, between, torch.tensor([0, math.pi])])
    u, v = torch.randn(2, len(angle), 3, generator=generator, dtype=torch.float64)
    u = u / u.norm(dim=1, keepdim=True)
    v = torch.linalg.cross(u, v)
    v = v / v.norm(dim=1, keepdim=True)
    x = (u * 3.7).to(dtype)
    return x, ((u * angle.cos()[:, None] + v * angle.sin()[:, None]) * 0.6).to(dtype)


def exact_angles(x, y):
    """The angles by acos of the normalized inner product, which is exact enough in 60 digits."""
    with mpmath.workdps(60):
        angles = []
        for a, b in zip(x.tolist(), y.tolist()):
            a, b = [mpmath.mpf(t) for t in a], [mpmath.mpf(t) for t in b]
            cosine = mpmath.fdot(a, b) / mpmath.sqrt(mpmath.fdot(a, a) * mpmath.fdot(b, b))
            angles.append(mpmath.acos(max(-1, min(1, cosine))))
        return angles


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sphere_angle_against_60_digits(dtype):
    x, y = pairs_at_angles(dtype)
    exact = exact_angles(x, y)
    got = mk.Sphere(2, 1.0).distance(x, y).diagonal().tolist()
    errors = [float(abs(mpmath.mpf(g) - e)) for g, e in zip(got, exact)]
    if dtype == torch.float32:
        assert max(errors) <= 3e-7
    else:
        assert max(errors) <= 1e-15
        assert max(error / float(e) for error, e in zip(errors, exact) if e > 1e-3) <= 1e-12


def test_sphere_works_for_16_bit_points_as_computed_in_16_bit():
    points = sample(mk.Sphere(), 20, dtype=torch.bfloat16)
    d = mk.Sphere(2, 1.0).distance(points, points)
    assert d.dtype == torch.bfloat16 and (d.diagonal() == 0).all()
    assert (d.double() - mk.Sphere(2, 1.0).distance(points.double(), points.double())).abs().max() < 0.05


# --- metric axioms ---------------------------------------------------------------------------------------

def triples(m):
    return arrays.arrays(np.float64, (3, m.ambient_dim), elements=st.floats(-30, 30, width=32))


def valid(m, points):
    for factor, part in zip(m.factors(), split(m, points)):
        if isinstance(factor, mk.Sphere):
            assume(part.norm(dim=1).min() > 1e-3)


def split(m, points):
    return points.split([f.ambient_dim for f in m.factors()], 1)


@every_manifold
def test_metric_axioms(m):
    @settings(max_examples=60)
    @given(triples(m))
    def check(coordinates):
        points = torch.from_numpy(coordinates)
        valid(m, points)
        d = m.distance(points, points)
        assert (d.diagonal() == 0).all() and (d >= 0).all()
        torch.testing.assert_close(d, d.T, rtol=0, atol=1e-13)
        assert d[0, 2] <= d[0, 1] + d[1, 2] + 1e-13

    check()


def images(m, points, k):
    """Other coordinates of the same points: k periods away or, for spheres, vectors of another length.

    For classes that this test does not know, these are the coordinates in the fundamental domain.
    """
    if isinstance(m, mk.Product):
        return torch.cat([images(f, part, k) for f, part in zip(m.factors(), split(m, points))], 1)
    if isinstance(m, mk.Sphere):
        return points * 2.5 ** k
    if isinstance(m, mk.KleinBottle):
        x, y = points.T
        return torch.stack([x + k * m.width, (-1) ** k * y + (k + 1) * m.height], 1)
    periods = getattr(m, "column_periods", None)
    return m.fundamental(points) if periods is None else points + k * torch.tensor(periods, dtype=points.dtype)


@every_manifold
@pytest.mark.parametrize("k", [-3, 1, 2])
def test_images_of_a_point_are_the_point(m, k):
    x, y = sample(m, 30), sample(m, 20, seed=1)
    torch.testing.assert_close(m.distance(images(m, x, k), y), m.distance(x, y), rtol=1e-12, atol=1e-12)
    assert m.distance(images(m, x, k), x).diagonal().max() < 1e-12


def test_wrap_leaves_half_a_period_as_it_is():
    d = torch.tensor([5.0, -5.0, 5.25, -5.25, 4.75, -4.75, 0.0, 10.0, -10.0])
    assert wrap(d, 10.0).tolist() == [5, -5, -4.75, 4.75, 4.75, -4.75, 0, 0, 0]
    assert torch.equal(wrap(-d, 10.0), -wrap(d, 10.0))


def test_reduced_is_within_one_period():
    x = torch.tensor([0.0, 10.0, -10.0, 12.5, -2.5, 1e4, -1e-9])
    assert reduced(x, 10.0).tolist() == [0, 0, 0, 2.5, 7.5, 0, 10]


@every_manifold
def test_non_finite_points_give_nan(m):
    x = sample(m, 3)
    x[1, -1] = math.nan
    d = m.distance(x, x)
    assert d[1].isnan().all() and d[:, 1].isnan().all()
    assert d[[0, 2]][:, [0, 2]].isfinite().all()


# --- gradients -------------------------------------------------------------------------------------------

def pulled(m, x, y, seed=2):
    """The gradients by pull_back and by autograd, for a random slope."""
    slope = torch.randn(len(x), len(y), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return m.pull_back(x, y, slope), mk.Manifold.pull_back(m, x, y, slope)


@every_manifold
def test_pull_back_is_autograd(m):
    x, y = 1.5 * sample(m, 9), -2.5 * sample(m, 13, seed=1)
    hand, autograd = pulled(m, x, y)
    torch.testing.assert_close(hand, autograd, rtol=1e-11, atol=1e-11)
    assert hand[0].shape == x.shape and hand[1].shape == y.shape


@every_manifold
def test_autograd_is_the_derivative(m):
    x, y = sample(m, 3).requires_grad_(), sample(m, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(m.squared_distance, (x, y))
    assert torch.autograd.gradcheck(m.distance, (x, y))


# Two shortest geodesics join a and b: the pair is singular, it lies on the cut locus.
SINGULAR = [
    (mk.Circle(), [0.0], [5 * math.pi]),
    (mk.FlatTorus(), [1.0, 2.0], [6.0, 2.0]),
    (mk.FlatTorus(), [1.0, 2.0], [6.0, 7.0]),
    (mk.KleinBottle(), [1.0, 2.0], [6.0, 2.0]),
    (mk.KleinBottle(), [1.0, 2.0], [11.0, 2.0]),
    (mk.KleinBottle(), [0.0, 0.0], [5.0, 5.0]),
    (mk.KleinBottle(), [1.0, 5.0], [6.0, 0.0]),
    (mk.KleinBottle(), [0.0, 3.0], [10.0, 7.0]),
    (mk.Sphere(), [1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]),
    (mk.Sphere(3), [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, -7.0]),
    (mk.Product(mk.Sphere(), mk.KleinBottle()), [1.0, 0.0, 0.0, 1.0, 2.0], [-1.0, 0.0, 0.0, 6.0, 2.0]),
]


@pytest.mark.parametrize("m, a, b", SINGULAR)
def test_gradients_at_singular_points_are_finite_and_by_hand_the_same(m, a, b):
    x = torch.tensor([a, b, a], dtype=torch.float64)
    hand, autograd = pulled(m, x, x.clone())
    assert hand[0].isfinite().all() and hand[1].isfinite().all()
    torch.testing.assert_close(hand, autograd, rtol=1e-12, atol=1e-12)
    for of in (m.distance, m.squared_distance):
        points = x.clone().requires_grad_()
        of(points, points).sum().backward()
        assert points.grad.isfinite().all()


def test_gradient_at_identical_points_and_antipodes_of_the_sphere_is_zero():
    x = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    for y in (x, 3 * x, -x):
        assert all((g == 0).all() for g in mk.Sphere().pull_back(x, y, one))


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_gradient_near_antipodes_keeps_its_length(gap):
    """|ds/dx| = 2 r^2 theta at |x| = 1 for angles up to pi; 1 / (pi - theta) magnifies the rounding of x^ - y^."""
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[-math.cos(gap), math.sin(gap), 0.0]], dtype=torch.float64)
    g = mk.Sphere(2, 5.0).pull_back(x, y, torch.ones(1, 1, dtype=torch.float64))[0]
    length = 50 * (math.pi - gap)
    torch.testing.assert_close(g, torch.tensor([[0.0, -length, 0.0]], dtype=torch.float64), rtol=0,
                               atol=4 * 2.2e-16 / gap * length)


def test_gradient_of_the_sphere_is_the_chain_rule_in_the_inner_product():
    """ds/dcos is -2 r^2 theta / sin theta, and tends to -2 r^2 at theta = 0."""
    m, x = mk.Sphere(2, 3.0), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    for theta in (1e-7, 0.4, 2.0, 3.1):
        y = torch.tensor([[math.cos(theta), math.sin(theta), 0.0]], dtype=torch.float64)
        g = m.pull_back(x, y, torch.ones(1, 1, dtype=torch.float64))[0]
        expected = torch.tensor([[0.0, -18 * theta, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(g, expected, rtol=1e-8, atol=0)
