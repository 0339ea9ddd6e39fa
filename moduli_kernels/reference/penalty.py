"""The specification: the penalty and its gradients by hand, in plain PyTorch, tiled.

    R = scale * sum_{b,i,j} f(d(x_i, y_j)) |w_bij|^l          (paper, eq. 6; |.| the L2 norm over kernel dimensions)
    dR/dw_bij = scale f l |w|^(l-1) w/|w|                      (0 at w = 0 for l = 1)
    dR/dx_i = scale sum_j f'(s_ij) (sum_b |w_bij|^l) ds_ij/dx_i

Strips of rows keep the temporaries at about TILE entries: nothing n x n x k, nor a second n x n, is made. Every
kernel is held against this file, and it is the fallback where none is built.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.inhibitors import Inhibitor
from ..geometry.manifolds import Manifold

TILE = 1 << 18


class Penalty(NamedTuple):
    """What is computed, the tensors aside."""

    manifold: Manifold
    inhibitor: Inhibitor
    power: float
    blocks: int
    scale: float | Tensor  # a 0-d tensor where a gradient is folded in


class Gradients(NamedTuple):
    """weight: like weight. rows: like rows; with cols=None it holds the columns' part too, and cols is None."""

    weight: Tensor | None
    rows: Tensor | None
    cols: Tensor | None


def compute_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def magnitude(w: Tensor, kept: Tensor | None, power: float, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """|w|^l and its derivative in w. w (b, r, c, q), norm over q; the value is (b, r, c), the slope like w
    (of entries that are not kept it is left to the caller)."""
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
    """A point with a non-finite coordinate becomes NaN in all of them, so that it reaches the value."""
    return torch.where(torch.isfinite(points).all(1, keepdim=True), points, torch.full_like(points, float("nan")))


def penalty_with_grads(
    weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None, what: Penalty,
    need_weight: bool, need_points: bool,
) -> tuple[Tensor, Gradients]:
    """Value (0-d, compute dtype) and the gradients asked for.

    weight: (blocks*R, C, *kernel) dense, or (blocks*R, C) torch.sparse_csr, whose pattern is the mask and whose
    gradient has the same pattern; rows (R, k), cols (C, k) or None in the compute dtype; mask like weight or None.
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
        any_kept = None if kept is None else kept.any(3)  # (b, r, c): an entry masked whole costs nothing, NaN f or not
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
    w max(1 - step scale f / |w|, 0). Arguments as penalty_with_grads; entries that are not kept stay as they are."""
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
    """The formula as one would write it, by autograd, with n x n temporaries: for torch.compile where no op serves,
    for tests and benchmarks. Dense weights only."""
    w = weight.to(compute_dtype(weight)).unflatten(0, (what.blocks, -1))
    if mask is not None:
        w = torch.where(mask.unflatten(0, (what.blocks, -1)), w, 0)
    a = w.abs() if w.dim() == 3 else torch.linalg.vector_norm(w.flatten(3), dim=3)
    f = what.inhibitor.from_squared(what.manifold.squared_distance(rows, rows if cols is None else cols))
    return what.scale * (f * (a if what.power == 1 else a.pow(what.power))).sum()


class _DenseStrips:
    """Reads strips of a dense weight as (blocks, rows, C, q) and collects the gradient."""

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
    """The same for torch.sparse_csr: a strip is unpacked with its pattern as the mask, the gradient packed again."""

    def __init__(self, weight: Tensor, x: Tensor):
        self.shape, self.rows = weight.shape, len(x)
        self.crow, self.col, self.values = weight.crow_indices(), weight.col_indices(), weight.values()
        self.collected = torch.zeros_like(self.values)

    def _entries(self, here: slice, blocks: int):
        """Of each block: the slice of stored entries, and the (row in the strip, column) of each."""
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
        return torch.sparse_csr_tensor(self.crow, self.col, self.collected, self.shape,
                                       check_invariants=False)  # the weight's own pattern
