"""Launches the steps of the masked RNN, forward or backward: all of them at once on a GPU. Nothing is copied to or read
from the device, so CUDA graphs can capture it."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device import device_of, numbers_for, on_device
from .shares import Shares, registers_for


class Layout(NamedTuple):
    """Where the states of a step stand.

    n, batch: rows, and elements of the batch
    stride_row, stride_batch: numbers from one to the next
    vector: divides batch, n * batch and stride_row
    """

    n: int
    batch: int
    stride_row: int
    stride_batch: int
    vector: int = 1


def launch_steps(kernel, tensors: tuple, x: Tensor, shares: Shares, layout: Layout, steps: int, last: int, leak: float,
                 **constants) -> None:
    """Launches forward_kernel or backward_kernel for steps [0, last) of a sequence of `steps`.

    In Triton's interpreter programs cannot wait for each other: there each step is a launch, unless one program has
    all rows. tensors: the kernel's, up to the counters; x: one of them; constants: the kernel's own.
    """
    device, vector, size = device_of(x), layout.vector, layout.n * layout.batch
    at_once = 1 if device.interpreted and shares.strips > 1 else last
    barrier = not device.interpreted and shares.way != "alone"
    with on_device(x):
        counters = torch.zeros(shares.parts, dtype=torch.int32, device=x.device) if barrier else None
        for begin in range(0, last, at_once):
            kernel[(shares.strips, shares.parts)](
                *tensors, counters,
                layout.n, layout.batch // vector, shares.tiles, size // vector,
                layout.stride_row // vector, layout.stride_batch,
                begin, begin + at_once, steps,
                leak, 1 - leak,
                WAY=shares.way, **constants,
                ROWS=shares.rows, BATCH=shares.batch, DEPTH=shares.depth, MORE=shares.more, SPLIT=shares.split,
                ENTRIES=shares.entries, VECTOR=vector, **numbers_for(x)._asdict(), BARRIER=barrier,
                num_warps=shares.warps, num_stages=shares.stages, launch_cooperative_grid=barrier,
                maxnreg=registers_for(shares.warps), enable_fp_fusion=True)
