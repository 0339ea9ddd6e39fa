"""The modules for training loops: ModuliRegularizer, and CoefficientRegularizer for any coefficients of one's own."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks import finite, one_of, positive_int
from ..distributed import is_sharded, shard_of, sum_over_ranks
from ..geometry.base import Inhibitor, Manifold
from ..geometry.embedding import ManifoldEmbedding
from ..geometry.inhibitors import TabulatedInhibitor, inhibitor as resolve_inhibitor
from ..geometry.presets import manifold as resolve_manifold
from . import checks
from .function import moduli_penalty, scale_of


class ModuliRegularizer(nn.Module):
    """The penalty of one weight, with the points of its neurons (paper, eq. 6):

        strength * mean or sum over entries of f(d(rows_i, cols_j)) |w_ij|^power

    Args:
        rows: the number of rows (of one block), or a ManifoldEmbedding to share.
        cols: the same for the columns. None: rows and columns are the same neurons, as in recurrent weights.
        manifold: a Manifold or a preset's name.
        inhibitor: f. None: DifferenceOfGaussians(). A bare callable d -> f(d) works as well.
        power: l, at least 1.
        blocks: gate blocks that are stacked in rows and share the points (LSTM 4, GRU 3).
        reduction: "mean" over entries, or "sum" (eq. 6).
        strength: lambda, finite. The attribute may be changed between steps.
        trainable: whether the points that are made here are trained. Given embeddings stay as they are.
        generator: makes the points reproducible. Like dtype and device, it is for points that are made here.
        dtype: the dtype of the points. None: torch's default.
        device: the device of the points. None: the generator's, else the CPU.

    The state dict holds the points, and the manifold, inhibitor and power that they were used with. Loading it into a
    regularizer that differs in these raises ValueError.

    Raises:
        ValueError: an unknown preset or reduction, power < 1, blocks < 1, rows or cols < 0, a strength that is not
            finite, or an embedding in another manifold.
        TypeError: an argument of another type.

    Warns:
        UserWarning: points are trained under a monotone inhibitor (`inhibitor.trainable` is False).
    """

    def __init__(self, rows: int | ManifoldEmbedding, cols: int | ManifoldEmbedding | None = None, *,
                 manifold: Manifold | str = "torus", inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None = None,
                 power: float = 1.0, blocks: int = 1, reduction: str = "mean", strength: float = 1.0,
                 trainable: bool = False, generator: torch.Generator | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.manifold = resolve_manifold(manifold)
        self.inhibitor = resolve_inhibitor(inhibitor)
        self.power = checks.power(power)
        self.blocks = positive_int("blocks", blocks)
        self.reduction = one_of("reduction", reduction, checks.REDUCTIONS)
        self.strength = finite("strength", strength)

        def embed(name: str, n: int | ManifoldEmbedding) -> ManifoldEmbedding:
            if isinstance(n, ManifoldEmbedding):
                checks.embedding_manifold(name, n.manifold, self.manifold)
                return n
            checks.embedding_size(name, n)
            return ManifoldEmbedding(n, self.manifold, trainable=trainable, generator=generator, dtype=dtype,
                                     device=device)

        self.rows = embed("rows", rows)
        self.cols = self.rows if cols is None else embed("cols", cols)
        if self.rows.trainable or self.cols.trainable:
            checks.warn_untrainable(self.inhibitor)

    def forward(self, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """The penalty of the weight, 0-d. Shapes, dtypes and errors are those of `moduli_penalty`.

        Args:
            weight: (blocks*R, C), or (blocks*R, C, *kernel).
            mask: bool, in the weight's shape: entries where it is False cost nothing.
        """
        return moduli_penalty(
            weight, self.rows.points, None if self.cols is self.rows else self.cols.points, manifold=self.manifold,
            inhibitor=self.inhibitor, power=self.power, blocks=self.blocks, mask=mask, reduction=self.reduction,
            strength=self.strength,
        )

    @torch.no_grad()
    def coefficients(self) -> Tensor:
        """The coefficients f(d(rows_i, cols_j)) of one block: (R, C), dense, in the dtype of the points, without a
        graph."""
        rows, cols = self.rows.points, self.cols.points
        f = self.inhibitor.at_points(self.manifold, rows, cols)
        return f.from_squared(self.manifold.squared_distance(rows, cols))

    def _with(self, coefficients: Tensor) -> CoefficientRegularizer:
        """The control that has these coefficients, and all else of this regularizer."""
        return CoefficientRegularizer(coefficients, self.power, self.reduction, self.strength)

    def shuffled(self, generator: torch.Generator | None = None) -> CoefficientRegularizer:
        """The paper's control: a regularizer with the same coefficients, permuted at random over all entries.

        Gate blocks share one permutation.

        Args:
            generator: makes the permutation reproducible, which is drawn on its device.
        """
        c = self.coefficients()
        device = c.device if generator is None else generator.device
        order = torch.randperm(c.numel(), generator=generator, device=device).to(c.device)
        return self._with(c.flatten()[order].view_as(c).repeat(self.blocks, 1))

    def matched(self) -> CoefficientRegularizer:
        """The fair control without geometry: a regularizer with one coefficient everywhere, the mean of this one's."""
        return self._with(self.coefficients().double().mean().to(self.rows.points.dtype))

    def get_extra_state(self) -> Tensor:
        """Manifold, inhibitor and power as JSON in uint8: a tensor, so that safetensors can hold it."""
        used = {"manifold": repr(self.manifold), "inhibitor": _describe(self.inhibitor), "power": self.power}
        return torch.tensor(list(json.dumps(used).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compares a saved state's manifold, inhibitor and power with this regularizer's.

        Raises:
            ValueError: one of them differs.
        """
        saved = json.loads(bytes(state.tolist()).decode())
        mine = json.loads(bytes(self.get_extra_state().tolist()).decode())
        for name, value in mine.items():
            checks.saved_setting(name, saved.get(name), value)

    def extra_repr(self) -> str:
        shared = ", cols=rows" if self.cols is self.rows else ""
        return (f"{self.manifold}, {self.inhibitor}, power={self.power}, blocks={self.blocks}, "
                f"reduction={self.reduction!r}, strength={self.strength}{shared}")


def _describe(inhibitor: Inhibitor) -> str:
    """A name that two inhibitors have in common only where they are the same function."""
    if isinstance(inhibitor, TabulatedInhibitor):
        digest = hashlib.sha256(json.dumps(inhibitor.values).encode()).hexdigest()[:16]
        return f"{inhibitor!r} of values {digest}"
    return repr(inhibitor)


class CoefficientRegularizer(nn.Module):
    """strength * sum or mean over entries of coefficients_ij |w_ij|^power, with any coefficients (paper, eq. 5).

    |w| is the L2 norm over the weight's kernel dimensions. It is computed in plain PyTorch, with gradients by autograd.
    A DTensor that fully_shard has cut into rows is treated as by `moduli_penalty`.

    Args:
        coefficients: (R, C), or 0-d for one coefficient everywhere; floating point, copied into a buffer.
        power: l, at least 1.
        reduction: "mean" over entries, or "sum" (eq. 5).
        strength: lambda, finite. The attribute may be changed between steps.

    Raises:
        ValueError: coefficients of another shape, power < 1, an unknown reduction, or a strength that is not finite.
        TypeError: coefficients are no floating-point tensor; power or strength is no number.
    """

    coefficients: Tensor

    def __init__(self, coefficients: Tensor, power: float = 1.0, reduction: str = "mean", strength: float = 1.0):
        super().__init__()
        checks.coefficient_tensor(coefficients)
        self.power = checks.power(power)
        self.reduction = one_of("reduction", reduction, checks.REDUCTIONS)
        self.strength = finite("strength", strength)
        self.register_buffer("coefficients", coefficients.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The penalty of the weight, 0-d: float64 for float64 weights, else float32.

        Args:
            weight: (R, C), or (R, C, *kernel), on the coefficients' device; any such shape for a 0-d coefficient.

        Raises:
            ValueError, TypeError: the weight does not fit; the message says how.
            NotImplementedError: the weight is a DTensor that is not cut into rows.
        """
        checks.coefficient_arguments(weight, self.coefficients)
        scale, coefficients, group = scale_of(weight, self.reduction, 1.0), self.coefficients, None
        if is_sharded(weight):
            shard = shard_of(weight)
            weight, group = shard.local, shard.group
            coefficients = shard.rows_of(coefficients) if coefficients.dim() else coefficients
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        a = weight.abs() if weight.dim() == 2 else torch.linalg.vector_norm(weight.flatten(2), dim=2)
        cost = coefficients.to(weight.dtype) * (a if self.power == 1 else a.pow(self.power))
        return sum_over_ranks(cost.sum(), group) * scale * self.strength  # in this order: see moduli_penalty

    def extra_repr(self) -> str:
        return (f"coefficients={tuple(self.coefficients.shape)}, power={self.power}, reduction={self.reduction!r}, "
                f"strength={self.strength}")


