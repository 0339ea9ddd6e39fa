"""The modules for training loops: ModuliRegularizer and, for any coefficient per weight, CoefficientRegularizer."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed import is_sharded, shard_of, sum_over_ranks
from ..geometry.embedding import ManifoldEmbedding
from ..geometry.inhibitors import Inhibitor, TabulatedInhibitor, inhibitor as resolve_inhibitor
from ..geometry.manifolds import Manifold, manifold as resolve_manifold
from .function import moduli_penalty


class ModuliRegularizer(nn.Module):
    """The penalty on one weight, with the points of its neurons (paper, eq. 6).

    Args:
        rows: number of rows (of one block), or a ManifoldEmbedding to share.
        cols: the same for the columns; None where rows and columns are the same neurons (recurrent weights).
        manifold: a Manifold or a preset's name.
        inhibitor: f; None = DifferenceOfGaussians(), a bare callable d -> f(d) does as well.
        power: l >= 1.
        blocks: gate blocks stacked in rows that share the points (LSTM 4, GRU 3).
        reduction: "mean" over entries, or "sum" (eq. 6).
        strength: lambda, finite. The attribute may be changed between steps.
        trainable: train the points made here (given embeddings keep what they are).
        generator: for reproducible points; like dtype and device, for points made here.
        dtype: of the points, None = torch's default.
        device: of the points, None = the generator's, else the CPU.

    The state dict holds the points and what manifold, inhibitor and power they were used with; loading it into a
    regularizer that differs raises ValueError.

    Raises:
        ValueError: an unknown preset or reduction, power < 1, blocks < 1, rows or cols < 0, strength not finite, an
            embedding in another manifold.
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
        self.blocks = checks.positive_int("blocks", blocks)
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)
        self.strength = checks.finite("strength", strength)

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
        """The penalty of `weight`, 0-d, of which entries under a `mask` that is False cost nothing; shapes, dtypes and
        errors are those of `moduli_penalty`."""
        return moduli_penalty(
            weight, self.rows.points, None if self.cols is self.rows else self.cols.points, manifold=self.manifold,
            inhibitor=self.inhibitor, power=self.power, blocks=self.blocks, mask=mask, reduction=self.reduction,
            strength=self.strength,
        )

    @torch.no_grad()
    def coefficients(self) -> Tensor:
        """f(d(rows_i, cols_j)), dense: (R, C), of one block, without a graph."""
        return self.inhibitor.from_squared(self.manifold.squared_distance(self.rows.points, self.cols.points))

    def _with(self, coefficients: Tensor) -> CoefficientRegularizer:
        return CoefficientRegularizer(coefficients, self.power, self.reduction, self.strength)

    def shuffled(self, generator: torch.Generator | None = None) -> CoefficientRegularizer:
        """The control of the paper: the same coefficients, permuted at random over all entries. Gate blocks share
        one permutation.

        Args:
            generator: for a reproducible permutation; drawn on its device.
        """
        c = self.coefficients()
        device = c.device if generator is None else generator.device
        order = torch.randperm(c.numel(), generator=generator, device=device).to(c.device)
        return self._with(c.flatten()[order].view_as(c).repeat(self.blocks, 1))

    def matched(self) -> CoefficientRegularizer:
        """The fair L_l control: one constant coefficient, the mean of this regularizer's."""
        return self._with(self.coefficients().double().mean().to(self.rows.points.dtype))

    def get_extra_state(self) -> Tensor:
        """JSON in bytes (a tensor, so that safetensors can hold it)."""
        used = {"manifold": repr(self.manifold), "inhibitor": _describe(self.inhibitor), "power": self.power}
        return torch.tensor(list(json.dumps(used).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = json.loads(bytes(state.tolist()).decode())
        mine = json.loads(bytes(self.get_extra_state().tolist()).decode())
        for name, value in mine.items():
            checks.saved_setting(name, saved.get(name), value)

    def extra_repr(self) -> str:
        shared = ", cols=rows" if self.cols is self.rows else ""
        return (f"{self.manifold}, {self.inhibitor}, power={self.power}, blocks={self.blocks}, "
                f"reduction={self.reduction!r}, strength={self.strength}{shared}")


def _describe(inhibitor: Inhibitor) -> str:
    """A name that two inhibitors share only when they are the same function."""
    if isinstance(inhibitor, TabulatedInhibitor):
        digest = hashlib.sha256(json.dumps(inhibitor.values).encode()).hexdigest()[:16]
        return f"{inhibitor!r} of values {digest}"
    return repr(inhibitor)


class CoefficientRegularizer(nn.Module):
    """strength * sum or mean of coefficients_ij |w_ij|^power: any coefficient per weight (paper, eq. 5).

    Kernel dimensions of the weight count by their L2 norm. Plain PyTorch, and by autograd. A weight sharded in rows
    (fully_shard) as by `moduli_penalty`.

    Args:
        coefficients: (R, C), or 0-d for one coefficient everywhere; floating point, copied into a buffer.
        power: l >= 1.
        reduction: "mean" over entries, or "sum" (eq. 5).
        strength: lambda, finite. The attribute may be changed between steps.

    Raises:
        ValueError: coefficients of another shape, power < 1, an unknown reduction, strength not finite.
        TypeError: coefficients that are no floating-point tensor; power or strength that is no number.
    """

    coefficients: Tensor

    def __init__(self, coefficients: Tensor, power: float = 1.0, reduction: str = "mean", strength: float = 1.0):
        super().__init__()
        checks.coefficient_tensor(coefficients)
        self.power = checks.power(power)
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)
        self.strength = checks.finite("strength", strength)
        self.register_buffer("coefficients", coefficients.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """strength * sum or mean of coefficients_ij |w_ij|^power, 0-d: float64 for float64 weights, else float32.

        Args:
            weight: (R, C), or (R, C, *kernel), on the coefficients' device; any such shape for a 0-d coefficient.

        Raises:
            ValueError, TypeError: weight does not fit; the message says how.
            NotImplementedError: for a DTensor that is not cut in rows.
        """
        checks.coefficient_arguments(weight, self.coefficients)
        entries, coefficients, group = weight.shape[0] * weight.shape[1], self.coefficients, None
        if is_sharded(weight):
            shard = shard_of(weight)
            weight, group = shard.local, shard.group
            coefficients = shard.rows_of(coefficients) if coefficients.dim() else coefficients
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        a = weight.abs() if weight.dim() == 2 else torch.linalg.vector_norm(weight.flatten(2), dim=2)
        cost = coefficients.to(weight.dtype) * (a if self.power == 1 else a.pow(self.power))
        total = sum_over_ranks(cost.sum(), group)
        return total * (self.strength / max(1, entries) if self.reduction == "mean" else self.strength)

    def extra_repr(self) -> str:
        return (f"coefficients={tuple(self.coefficients.shape)}, power={self.power}, reduction={self.reduction!r}, "
                f"strength={self.strength}")


