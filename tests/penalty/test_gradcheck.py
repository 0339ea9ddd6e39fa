"""gradcheck (float64) of moduli_penalty over every manifold x inhibitor x power, blocks, kernels and
masks."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moduli_kernels as mk
from tests.support.penalty_cases import (
    BACKENDS,
    INHIBITORS,
    KERNELS,
    MANIFOLDS,
    VARIANTS,
    draw_points,
    draw_weight,
    generator,
    on_device,
    tiled_warning,
)

pytestmark = [tiled_warning, on_device]


def smooth_points(manifold: mk.Manifold, *counts: int) -> list[Tensor]:
    """Points, none of whose pairs is near a cut locus or coincides: there finite differences mean nothing."""
    step = 1e-3
    for seed in range(1000):
        x, y = (draw_points(manifold, n, seed + 500 * side, torch.float64) for side, n in enumerate(counts))
        s = manifold.squared_distance(x, y)
        bends = []
        for c in range(manifold.ambient_dim):
            shift = torch.zeros(manifold.ambient_dim, dtype=torch.float64)
            shift[c] = step
            bends.append(manifold.squared_distance(x + shift, y)
                         + manifold.squared_distance(x - shift, y) - 2 * s)
        if s.min() > 0.05 and torch.stack(bends).abs().max() < 100 * step**2:
            return [x, y]
    raise AssertionError(f"no smooth points on {manifold}")


def weight_off_zero(*shape: int) -> Tensor:
    """|w|^l has no second derivative at 0 for l < 2."""
    weight = draw_weight(*shape, dtype=torch.float64)
    return (weight + 0.2 * weight.sign()).requires_grad_()


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("inhibitor", [*INHIBITORS, *VARIANTS])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_gradcheck(manifold, inhibitor, power):
    """On the backend that is active here; test_reference.py checks the other."""
    if KERNELS == "triton" and inhibitor != "dog":
        pytest.skip("each is compiled anew; test_penalty.py holds them all against the float64 reference")
    m, f = MANIFOLDS[manifold], (INHIBITORS | VARIANTS)[inhibitor]
    rows, cols = (p.requires_grad_() for p in smooth_points(m, 3, 2))
    assert torch.autograd.gradcheck(
        lambda *t: mk.moduli_penalty(*t, manifold=m, inhibitor=f, power=power, reduction="sum"),
        (weight_off_zero(3, 2), rows, cols))


@pytest.mark.parametrize("blocks,kernel,masked",
                         [(1, (), True), (3, (), False), (3, (), True), (1, (2, 2), False),
                                                  (2, (3,), True)], ids=str)
@pytest.mark.parametrize("manifold", ["torus", "sphere", "klein"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_blocks_kernels_masks(backend, manifold, blocks, kernel, masked):
    m = MANIFOLDS[manifold]
    rows, cols = (p.requires_grad_() for p in smooth_points(m, 3, 2))
    weight = weight_off_zero(blocks * 3, 2, *kernel)
    mask = torch.rand(weight.shape, generator=generator(3)) < 0.6 if masked else None
    with mk.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *t: mk.moduli_penalty(*t, manifold=m, power=1.5, blocks=blocks, mask=mask),
            (weight, rows, cols))
