"""Tests manifolds as objects: sampling, grids, presets, equality, copies, subclasses, and errors word for word."""
import copy
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch

import moduli_kernels as mk
from moduli_kernels.geometry.presets import PRESETS
from tests.geometry.test_manifolds import every_manifold, sample

# --- sampling and grids ----------------------------------------------------------------------------------

def uniform_on(values, low, high):
    values = np.asarray(values, dtype=float)
    assert values.min() >= low and values.max() <= high
    assert scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


@pytest.mark.parametrize("m, sides", [
    (mk.Circle(3.0), (6 * math.pi,)), (mk.FlatTorus((3.0, 7.0)), (3.0, 7.0)),
    (mk.KleinBottle(4.0, 9.0), (4.0, 9.0)), (mk.Euclidean(3, 2.0), (2.0, 2.0, 2.0)),
])
def test_flat_samples_are_uniform_and_independent(m, sides):
    points = sample(m, 20000)
    for c, side in enumerate(sides):
        uniform_on(points[:, c], 0, side)
    cells = np.histogramdd(points.numpy(), bins=[6] * len(sides), range=[(0, s) for s in sides])[0]
    assert scipy.stats.chisquare(cells.ravel()).pvalue > 1e-3


def test_sphere_samples_are_uniform():
    points = sample(mk.Sphere(2, 4.0), 20000)
    torch.testing.assert_close(points.norm(dim=1), torch.full((20000,), 4.0, dtype=torch.float64))
    uniform_on(points[:, 2], -4, 4)  # heights are uniform, as Archimedes found
    uniform_on(torch.atan2(points[:, 1], points[:, 0]), -math.pi, math.pi)
    points = sample(mk.Sphere(3, 2.0), 20000)
    uniform_on(points[:, :2].square().sum(1) / 4, 0, 1)  # Hopf coordinates are uniform
    uniform_on(torch.atan2(points[:, 3], points[:, 2]), -math.pi, math.pi)


@every_manifold
def test_samples_have_the_shape_and_dtype_asked_for_and_repeat(m):
    points = m.sample(7, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    assert points.shape == (7, m.ambient_dim) and points.dtype == torch.float32
    assert torch.equal(points, m.sample(7, generator=torch.Generator().manual_seed(3)))
    assert m.sample(0).shape == (0, m.ambient_dim)
    assert m.sample(2, dtype=torch.float16, device="cpu").dtype == torch.float16


@pytest.mark.parametrize("m, n, nearest", [
    (mk.FlatTorus(), 100, 1.0), (mk.FlatTorus((2.0, 8.0)), 16, 1.0), (mk.KleinBottle(), 100, 1.0),
    (mk.Euclidean(3, 3.0), 27, 1.0), (mk.Circle(1.0), 7, 2 * math.pi / 7),
    (mk.FlatTorus((10.0,) * 6), 64, 5.0),
])
def test_grid_of_a_full_lattice_has_equal_cells(m, n, nearest):
    points = m.grid(n)
    assert points.shape == (n, m.ambient_dim) and points.dtype == torch.float64
    d = m.distance(points, points)
    d.fill_diagonal_(math.inf)
    torch.testing.assert_close(d.min(1).values, torch.full((n,), nearest, dtype=torch.float64))


@pytest.mark.parametrize("m, area", [
    (mk.FlatTorus(), 100.0), (mk.KleinBottle(), 100.0), (mk.Sphere(), 100 * math.pi)])
@pytest.mark.parametrize("n", [2, 97, 650])
def test_grid_of_any_size_spreads_its_points(m, area, n):
    """The nearest points are compared with sqrt(area / n), the side of a point's share of the area.

    Points drawn independently come as near as a hundredth of it.
    """
    points = m.grid(n)
    d = m.distance(points, points)
    d.fill_diagonal_(math.inf)
    assert points.shape == (n, m.ambient_dim) and d.min() > 0.6 * math.sqrt(area / n)


@every_manifold
def test_grid_exists_or_says_where(m):
    if len(m.factors()) == 1 and (not isinstance(m, mk.Sphere) or m.dim == 2):
        assert m.grid(0).shape == (0, m.ambient_dim) and m.grid(1).isfinite().all()
        return
    with pytest.raises(ValueError) as caught:
        m.grid(9)
    assert str(caught.value) == (
        f"layout must be 'uniform' for {m}, got 'grid' (only flat manifolds and the 2-sphere have one); "
        "use 'uniform' or pass points=")


# --- objects ---------------------------------------------------------------------------------------------

def test_presets_are_the_papers():
    expected = {
        "torus": mk.FlatTorus((10.0, 10.0)), "torus6": mk.FlatTorus((10.0,) * 6), "circle": mk.Circle(5.0),
        "sphere": mk.Sphere(2, 5.0), "s3": mk.Sphere(3, 5.0), "klein": mk.KleinBottle(10.0, 10.0),
        "r3": mk.Euclidean(3, 10.0), "mixed": mk.Product(mk.Sphere(2, 5.0), mk.FlatTorus((10.0, 10.0))),
    }
    assert {name: mk.manifold(name) for name in expected} == PRESETS == expected
    assert [m.ambient_dim for m in PRESETS.values()] == [2, 6, 1, 3, 4, 2, 3, 5]
    assert mk.manifold(expected["klein"]) is expected["klein"]


@every_manifold
def test_manifolds_are_values(m):
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), eval(repr(m), vars(mk))):
        assert other == m and hash(other) == hash(m)
    assert m != mk.Circle(77.0)
    with pytest.raises(AttributeError):
        m.radius = 3.0


def test_products_are_flattened():
    m = mk.Product(mk.Product(mk.Circle(), mk.Sphere()), mk.FlatTorus())
    assert m == mk.Product(mk.Circle(), mk.Sphere(), mk.FlatTorus()) and m.ambient_dim == 6


class Cylinder(mk.Manifold):
    """A user's subclass, which defines no more than it must."""

    ambient_dim = 2

    def sample(self, n, *, generator=None, dtype=None, device=None):
        return torch.rand(n, 2, generator=generator, dtype=dtype, device=device)

    def squared_distance(self, x, y):
        around = mk.FlatTorus((1.0,)).squared_distance(x[:, :1], y[:, :1])
        return around + (x[:, 1, None] - y[None, :, 1]).square()


def test_a_subclass_has_distances_and_gradients_and_multiplies():
    m = mk.Product(Cylinder(), mk.Circle())
    same = mk.Product(mk.FlatTorus((1.0,)), mk.Euclidean(1), mk.Circle())
    x, y = sample(m, 5), sample(m, 6, seed=1)
    slope = torch.rand(5, 6, dtype=torch.float64)
    torch.testing.assert_close(m.distance(x, y), same.distance(x, y))
    torch.testing.assert_close(m.pull_back(x, y, slope), same.pull_back(x, y, slope))
    with pytest.raises(NotImplementedError):
        mk.Manifold().sample(3)
    with pytest.raises(NotImplementedError):
        mk.Manifold().squared_distance(x, y)


# --- errors ----------------------------------------------------------------------------------------------

TORUS, SPHERE = "FlatTorus(periods=(10.0, 10.0))", "Sphere(dim=2, radius=5.0)"
POINTS = torch.zeros(3, 2)


CHOICES = "'torus', 'torus6', 'circle', 'sphere', 's3', 'klein', 'r3', 'mixed'"


def positive(name, got):
    return f"{name} must be a positive finite number, got {got}; pass a float such as 5.0."


@pytest.mark.parametrize("make, error, message", [
    (lambda: mk.Circle(-1.0), ValueError, positive("radius", "-1.0")),
    (lambda: mk.Circle(0), ValueError, positive("radius", "0")),
    (lambda: mk.Circle(math.nan), ValueError, positive("radius", "nan")),
    (lambda: mk.Circle("5"), TypeError, positive("radius", "'5'")),
    (lambda: mk.Circle(True), TypeError, positive("radius", "True")),
    (lambda: mk.Sphere(2, -5.0), ValueError, positive("radius", "-5.0")),
    (lambda: mk.Sphere(radius=math.inf), ValueError, positive("radius", "inf")),
    (lambda: mk.Sphere(0), ValueError, "dim must be an integer of at least 1, got 0; pass a larger one."),
    (lambda: mk.Sphere(2.0), TypeError, "dim must be an integer of at least 1, got 2.0; pass an int."),
    (lambda: mk.FlatTorus((10.0, -2.0)), ValueError, positive("periods[1]", "-2.0")),
    (lambda: mk.FlatTorus(()), ValueError,
     "periods must hold at least one positive number, got (); pass for example (10.0, 10.0)."),
    (lambda: mk.FlatTorus(10.0), TypeError,
     "periods must be a tuple of positive numbers, got 10.0; pass for example (10.0, 10.0)."),
    (lambda: mk.KleinBottle(-1.0), ValueError, positive("width", "-1.0")),
    (lambda: mk.KleinBottle(1.0, 0.0), ValueError, positive("height", "0.0")),
    (lambda: mk.Euclidean(0), ValueError, "dim must be an integer of at least 1, got 0; pass a larger one."),
    (lambda: mk.Euclidean(3, -1.0), ValueError, positive("side", "-1.0")),
    (lambda: mk.Product(), ValueError,
     "manifolds must hold at least one manifold, got none; pass for example Sphere(), FlatTorus()."),
    (lambda: mk.Product(mk.Circle(), "torus"), TypeError,
     "manifolds[1] must be a Manifold, got str; pass for example Sphere()."),
    (lambda: mk.manifold("donut"), ValueError,
     f"manifold must be a Manifold or one of {CHOICES}, got 'donut'; pick one of them."),
    (lambda: mk.manifold(3), ValueError,
     f"manifold must be a Manifold or one of {CHOICES}, got 3; pick one of them."),
    (lambda: mk.FlatTorus().sample(-1), ValueError,
     "n must be an integer of at least 0, got -1; pass a larger one."),
    (lambda: mk.Sphere().sample(2.0), TypeError, "n must be an integer of at least 0, got 2.0; pass an int."),
    (lambda: mk.FlatTorus().distance(torch.zeros(3), POINTS), ValueError,
     f"x must have shape (points, 2) for {TORUS}, got (3,); give one row a point."),
    (lambda: mk.FlatTorus().distance(POINTS, torch.zeros(3, 3)), ValueError,
     f"y must have shape (points, 2) for {TORUS}, got (3, 3); give one row a point."),
    (lambda: mk.Sphere().distance(POINTS, POINTS), ValueError,
     f"x must have shape (points, 3) for {SPHERE}, got (3, 2); give one row a point."),
    (lambda: mk.KleinBottle().squared_distance([[1.0, 2.0]], POINTS), TypeError,
     "x must be a tensor of points, got a list; pass torch.as_tensor(...)."),
    (lambda: mk.FlatTorus().distance(POINTS.long(), POINTS), TypeError,
     "x must be floating point, got torch.int64; convert it with .float()."),
    (lambda: mk.FlatTorus().distance(POINTS, POINTS.to("meta")), ValueError,
     "x and y must be on one device, got cpu and meta; move one with .to()."),
    (lambda: mk.Sphere().check_points(torch.eye(3) - torch.eye(3)[:1]), ValueError,
     f"points must not hold a zero vector on {SPHERE} (it cannot be normalized), got one at row 0; give "
     "every row a direction."),
    (lambda: mk.manifold("mixed").check_points(torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])),
     ValueError,
     f"points must not hold a zero vector on {SPHERE} (it cannot be normalized), got one at row 1; give "
     "every row a direction."),
])
def test_errors(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
