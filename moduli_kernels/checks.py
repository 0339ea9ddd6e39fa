"""Every user-facing error of the package's core, in one place.

Each message names the argument, what was expected, what came and what to do. Checks never synchronize with a
GPU unless they look at values the user hands over once (points of an embedding).
"""
from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum")


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def positive(name: str, value: float) -> float:
    """A positive finite number, as float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a positive finite number, got {_kind(value)}; pass a float such as 5.0.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}; pass a float such as 5.0.")
    return float(value)


def finite(name: str, value: float) -> float:
    """A finite number, as float."""
    if torch.compiler.is_compiling():  # a strength that changes is symbolic there: checked when it was set
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a finite number, got {_kind(value)}; pass a float such as 0.1.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}; pass a float such as 0.1.")
    return float(value)


def positive_int(name: str, value: int, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {_kind(value)}; pass an int.")
    if value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value}; pass a larger one.")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {_kind(value)}; pick one of them.")
    return value


def ordered_sigmas(sigma1: float, sigma2: float) -> None:
    if not sigma1 < sigma2:
        raise ValueError(
            f"sigma1 must be smaller than sigma2 (narrow minus wide Gaussian), got sigma1={sigma1!r} and "
            f"sigma2={sigma2!r}; swap them or widen sigma2."
        )


def power(value: float) -> float:
    """The exponent l >= 1 of |w|^l."""
    value = finite("power", value)
    if value < 1:
        raise ValueError(
            f"power must be at least 1 (|w|^l is not differentiable at 0 below that), got {value!r}; "
            "use power=1.0 for sparsity or power=2.0 for decay."
        )
    return value


def table_values(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "f must be finite on [0, max_distance], got NaN or infinity in its samples; choose a smaller "
            "max_distance or an inhibitor without a pole."
        )


# --- points ----------------------------------------------------------------------------------------------------

def distance_arguments(manifold: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """x (n, c) and y (m, c) as a manifold's distances take them."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor of points, got {_kind(value)}; pass torch.as_tensor(...).")
        if value.dim() != 2 or value.shape[1] != manifold.ambient_dim:
            raise ValueError(
                f"{name} must have shape (points, {manifold.ambient_dim}) for {manifold}, got "
                f"{tuple(value.shape)}; give one row a point."
            )
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be floating point, got {value.dtype}; convert it with .float().")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}; move one with .to().")


def embedding_points(points: torch.Tensor, n: int, manifold: Any) -> None:
    """Points a user gives to ManifoldEmbedding; reads their values once."""
    if not isinstance(points, torch.Tensor):
        raise TypeError(f"points must be a tensor, got {_kind(points)}; pass torch.as_tensor(points).")
    if tuple(points.shape) != (n, manifold.ambient_dim):
        raise ValueError(
            f"points must have shape ({n}, {manifold.ambient_dim}) for n={n} on {manifold}, got "
            f"{tuple(points.shape)}; give one row a neuron."
        )
    if points.dtype not in FLOATING:
        raise TypeError(f"points must be floating point, got {points.dtype}; convert them with .float().")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points must be finite, got NaN or infinity among them; clean the rows first.")
    manifold.check_points(points)


def zero_vectors(points: torch.Tensor, manifold: Any) -> None:
    """points (n, c): columns of one sphere; the origin has no direction to normalize, nor has, in its dtype, a vector
    whose length rounds to 0 or overflows."""
    norm = points.norm(dim=1)
    zero = ((norm == 0) | norm.isinf()).nonzero()
    if len(zero):
        raise ValueError(
            f"points must not hold a zero vector on {manifold} (it cannot be normalized), got one at row "
            f"{int(zero[0])}; give every row a direction."
        )


# --- weights ---------------------------------------------------------------------------------------------------

def _points_argument(name: str, points: torch.Tensor, manifold: Any, weight: torch.Tensor) -> None:
    if not isinstance(points, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor of points, got {_kind(points)}; pass embedding.points or a tensor (n, "
            f"{manifold.ambient_dim})."
        )
    if points.dim() != 2 or points.shape[1] != manifold.ambient_dim:
        raise ValueError(
            f"{name} must have shape (n, {manifold.ambient_dim}) for {manifold}, got {tuple(points.shape)}; "
            "give one row a neuron."
        )
    if points.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point, got {points.dtype}; convert it with .float().")
    if points.device != weight.device:
        raise ValueError(
            f"{name} must be on the weight's device {weight.device}, got {points.device}; move it (or the "
            f"regularizer) with .to({str(weight.device)!r})."
        )


def weight_tensor(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {_kind(weight)}; pass the module's parameter.")
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"weight must be float32, float64, bfloat16 or float16, got {weight.dtype}; convert it with .float()."
        )
    if weight.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(
            f"weight must be dense or torch.sparse_csr, got {weight.layout}; convert it with .to_sparse_csr()."
        )
    if weight.layout == torch.sparse_csr and weight.dim() != 2:
        raise ValueError(
            f"weight must have 2 dimensions as torch.sparse_csr, got shape {tuple(weight.shape)}; pass one matrix at a "
            "time."
        )
    if weight.dim() < 2:
        raise ValueError(
            f"weight must have at least 2 dimensions (rows, columns, *kernel), got shape {tuple(weight.shape)}; "
            "the penalty is defined on matrices."
        )


def penalty_arguments(
    weight: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor | None, manifold: Any, blocks: int,
    mask: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and devices of `moduli_penalty`'s tensors."""
    weight_tensor(weight)
    positive_int("blocks", blocks)
    _points_argument("rows", rows, manifold, weight)
    if cols is not None:
        _points_argument("cols", cols, manifold, weight)
    columns = rows.shape[0] if cols is None else cols.shape[0]
    if weight.shape[0] != blocks * rows.shape[0] or weight.shape[1] != columns:
        per_block = f"{blocks} x {rows.shape[0]}" if blocks > 1 else f"{rows.shape[0]}"
        same = " (cols=None: the row points)" if cols is None else ""
        raise ValueError(
            f"weight must have shape ({per_block}, {columns}, *kernel) to fit rows {tuple(rows.shape)} and "
            f"{columns} column points{same}, got {tuple(weight.shape)}; give rows one point a row"
            f"{' of one block' if blocks > 1 else ''} and cols one point a column."
        )
    if mask is None:
        return
    if weight.layout != torch.strided:
        raise ValueError(
            "mask must be None for a torch.sparse_csr weight (its pattern is the mask), got a tensor; drop it."
        )
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else _kind(mask)
        raise TypeError(f"mask must be a bool tensor, got {got}; convert it with .bool().")
    if mask.shape != weight.shape:
        raise ValueError(
            f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}; build it with "
            "torch.ones_like(weight, dtype=torch.bool)."
        )
    if mask.device != weight.device:
        raise ValueError(
            f"mask must be on the weight's device {weight.device}, got {mask.device}; move it with .to()."
        )


def coefficient_arguments(weight: torch.Tensor, coefficients: torch.Tensor) -> None:
    """`CoefficientRegularizer`: one coefficient a (row, column) pair, or one for all."""
    weight_tensor(weight)
    if coefficients.dim() and tuple(coefficients.shape) != tuple(weight.shape[:2]):
        raise ValueError(
            f"weight must have shape {tuple(coefficients.shape)} + kernel to fit the coefficients, got "
            f"{tuple(weight.shape)}; build the coefficients for this weight."
        )
    if coefficients.device != weight.device:
        raise ValueError(
            f"weight must be on the coefficients' device {coefficients.device}, got {weight.device}; move the "
            f"regularizer with .to({str(weight.device)!r})."
        )


def coefficient_tensor(coefficients: torch.Tensor) -> None:
    if not isinstance(coefficients, torch.Tensor):
        raise TypeError(f"coefficients must be a tensor, got {_kind(coefficients)}; pass torch.as_tensor(...).")
    if coefficients.dtype not in FLOATING:
        raise TypeError(f"coefficients must be floating point, got {coefficients.dtype}; convert them with .float().")
    if coefficients.dim() not in (0, 2):
        raise ValueError(
            f"coefficients must have shape (rows, columns), or () for one everywhere, got "
            f"{tuple(coefficients.shape)}; reshape them."
        )


# --- regularizers ----------------------------------------------------------------------------------------------

def embedding_size(name: str, n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
        raise TypeError(
            f"{name} must be a number of neurons or a ManifoldEmbedding, got {_kind(n)}; pass for example 128."
        )
    positive_int(name, n, minimum=0)


def embedding_manifold(name: str, got: Any, manifold: Any) -> None:
    if got != manifold:
        raise ValueError(
            f"{name} must be an embedding in the regularizer's manifold {manifold}, got one in {got}; pass "
            f"manifold={got}."
        )


def warn_untrainable(inhibitor: Any) -> None:
    if not inhibitor.trainable:
        warnings.warn(
            f"inhibitor should not be monotone where points are trained, got {inhibitor}: every neuron is drawn to "
            "one point (or none moves) and the penalty becomes plain L_l; use DifferenceOfGaussians, Sinusoid or "
            "RickerWavelet, or frozen points.",
            UserWarning, stacklevel=3,
        )


def saved_setting(name: str, saved: Any, mine: Any) -> None:
    if saved != mine:
        raise ValueError(
            f"{name} of the saved regularizer must equal this one's {mine!r}, got {saved!r}; build the regularizer "
            "with the saved setting."
        )


# --- regularize ------------------------------------------------------------------------------------------------

def no_target(model: Any) -> None:
    raise ValueError(
        f"model must hold a recurrent weight (weight_hh_l* of RNN, GRU, LSTM or weight_hh of a cell), found none in "
        f"{type(model).__name__}; name the weights: targets=[(module, \"weight\")]."
    )


def no_projection(module: Any) -> None:
    if getattr(module, "proj_size", 0):
        raise ValueError(
            f"model must not hold an LSTM with proj_size (its weight_hh joins {module.hidden_size} neurons to "
            f"{module.proj_size} projections), got proj_size={module.proj_size}; use proj_size=0 or targets= with "
            "row and column embeddings of your own."
        )


def no_module(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {_kind(model)}; pass the model, and single weights as targets=.")


def no_pair(target: Any) -> None:
    raise TypeError(
        f"targets must hold (module, name) pairs or mk.Target, got {_kind(target)}; pass for example "
        "targets=[(module, \"weight\")]."
    )


def target_weight(module: Any, name: str) -> torch.Tensor:
    """The weight a target names; errors where there is none."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"targets must hold (module, name) pairs or mk.Target, got {_kind(module)} as module; pass the nn.Module.")
    weight = getattr(module, name, None) if isinstance(name, str) else None
    if not isinstance(weight, torch.Tensor):
        known = ", ".join(repr(n) for n, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(
            f"targets must name a weight of {type(module).__name__}, got {name!r}; its parameters are {known}."
        )
    weight_tensor(weight)
    return weight


def target_blocks(name: str, rows: int, blocks: int) -> None:
    positive_int("blocks", blocks)
    if rows % blocks:
        raise ValueError(f"blocks must divide the {rows} rows of {name}, got {blocks}; LSTM has 4, GRU 3.")


def target_columns(name: str, columns: Any) -> None:
    if columns is not None and (not isinstance(columns, slice) or columns.step not in (None, 1)):
        raise TypeError(
            f"columns of target {name!r} must be None or a slice with step 1, got {columns!r}; pass for example "
            "slice(2, None)."
        )
