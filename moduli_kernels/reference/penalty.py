"""The specification of the penalty: value, gradients by hand and proximal step, in plain PyTorch.

    R = scale * sum_{b,i,j} f(d(x_i, y_j)) |w_bij|^l                   (paper, eq. 6)
    dR/dw_bij = scale f l |w_bij|^(l-1) w_bij / |w_bij|                (0 at w = 0 for l = 1)
    dR/dx_i = scale sum_j f'(s_ij) (sum_b |w_bij|^l) ds_ij/dx_i

with gate blocks b, rows i with points x_i, columns j with points y_j, the squared distance s_ij = d(x_i, y_j)^2, and
|w| the L2 norm over kernel dimensions.

Tests compare every kernel with this file, and it is the fallback where no kernel is built. It works on strips of rows,
which keep its temporaries at about TILE entries: nothing n x n x k is made, nor a second n x n matrix.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.base import Inhibitor, Manifold

TILE = 1 << 18  # entries of the weight in a strip


class Penalty(NamedTuple):
    """What is to be computed, the tensors aside.

    manifold: gives the squared distances s.
    inhibitor: f.
    power: l, at least 1.
    blocks: gate blocks that are stacked in rows and share the points.
    scale: what the sum is multiplied by; a 0-d tensor where the gradient that came into backward is part of it.
    """

    manifold: Manifold
    inhibitor: Inhibitor
    power: float
    blocks: int
    scale: float | Tensor


class Gradients(NamedTuple):
    """The gradients of the penalty; None where they are not asked for.

    weight: like the weight.
    rows: like the rows' points. With cols=None it holds the columns' part too.
    cols: like the columns' points; None with cols=None.
    """

    weight: Tensor | None
    rows: Tensor | None
    cols: Tensor | None


def compute_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def magnitude(w: Tensor, kept: Tensor | None, power: float, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """|w|^l and, if asked for, its derivative in w.

    Args:
        w: (b, r, c, q), with the norm over q.
        kept: bool, like w: entries where it is False count as 0. None: all are kept.
        power: l.
        need_slope: whether to give the derivative.

    Returns:
        The value (b, r, c), and the derivative like w or None. The caller must clear the derivative of entries that are
        not kept.
    """
    if kept is not None:
        w = torch.where(kept, w, torch.zeros_like(w))
    if w.shape[3] == 1:
        a = w.abs().squeeze(3)
        direction = (w > 0).to(w.dtype) - (w < 0).to(w.dtype)
    else:
        a = torch.linalg.vector_norm(w, dim=3)
        direction = w / torch.where(a == 0, torch.ones_like(a), a)[..., None]
    value = a if power == 1 else a.square() if power == 2 else a.pow(power)
    if not need_slope:
        return value, None
    per_norm = direction if power == 1 else direction * (power * (a if power == 2 else a.pow(power - 1)))[..., None]
    return value, per_norm


def poison(points: Tensor) -> Tensor:
    """The points (n, k) with NaN in all coordinates of a point that has one which is not finite, so that the value
    becomes NaN."""
    return torch.where(torch.isfinite(points).all(1, keepdim=True), points, torch.full_like(points, float("nan")))


def penalty_with_grads(
    weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None, what: Penalty,
    need_weight: bool, need_points: bool,
) -> tuple[Tensor, Gradients]:
    """The value and the gradients that are asked for.

    Args:
        weight: (blocks*R, C, *kernel) dense, or (blocks*R, C) torch.sparse_csr, whose pattern is the mask and whose
            gradient has the same pattern.
        rows: (R, k), in the compute dtype.
        cols: (C, k), in the compute dtype. None: the rows' points.
        mask: bool, like a dense weight, or None: entries where it is False cost nothing.
        what: what is to be computed.
        need_weight: whether to give the gradient of the weight.
        need_points: whether to give the gradients of rows and cols.

    Returns:
        The value, 0-d in the compute dtype, and the gradients.
    """
    dtype = compute_dtype(weight)
    x, y = poison(rows), poison(rows if cols is None else cols)
    strips = _CompressedStrips(weight, x) if weight.layout == torch.sparse_csr else _DenseStrips(weight, mask, x)
    value = torch.zeros((), dtype=torch.float64, device=weight.device)
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    step = max(1, TILE // max(1, weight.shape[1] * what.blocks))
    for start in range(0, len(x), step):
        here = slice(start, min(start + step, len(x)))
        w, kept = strips.read(here, what.blocks, dtype)
        s = what.manifold.squared_distance(x[here], y).detach()
        f = what.inhibitor.from_squared(s).detach()
        v, slope = magnitude(w, kept, what.power, need_weight)
        # (b, r, c): a kernel without a kept entry costs nothing, even if f is NaN there.
        any_kept = None if kept is None else kept.any(3)
        term = f * v
        value += (term if kept is None else torch.where(any_kept, term, torch.zeros_like(term))).sum().double()  # pyright: ignore[reportArgumentType, reportCallIssue]
        if need_weight:
            g = what.scale * f[None, :, :, None] * slope  # pyright: ignore[reportOperatorIssue]
            strips.write(here, g if kept is None else torch.where(kept, g, torch.zeros_like(g)))
        if need_points:
            t = what.scale * what.inhibitor.slope(s).detach() * v.sum(0)
            if kept is not None:
                t = torch.where(any_kept.any(0), t, torch.zeros_like(t))  # pyright: ignore[reportOptionalMemberAccess]
            gx, gy = what.manifold.pull_back(x[here], y, t)
            dx[here] = gx
            dy += gy
    value = (what.scale * value).to(dtype)
    drows, dcols = (dx + dy, None) if cols is None else (dx, dy)
    return value, Gradients(strips.gradient() if need_weight else None, drows if need_points else None,
                            dcols if need_points else None)


def proximal_step_(weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None, what: Penalty,
                   step: float) -> None:
    """weight <- argmin_v (1/2) |v - weight|^2 + step * (the penalty of v), in place, for power 1: each kernel w becomes
    w max(1 - step scale f / |w|, 0).

    The arguments are those of penalty_with_grads. Entries that are not kept keep their values.
    """
    dtype = compute_dtype(weight)
    x, y = poison(rows), poison(rows if cols is None else cols)
    strips = _CompressedStrips(weight, x) if weight.layout == torch.sparse_csr else _DenseStrips(weight, mask, x)
    rows_a_strip = max(1, TILE // max(1, weight.shape[1] * what.blocks))
    for start in range(0, len(x), rows_a_strip):
        here = slice(start, min(start + rows_a_strip, len(x)))
        w, kept = strips.read(here, what.blocks, dtype)
        f = what.inhibitor.from_squared(what.manifold.squared_distance(x[here], y)).detach()
        a, direction = magnitude(w, kept, 1.0, True)
        left = a - step * what.scale * f
        shrunk = direction * torch.where((left <= 0) | ((a == 0) & (f == f)), torch.zeros_like(left), left)[..., None]  # pyright: ignore[reportOptionalOperand]
        strips.write(here, shrunk if kept is None else torch.where(kept, shrunk, w))
    new = strips.gradient()
    own, new = (t if t.layout == torch.strided else t.values() for t in (weight, new))
    own.copy_(new)


def penalty_formula(
    weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None, what: Penalty,
) -> Tensor:
    """The penalty of a dense weight as one would write it, with n x n temporaries and gradients by autograd.

    It is for torch.compile where no op serves, for a second derivative, and for tests and benchmarks. The arguments are
    those of penalty_with_grads; returns the value, 0-d in the compute dtype.
    """
    w = weight.to(compute_dtype(weight)).unflatten(0, (what.blocks, -1))
    if mask is not None:
        w = torch.where(mask.unflatten(0, (what.blocks, -1)), w, 0)
    a = w.abs() if w.dim() == 3 else torch.linalg.vector_norm(w.flatten(3), dim=3)
    f = what.inhibitor.from_squared(what.manifold.squared_distance(rows, rows if cols is None else cols))
    return what.scale * (f * (a if what.power == 1 else a.pow(what.power))).sum()


class _DenseStrips:
    """Reads a dense weight strip by strip and collects its gradient (or its new values).

    read: the strip (blocks, rows, C, q) in the given dtype, and its mask. write: sets the strip of the gradient.
    gradient: the whole gradient, like the weight.
    """

    def __init__(self, weight: Tensor, mask: Tensor | None, x: Tensor):
        self.weight, self.mask, self.rows, self.collected = weight, mask, len(x), None

    def _strip(self, tensor: Tensor, here: slice, blocks: int) -> Tensor:
        strip = tensor.reshape(blocks, self.rows, *tensor.shape[1:])[:, here] if self.rows else tensor[None, :0]
        return strip.flatten(3) if strip.dim() > 3 else strip[..., None]

    def read(self, here: slice, blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        kept = None if self.mask is None else self._strip(self.mask, here, blocks)
        return self._strip(self.weight, here, blocks).to(dtype), kept

    def write(self, here: slice, g: Tensor) -> None:
        gradient = self.gradient().view(g.shape[0], self.rows, *self.weight.shape[1:])
        gradient[:, here] = g.reshape(gradient[:, here].shape).to(gradient.dtype)

    def gradient(self) -> Tensor:
        if self.collected is None:
            self.collected = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        return self.collected


class _CompressedStrips:
    """Does the same for torch.sparse_csr: it unpacks a strip, whose pattern is the mask, and packs the gradient."""

    def __init__(self, weight: Tensor, x: Tensor):
        self.shape, self.rows = weight.shape, len(x)
        self.crow, self.col, self.values = weight.crow_indices(), weight.col_indices(), weight.values()
        self.collected = torch.zeros_like(self.values)

    def _entries(self, here: slice, blocks: int):
        """For each block its number, the slice of its stored entries in the strip, and their rows and columns in it."""
        for b in range(blocks):
            crow = self.crow[b * self.rows + here.start:b * self.rows + here.stop + 1]
            stored = slice(int(crow[0]), int(crow[-1]))
            row = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())
            yield b, stored, row, self.col[stored]

    def read(self, here: slice, blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = self.values.new_zeros((blocks, here.stop - here.start, self.shape[1], 1), dtype=dtype)
        kept = torch.zeros_like(w, dtype=torch.bool)
        for b, stored, row, col in self._entries(here, blocks):
            w[b, row, col, 0] = self.values[stored].to(dtype)
            kept[b, row, col, 0] = True
        return w, kept

    def write(self, here: slice, g: Tensor) -> None:
        for b, stored, row, col in self._entries(here, len(g)):
            self.collected[stored] = g[b, row, col, 0].to(self.collected.dtype)

    def gradient(self) -> Tensor:
        # The pattern is the weight's own, so there is nothing to check.
        return torch.sparse_csr_tensor(self.crow, self.col, self.collected, self.shape, check_invariants=False)
