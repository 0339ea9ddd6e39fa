"""Gradients that have no derivative of their own: asking for one is an error in plain words."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def only_once(grads: Sequence[Tensor | None], refuse: Callable[[], None], *sources: Tensor) -> list[Tensor | None]:
    """The gradients for a backward pass with create_graph=True, which call `refuse` when they are differentiated.

    Nothing is refused while only other parts of the loss are differentiated twice.

    Args:
        grads: what the backward pass has computed.
        refuse: raises the error.
        sources: the tensors that the gradients depend on.
    """
    return [None if grad is None else _Once.apply(refuse, grad, *sources) for grad in grads]


class _Once(torch.autograd.Function):
    """Hands a gradient through unchanged; its backward refuses."""

    @staticmethod
    def forward(ctx: Any, refuse: Callable[[], None], gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.refuse = refuse
        return gradient.view_as(gradient) if gradient.layout == torch.strided else gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        ctx.refuse()
