"""Gradients of which no derivative exists: one is refused in words, and only where somebody asks for it."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def only_once(grads: list[Tensor | None], refuse: Callable[[], None], *sources: Tensor) -> list[Tensor | None]:
    """What a backward pass with create_graph=True returns. sources: what the gradients depend on; refuse: raises."""
    return [None if grad is None else _Once.apply(refuse, grad, *sources) for grad in grads]


class _Once(torch.autograd.Function):
    """Hands the gradient through; a derivative of it is refused."""

    @staticmethod
    def forward(ctx, refuse, gradient, *sources):
        ctx.refuse = refuse
        return gradient.view_as(gradient) if gradient.layout == torch.strided else gradient.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.refuse()
