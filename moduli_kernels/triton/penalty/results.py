"""Memory for what the ops of one weight return."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.penalty import PenaltyArguments


class Results(NamedTuple):
    """The value and the gradients; None where not asked for.

    value: 0-d
    weight: like the weight, contiguous
    rows, cols: like the points; cols is None too where rows and columns share their points
    """

    value: Tensor | None
    weight: Tensor | None
    rows: Tensor | None
    cols: Tensor | None


def results_for(a: PenaltyArguments, need_value: bool, need_weight: bool, need_points: bool,
                into: Tensor | None) -> Results:
    """Memory for what is asked for, `into` for dW where it is given. If the weight has no entries, value and gradients
    of the points are 0 already."""
    dweight = into
    if need_weight and into is None:
        dweight = torch.empty_like(a.weight, memory_format=torch.contiguous_format)
    results = Results(a.rows.new_empty(()) if need_value else None, dweight,
                      torch.empty_like(a.rows) if need_points else None,
                      torch.empty_like(a.cols) if need_points and a.cols is not None else None)
    if a.weight.numel() == 0:
        for tensor in (results.value, results.rows, results.cols):
            if tensor is not None:
                tensor.zero_()
    return results


def gradients_of(a: PenaltyArguments, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as the ops return them: those not asked for have no elements."""
    return (a.weight.new_empty(0) if results.weight is None else results.weight,
            a.rows.new_empty(0) if results.rows is None else results.rows,
            a.rows.new_empty(0) if results.cols is None else results.cols)
