"""ManifoldEmbedding: the points of the neurons, as a module that layers can share."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_int
from .base import Manifold
from .checks import embedding_points
from .presets import manifold as resolve_manifold

__all__ = ["ManifoldEmbedding"]


class ManifoldEmbedding(nn.Module):
    """One point on a manifold for each of n neurons (the paper's map i: {1..n} -> M).

    Layers share one instance where the rows of one weight and the columns of another are the same neurons (paper,
    App. I.1).

    Args:
        n: the number of neurons.
        manifold: a Manifold or a preset's name.
        points: (n, ambient_dim), the points to start from, which are copied; None draws them.
        layout: "uniform" draws points independently and uniformly, "grid" takes a regular lattice (flat manifolds and
            the 2-sphere have one).
        trainable: makes `.points` a Parameter, to be trained with the weights, rather than a buffer. Give it
            weight_decay 0 in the optimizer: decay would pull the coordinates to an arbitrary origin.
        generator: makes the points reproducible.
        dtype: the dtype of the points; None keeps that of the given ones, and otherwise means torch's default.
        device: the device of the points; None keeps that of the given ones, and otherwise means the generator's, or
            else the CPU.

    Raises:
        ValueError: n < 0, an unknown preset or layout, points that have another shape, are not finite or hold a zero
            vector on a sphere, or layout "grid" on a manifold that has none.
        TypeError: n is not an integer, or points are not a floating-point tensor.
    """

    points: Tensor

    def __init__(self, n: int, manifold: Manifold | str = "torus", *, points: Tensor | None = None,
                 layout: str = "uniform", trainable: bool = False, generator: torch.Generator | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        positive_int("n", n, minimum=0)
        one_of("layout", layout, ("uniform", "grid"))
        self.manifold = resolve_manifold(manifold)
        if points is not None:
            embedding_points(points, n, self.manifold)
            points = points.detach().to(dtype=dtype, device=device, copy=True)
        elif layout == "grid":
            points = self.manifold.grid(n).to(dtype=dtype or torch.get_default_dtype(), device=device)
        else:
            points = self.manifold.sample(n, generator=generator, dtype=dtype, device=device)
        if trainable:
            self.points = nn.Parameter(points)
        else:
            self.register_buffer("points", points)

    @property
    def trainable(self) -> bool:
        """Whether the points are trained, that is, a Parameter that requires grad."""
        return self.points.requires_grad

    def __len__(self) -> int:
        return self.points.shape[0]

    def extra_repr(self) -> str:
        return f"{len(self)}, {self.manifold}, trainable={self.trainable}"
