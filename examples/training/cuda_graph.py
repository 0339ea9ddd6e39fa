"""A training step as a CUDA graph: the host then launches one graph instead of some hundred kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EAGER_STEPS = 3  # before the capture, for lazy initializations and the optimizer's state


class GraphedStep:
    """Wraps `step(batch) -> tensor`. The first EAGER_STEPS batches take the plain step; then the step is captured, and
    that batch and all later ones replay the graph.

    A batch is a named tuple of CUDA tensors, always of the same shapes. Whatever the host decides in the step (which
    masks it reads, the learning rate) stays as it was at the capture, so make a new GraphedStep when that changes. The
    optimizer must be capturable.
    """

    def __init__(self, step: Callable[[Any], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._step, self._optimizer = step, optimizer
        self._eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Any = None
        self._result: Tensor | None = None

    def __call__(self, batch: Any) -> Tensor:
        if self._graph is None:
            if self._eager < EAGER_STEPS:
                self._eager += 1
                side = torch.cuda.Stream()  # torch asks for a side stream to warm up before a capture
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    result = self._step(batch)
                torch.cuda.current_stream().wait_stream(side)
                return result
            self._batch = type(batch)(*(tensor.clone() for tensor in batch))
            self._optimizer.zero_grad(set_to_none=True)  # so that the gradients are made in the graph's memory
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._step(self._batch)
        for held, new in zip(self._batch, batch):
            held.copy_(new)
        self._graph.replay()
        return self._result.clone()  # the next replay overwrites it
