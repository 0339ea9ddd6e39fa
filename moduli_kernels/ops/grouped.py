"""The ops of the penalties of L dense weights at once, which have one manifold, inhibitor, power, device and dtype of
points: their arguments, fake kernels and fallbacks, and declarations. Small weights share their launches on a GPU.

    penalties_with_grads    the sum of the values (0-d), the values (L,), and the gradients of each weight
    penalties_grads         the gradients of each weight times its own factor
    scale_penalties_grads_  multiplies gradients in place, each by the factor of its weight

Gradients of weights, rows and cols are lists of L; contents and dtypes are those of ops/penalty.py. Factors `grad` (L,)
may have any stride.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .penalty import PenaltyArguments, fake_gradients, fake_nothing
from .registry import Op, declare

LAUNCHER = "penalty.grouped"

NEEDS = ("bool[] need_weight", "bool[] need_points")
GRADIENTS = "(Tensor[], Tensor[], Tensor[])"  # of weights, rows and cols
VALUES_AND_GRADIENTS = "(Tensor, Tensor, Tensor[], Tensor[], Tensor[])"

Gradients = tuple[list[Tensor], list[Tensor], list[Tensor]]
ValuesAndGradients = tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]


class GroupedArguments(NamedTuple):
    """What the ops of L weights take: lists of L, and what the weights have in common.

    weights: dense, each as PenaltyArguments.weight.
    rows: the points of the rows of each weight.
    cols: the points of the columns of each weight, None where they are its rows'.
    table: as PenaltyArguments.table, and so are the next five.
    factors: see PenaltyArguments.
    factor_parameters: see PenaltyArguments.
    inhibitor: see PenaltyArguments.
    inhibitor_parameters: see PenaltyArguments.
    power: see PenaltyArguments.
    blocks: the number of gate blocks of each weight.
    scales: what the sum of each weight is multiplied by.
    """

    weights: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor | None]
    table: Tensor | None
    factors: list[int]
    factor_parameters: list[float]
    inhibitor: int
    inhibitor_parameters: list[float]
    power: float
    blocks: list[int]
    scales: list[float]

    def each(self) -> Iterator[PenaltyArguments]:
        """The arguments of the ops of one weight, for each weight in turn."""
        for weight, rows, cols, blocks, scale in zip(self.weights, self.rows, self.cols, self.blocks, self.scales):
            yield PenaltyArguments(
                weight, rows, cols, mask=None, crow_indices=None, col_indices=None, table=self.table,
                factors=self.factors, factor_parameters=self.factor_parameters, inhibitor=self.inhibitor,
                inhibitor_parameters=self.inhibitor_parameters, power=self.power, blocks=blocks, scale=scale)


# --- fallbacks: the ops of one weight, one weight after the other --------------------------------------------------

def _by_kind(gradients: list[tuple[Tensor, Tensor, Tensor]]) -> Gradients:
    """The gradients of all weights, of all rows and of all cols, from those of each weight."""
    return ([weight for weight, _, _ in gradients], [rows for _, rows, _ in gradients],
            [cols for _, _, cols in gradients])


def _penalties_with_grads(a: GroupedArguments, need_weight: list[bool],
                          need_points: list[bool]) -> ValuesAndGradients:
    values, gradients = [], []
    for one, *needs in zip(a.each(), need_weight, need_points):
        value, *its_gradients = torch.ops.moduli_kernels.penalty_with_grads(*one, *needs)
        values.append(value)
        gradients.append(its_gradients)
    stacked = torch.stack(values)
    return stacked.sum(), stacked, *_by_kind(gradients)


def _penalties_grads(grad: Tensor, a: GroupedArguments, need_weight: list[bool], need_points: list[bool]) -> Gradients:
    return _by_kind([torch.ops.moduli_kernels.penalty_grads(factor, *one, *needs)
                     for factor, one, *needs in zip(grad, a.each(), need_weight, need_points)])


def _scale_penalties_grads_(grads: list[Tensor], grad: Tensor, layers: list[int]) -> None:
    for tensor, layer in zip(grads, layers):
        tensor.mul_(grad[layer])


# --- fake kernels --------------------------------------------------------------------------------------------------

def _fake_penalties_grads(grad: Tensor | None, a: GroupedArguments, need_weight: list[bool],
                          need_points: list[bool]) -> Gradients:
    return _by_kind([fake_gradients(*layer) for layer in zip(a.weights, a.rows, a.cols, need_weight, need_points)])


def _fake_penalties_with_grads(a: GroupedArguments, need_weight: list[bool],
                               need_points: list[bool]) -> ValuesAndGradients:
    first = a.rows[0]
    return (first.new_empty(()), first.new_empty(len(a.weights)),
            *_fake_penalties_grads(None, a, need_weight, need_points))


# --- declarations --------------------------------------------------------------------------------------------------

PENALTIES_WITH_GRADS = declare(Op(
    "penalties_with_grads", (GroupedArguments, *NEEDS), VALUES_AND_GRADIENTS,
    fallback=_penalties_with_grads, fake=_fake_penalties_with_grads, launcher=LAUNCHER))

PENALTIES_GRADS = declare(Op(
    "penalties_grads", ("Tensor grad", GroupedArguments, *NEEDS), GRADIENTS,
    fallback=_penalties_grads, fake=_fake_penalties_grads, launcher=LAUNCHER))

# layers: for each of grads the weight that it belongs to, as a place in grad.
SCALE_PENALTIES_GRADS_ = declare(Op(
    "scale_penalties_grads_", ("Tensor[] grads", "Tensor grad", "int[] layers"), "()",
    fallback=_scale_penalties_grads_, fake=fake_nothing, launcher=LAUNCHER, mutates="grads"))
