"""ManifoldEmbedding: the points of the neurons, as a module that layers can share."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from .manifolds import Manifold, manifold as resolve_manifold


class ManifoldEmbedding(nn.Module):
    """One point on a manifold for each of n neurons (the paper's i: {1..n} -> M).

    Args:
        n: number of neurons.
        manifold: a Manifold or a preset's name.
        points: (n, ambient_dim) to start from, instead of drawing them; copied.
        layout: "uniform" draws i.i.d. uniform points, "grid" takes a regular lattice (flat manifolds, 2-sphere).
        trainable: `.points` is a Parameter, trained with the weights, else a buffer. Give it weight_decay 0 in the
            optimizer: decay would pull coordinates to the arbitrary origin.
        generator: for reproducible points.
        dtype: of the points; None = that of the given ones, else torch's default.
        device: of the points; None = that of the given ones, else the generator's, else the CPU.

    Share one instance between layers where rows of one weight and columns of another are the same neurons
    (paper, App. I.1).

    Raises:
        ValueError: n < 0, an unknown preset or layout, points of another shape, not finite or a zero vector on a
            sphere, layout "grid" on a manifold that has none.
        TypeError: n is no integer, points are no floating-point tensor.
    """

    points: Tensor

    def __init__(self, n: int, manifold: Manifold | str = "torus", *, points: Tensor | None = None,
                 layout: str = "uniform", trainable: bool = False, generator: torch.Generator | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        checks.positive_int("n", n, minimum=0)
        checks.one_of("layout", layout, ("uniform", "grid"))
        self.manifold = resolve_manifold(manifold)
        if points is not None:
            checks.embedding_points(points, n, self.manifold)
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
        """Whether the points are trained: a Parameter that requires grad."""
        return self.points.requires_grad

    def __len__(self) -> int:
        return self.points.shape[0]

    def extra_repr(self) -> str:
        return f"{len(self)}, {self.manifold}, trainable={self.trainable}"
