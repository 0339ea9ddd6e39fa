"""The modules for training loops: ModuliRegularizer, and CoefficientRegularizer for any coefficients of one's own."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_int
from ..distributed import is_sharded, shard_of, sum_over_ranks
from ..geometry.base import Inhibitor, Manifold
from ..geometry.embedding import ManifoldEmbedding
from ..geometry.inhibitors import inhibitor as resolve_inhibitor
from ..geometry.presets import manifold as resolve_manifold
from . import checks, state
from .function import moduli_penalty, scale_of


class Regularizer(nn.Module):
    """What the regularizers have in common: a strength that may change at any time, and settings in the state dict.

    A subclass sets `strength` in its constructor.
    """

    _strength: float

    @property
    def strength(self) -> float:
        """lambda, at least 0 and finite. It may be set at any time: a compiled step is compiled once more at the first
        change, and serves all values from then on. It is part of the state dict."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = checks.strength(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what releases pickled in which the strength was a plain attribute, too."""
        super().__setstate__(state)
        if "strength" in self.__dict__:
            self.strength = self.__dict__.pop("strength")

    def _settings(self) -> dict[str, Any]:
        """The settings that a state dict holds, other than the strength: a state dict must have the same ones."""
        return {}

    def get_extra_state(self) -> Tensor:
        """The settings and the strength as JSON in uint8: a tensor, so that safetensors can hold it."""
        return state.packed({**self._settings(), "strength": self.strength})

    def set_extra_state(self, state_tensor: Tensor) -> None:
        """Takes the strength of a saved state, after comparing its settings with this regularizer's.

        Raises:
            ValueError: one of the settings differs.
        """
        saved = state.unpacked(state_tensor)
        for name, value in self._settings().items():
            if name in saved and not state.same_setting(saved[name], value):
                checks.saved_setting(name, saved[name], value)
        if "strength" in saved:  # a state that was saved without one leaves it
            self.strength = saved["strength"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)
        key = f"{prefix}_extra_state"
        if key in missing_keys:  # a release that did not save it yet
            missing_keys.remove(key)


class ModuliRegularizer(Regularizer):
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
        strength: lambda, at least 0 and finite. The attribute may be set at any time, in a compiled step too.
        trainable: whether the points that are made here are trained. Given embeddings stay as they are.
        generator: makes the points reproducible. Like dtype and device, it is for points that are made here.
        dtype: the dtype of the points. None: torch's default.
        device: the device of the points. None: the generator's, else torch's default.

    The state dict holds the points, the strength, and the manifold, inhibitor, power and reduction that they were used
    with. Loading it takes the strength over; loading it into a regularizer that differs in the other settings raises
    ValueError. Points that rows and columns share are saved once, so that safetensors' save_file takes the state dict.

    Raises:
        ValueError: an unknown preset or reduction, power < 1, blocks < 1, rows or cols < 0, a strength that is negative
            or not finite, or an embedding in another manifold.
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
        self.blocks = int(positive_int("blocks", blocks))
        self.reduction = one_of("reduction", reduction, checks.REDUCTIONS)

        def embed(name: str, n: int | ManifoldEmbedding) -> ManifoldEmbedding:
            if isinstance(n, ManifoldEmbedding):
                checks.embedding_manifold(name, n.manifold, self.manifold)
                return n
            checks.embedding_size(name, n)
            return ManifoldEmbedding(n, self.manifold, trainable=trainable, generator=generator, dtype=dtype,
                                     device=device)

        self.rows = embed("rows", rows)
        if cols is not None and cols is not self.rows:  # shared points are one submodule, and are saved once
            self.cols = embed("cols", cols)  # pyright: ignore[reportAttributeAccessIssue]
        self.strength = strength
        if self.rows.trainable or self.cols.trainable:
            checks.warn_untrainable(self.inhibitor)

    @property
    def cols(self) -> ManifoldEmbedding:
        """The embedding of the columns; `rows` itself where rows and columns are the same neurons."""
        return self._modules.get("cols", self.rows)  # pyright: ignore[reportReturnType]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the points again, in place, as the constructor did: those of the rows, then those of the columns.

        So a regularizer that was made on the meta device is initialized after `to_empty`; before, its points and
        penalties are NaN. See `ManifoldEmbedding.reset_parameters`.

        Args:
            generator: makes the points reproducible. None: torch's own. The constructor's generator is not kept.
        """
        self.rows.reset_parameters(generator)
        if self.cols is not self.rows:
            self.cols.reset_parameters(generator)

    def forward(self, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """The penalty of the weight, 0-d. Shapes, dtypes and errors are those of `moduli_penalty`.

        Args:
            weight: (blocks*R, C), or (blocks*R, C, *kernel).
            mask: bool, in the weight's shape: entries where it is False cost nothing.
        """
        return self.penalty(weight, self.strength, mask)

    def penalty(self, weight: Tensor, strength: float, mask: Tensor | None = None) -> Tensor:
        """`forward` with another strength."""
        return moduli_penalty(
            weight, self.rows.points, None if self.cols is self.rows else self.cols.points, manifold=self.manifold,
            inhibitor=self.inhibitor, power=self.power, blocks=self.blocks, mask=mask, reduction=self.reduction,
            strength=strength,
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

    def _settings(self) -> dict[str, Any]:
        return {"manifold": state.described(self.manifold), "inhibitor": state.described(self.inhibitor),
                "power": self.power, "reduction": self.reduction}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Accepts states that were saved while shared points stood in them twice, under rows and under cols."""
        own, again = f"{prefix}rows.points", f"{prefix}cols.points"
        if self.cols is self.rows and again in state_dict:
            checks.saved_columns(again, state_dict.get(own), state_dict.pop(again), arguments[-1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        shared = ", cols=rows" if self.cols is self.rows else ""
        return (f"{self.manifold}, {self.inhibitor}, power={self.power}, blocks={self.blocks}, "
                f"reduction={self.reduction!r}, strength={self.strength}{shared}")


class CoefficientRegularizer(Regularizer):
    """strength * sum or mean over entries of coefficients_ij |w_ij|^power, with any coefficients (paper, eq. 5).

    |w| is the L2 norm over the weight's kernel dimensions. It is computed in plain PyTorch, with gradients by autograd.
    A DTensor that fully_shard has cut into rows is treated as by `moduli_penalty`.

    Args:
        coefficients: (R, C), or 0-d for one coefficient everywhere; floating point, copied into a buffer.
        power: l, at least 1.
        reduction: "mean" over entries, or "sum" (eq. 5).
        strength: lambda, at least 0 and finite. The attribute may be set at any time, and is part of the state dict.

    Loading a state dict takes coefficients and strength over; one of another power or reduction raises ValueError.

    Coefficients that are made on the meta device are NaN after `to_empty`, until a state dict is loaded.

    Raises:
        ValueError: coefficients of another shape, power < 1, an unknown reduction, or a strength that is negative or
            not finite.
        TypeError: coefficients are no floating-point tensor; power or strength is no number.
    """

    coefficients: Tensor

    def __init__(self, coefficients: Tensor, power: float = 1.0, reduction: str = "mean", strength: float = 1.0):
        super().__init__()
        checks.coefficient_tensor(coefficients)
        self.power = checks.power(power)
        self.reduction = one_of("reduction", reduction, checks.REDUCTIONS)
        self.register_buffer("coefficients", coefficients.detach().clone(memory_format=torch.contiguous_format))
        self.strength = strength

    def _settings(self) -> dict[str, Any]:
        return {"power": self.power, "reduction": self.reduction}

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **settings: Any) -> CoefficientRegularizer:
        was_meta = self.coefficients.is_meta
        super()._apply(fn, *arguments, **settings)
        if was_meta and not self.coefficients.is_meta:  # to_empty: what is there now is no coefficient
            self.coefficients.fill_(torch.nan)
        return self

    def forward(self, weight: Tensor) -> Tensor:
        """The penalty of the weight, 0-d: float64 for float64 weights, else float32.

        Args:
            weight: (R, C), or (R, C, *kernel), on the coefficients' device; any such shape for a 0-d coefficient.

        Raises:
            ValueError, TypeError: the weight does not fit; the message says how.
            NotImplementedError: the weight is a DTensor that is not cut into rows.
        """
        return self.penalty(weight, self.strength)

    def penalty(self, weight: Tensor, strength: float) -> Tensor:
        """`forward` with another strength."""
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
        return sum_over_ranks(cost.sum(), group) * scale * strength  # in this order: see moduli_penalty

    def extra_repr(self) -> str:
        return (f"coefficients={tuple(self.coefficients.shape)}, power={self.power}, reduction={self.reduction!r}, "
                f"strength={self.strength}")


