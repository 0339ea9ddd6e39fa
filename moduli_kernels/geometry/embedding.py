"""ManifoldEmbedding: the points of the neurons, as a module that layers can share."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_int
from .base import Manifold
from .checks import embedding_points, points_to_restore
from .presets import manifold as resolve_manifold

__all__ = ["ManifoldEmbedding"]


class ManifoldEmbedding(nn.Module):
    """One point on a manifold for each of n neurons (the paper's map i: {1..n} -> M).

    Layers share one instance where the rows of one weight and the columns of another are the same neurons (paper,
    App. I.1).

    An embedding that is made on the meta device has no points. `to_empty` gives it room for them, which is filled with
    NaN, so that a penalty is NaN as long as nobody has called `reset_parameters` or loaded a state dict.

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
            else torch's default.

    Raises:
        ValueError: n < 0, an unknown preset or layout, points that have another shape, are not finite or hold a zero
            vector on a sphere, or layout "grid" on a manifold that has none.
        TypeError: n is not an integer, or points are not a floating-point tensor.
    """

    points: Tensor
    _layout: str = "uniform"
    _given: Tensor | None = None  # on the CPU: reset_parameters restores what was given

    def __init__(self, n: int, manifold: Manifold | str = "torus", *, points: Tensor | None = None,
                 layout: str = "uniform", trainable: bool = False, generator: torch.Generator | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        n = int(positive_int("n", n, minimum=0))
        self._layout = one_of("layout", layout, ("uniform", "grid"))
        self.manifold = resolve_manifold(manifold)
        if points is not None:
            embedding_points(points, n, self.manifold)
            self._given = None if points.is_meta else points.detach().to("cpu", copy=True)
            points = points.detach().to(dtype=dtype, device=device, copy=True).contiguous()
            self._layout = "given"
        else:
            points = self._drawn(n, generator, dtype, device)
        if trainable:
            self.points = nn.Parameter(points)
        else:
            self.register_buffer("points", points)

    def _drawn(self, n: int, generator: torch.Generator | None, dtype: torch.dtype | None,
               device: torch.device | str | None) -> Tensor:
        """New points of the layout, (n, ambient_dim)."""
        if self._layout == "grid":
            return self.manifold.grid(n).to(device or torch.get_default_device(), dtype or torch.get_default_dtype())
        return self.manifold.sample(n, generator=generator, dtype=dtype, device=device)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the points again, as the constructor did: in its layout, or the points that it was given.

        It writes into `.points`, on their device and in their dtype. So a model that was made on the meta device is
        initialized after `to_empty`; FSDP and others call this method by its name.

        Args:
            generator: makes the points reproducible; a new embedding with a generator in the same state has the same
                points. None: torch's own. The constructor's generator is not kept.

        Raises:
            ValueError: the points were given on the meta device, so that they were never known.
        """
        if self._layout == "given":
            self.points.copy_(points_to_restore(self._given))
        else:
            self.points.copy_(self._drawn(len(self), generator, self.points.dtype, self.points.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **settings: Any) -> ManifoldEmbedding:
        was_meta = self.points.is_meta
        super()._apply(fn, *arguments, **settings)
        if was_meta and not self.points.is_meta:  # to_empty: what is there now is no point
            with torch.no_grad():
                self.points.fill_(torch.nan)
        return self

    @property
    def trainable(self) -> bool:
        """Whether the points are trained, that is, a Parameter that requires grad."""
        return self.points.requires_grad

    def __len__(self) -> int:
        return self.points.shape[0]

    def extra_repr(self) -> str:
        return f"{len(self)}, {self.manifold}, trainable={self.trainable}"
