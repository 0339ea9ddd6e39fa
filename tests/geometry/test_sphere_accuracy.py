"""What the docstring of Sphere says of its errors: the absolute one is small, the relative one grows near 0."""
import math

import pytest
import torch

import moduli_kernels as mk


def pairs(angle, n=400):
    """Points (n, 3) of any length, float64, and others at this angle from them."""
    g = torch.Generator().manual_seed(0)
    x, t, length = torch.randn(n, 3, generator=g).double(), torch.randn(n, 3, generator=g).double(), torch.rand(
        n, 2, generator=g).double() * 9 + 1
    x = x / x.norm(dim=1, keepdim=True)
    t = t - (t * x).sum(1, keepdim=True) * x
    y = math.cos(angle) * x + math.sin(angle) * t / t.norm(dim=1, keepdim=True)
    return length[:, :1] * x, length[:, 1:] * y


def errors(angle, dtype=torch.float32):
    """(absolute error, relative error) of the angle in this dtype, against float64 of the same rounded points."""
    x, y = (points.to(dtype) for points in pairs(angle))
    sphere = mk.Sphere(dim=2, radius=1.0)
    got, exact = (torch.cat([sphere.distance(a[None], b[None]) for a, b in zip(x.to(d), y.to(d))]).double()
                  for d in (dtype, torch.float64))
    error = (got - exact).abs()
    return error.max().item(), (error / exact).max().item()


@pytest.mark.parametrize("angle", [1e-6, 1e-5, 1e-3, 0.1, 1.0, 3.0, math.pi - 1e-3, math.pi - 1e-5])
def test_the_absolute_error_is_small_at_every_angle(angle):
    assert errors(angle)[0] < 3e-7


@pytest.mark.parametrize("angle", [1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_the_relative_error_near_0_grows_as_eps_over_the_angle(angle):
    relative, bound = errors(angle)[1], torch.finfo(torch.float32).eps / angle
    assert 0.05 * bound < relative < 2 * bound


def test_the_radius_of_the_authors_code_for_fixed_points_on_s3():
    points = mk.manifold("s3").sample(6)
    torch.testing.assert_close(mk.Sphere(dim=3, radius=10).distance(points, points),
                               2 * mk.manifold("s3").distance(points, points))
