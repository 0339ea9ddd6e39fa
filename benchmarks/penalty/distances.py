"""Other ways to write the squared distances, for the peers: through (n, n, k) tensors, and by acos on spheres."""
from __future__ import annotations

import torch
from torch import Tensor

from moduli_kernels import KleinBottle, Manifold, Product, Sphere
from moduli_kernels.geometry.maths import sqrt_of_square, wrap


def stacked_squared_distance(manifold: Manifold, x: Tensor, y: Tensor) -> Tensor:
    """Returns manifold.squared_distance(x, y), computed through one (n, m, k) tensor.

    Args:
        x: points, (n, k). Periodic coordinates lie within their period.
        y: points, (m, k).

    Returns:
        (n, m).
    """
    if isinstance(manifold, Product):
        return sum(stacked_squared_distance(m, a, b)
                   for m, a, b in zip(manifold.manifolds, manifold.split(x), manifold.split(y)))
    if isinstance(manifold, Sphere):
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        minus = sqrt_of_square((x[:, None] - y[None]).square().sum(-1))
        plus = sqrt_of_square((x[:, None] + y[None]).square().sum(-1))
        return (2 * manifold.radius * torch.atan2(minus, plus)).square()
    if isinstance(manifold, KleinBottle):
        difference = x[:, None] - y[None]
        across = wrap(difference[..., 0], 2 * manifold.width)
        straight = torch.stack([across, wrap(difference[..., 1], manifold.height)], -1)
        flipped = torch.stack([manifold.width - across.abs(),
                               wrap(x[:, None, 1] + y[None, :, 1] - manifold.height, manifold.height)], -1)
        return torch.minimum(straight.square().sum(-1), flipped.square().sum(-1))
    difference = x[:, None] - y[None]
    if all(manifold.column_periods):
        periods = torch.tensor(manifold.column_periods, dtype=x.dtype, device=x.device)
        difference = wrap(difference, periods)
    return difference.square().sum(-1)


class AcosSphere(Sphere):
    """A sphere whose angle is acos <x^, y^>, which is cheaper than atan2.

    The cosine is kept off 1, so that the derivative is finite. The absolute error is up to 5e-4 near 0 and pi.
    """

    LIMIT = 1 - 1.2e-7  # the second float32 below 1

    def _cosine(self, x: Tensor, y: Tensor) -> Tensor:
        cosine = sum(x[:, c, None] * y[None, :, c] for c in range(x.shape[1]))
        return cosine.clamp(-self.LIMIT, self.LIMIT)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        return (self.radius * torch.acos(self._cosine(x, y))).square()

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        x_norm, y_norm = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
        x, y = x / x_norm, y / y_norm
        cosine = self._cosine(x, y)
        slope = -2 * self.radius**2 * slope * torch.acos(cosine) * torch.rsqrt(1 - cosine * cosine)
        gx = torch.stack([(slope * y[None, :, c]).sum(1) for c in range(x.shape[1])], 1)
        gy = torch.stack([(slope * x[:, c, None]).sum(0) for c in range(x.shape[1])], 1)
        gx = (gx - (gx * x).sum(1, keepdim=True) * x) / x_norm
        gy = (gy - (gy * y).sum(1, keepdim=True) * y) / y_norm
        return gx, gy
