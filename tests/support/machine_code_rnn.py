"""Compiles the Triton kernels of the masked RNN as the launchers would, without a GPU: see machine_code.py."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from moduli_kernels.ops import blocked_rnn as blocked_rnn_op
from moduli_kernels.ops.block_layout import lay_out_blocks
from moduli_kernels.triton import device
from moduli_kernels.triton.device import Device
from moduli_kernels.triton.rnn import blocked, masked, sampled, sequence_product
from tests.support import machine_code as code

MODULES = (masked, blocked, sampled, sequence_product)  # those that launch kernels, or name them
# a GPU for each architecture: A100, RTX 3090, H100, B200, RTX 5090
DEVICES = {80: Device(8, 108, 163 * 1024), 86: Device(8, 82, 99 * 1024), 90: Device(9, 132, 227 * 1024),
           100: Device(10, 148, 227 * 1024), 120: Device(12, 170, 99 * 1024)}


class Compiled(NamedTuple):
    launch: code.Launch
    usage: dict[str, int]
    shared: int  # bytes of shared memory
    cubin: bytes


def record(call: Callable[[], Any], architecture: int, precision: str = "tf32") -> list[code.Launch]:
    """What `call` launches on such a GPU; nothing runs."""
    launches: list[code.Launch] = []
    rnn, before = torch.backends.cudnn.rnn, torch.backends.cudnn.rnn.fp32_precision
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, rnn, "fp32_precision", before)
        rnn.fp32_precision = precision
        stack.enter_context(mock.patch.object(device, "INTERPRETED", DEVICES[architecture]))
        for module in MODULES:
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel") and isinstance(kernel, triton.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, code.Recorder(kernel, launches)))
        call()
    return launches


def compiled(launch: code.Launch, architecture: int) -> Compiled:
    result = triton.compile(code.source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options)
    cubin = result.asm["cubin"]
    return Compiled(launch, code.usage(cubin), result.metadata.shared, cubin)


def train(n: int, batch: int, steps: int = 50, inputs: int | None = None, dtype: torch.dtype = torch.float32,
          with_masks: bool = True, leak: float = 1.0, lengths: bool = False, reverse: bool = False) -> None:
    """Forward and all gradients of an uninitialized layer."""
    inputs = inputs or n
    x, h, output = (torch.empty(size, dtype=dtype) for size in ((steps, batch, inputs), (batch, n), (steps, batch, n)))
    weights = [torch.empty(size, dtype=dtype) for size in ((n, inputs), (n, n))]
    biases = [torch.empty(n, dtype=dtype) for _ in range(2)]
    masks = [torch.empty(w.shape, dtype=torch.bool) if with_masks else None for w in weights]
    length = torch.empty(batch, dtype=torch.int64) if lengths else None
    step = ("tanh", leak, reverse)
    masked.masked_rnn(x, h, *weights, *biases, *masks, None, None, None, None, length, None, None, *step, True)
    masked.masked_rnn_grads(output, h, x, h, *weights, *masks, length, None, None, output, output, *step, *[True] * 5)


def train_blocked(n: int, batch: int, side: int, share: float, density: float, steps: int = 50, inputs: int = 16,
                  dtype: torch.dtype = torch.float32, leak: float = 1.0) -> None:
    """The same over a mask that keeps a share of the blocks, and single entries at a density."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(-(-n // side), -(-n // side), generator=generator) < share
    mask = whole.repeat_interleave(side, 0).repeat_interleave(side, 1)[:n, :n].clone()
    mask |= torch.rand(n, n, generator=generator) < density
    layout = blocked_rnn_op.flat(lay_out_blocks(mask, side=side, threshold=side * side // 4))
    x, h, output = (torch.empty(size, dtype=dtype) for size in ((steps, batch, inputs), (batch, n), (steps, batch, n)))
    w_ih, w_hh, bias = (torch.empty(size, dtype=dtype) for size in ((n, inputs), (n, n), (n,)))
    step = ("tanh", leak, False)
    *_, states, s = blocked.blocked_rnn(x, h, w_ih, w_hh, bias, bias, None, mask, layout, side, None, *step,
                                             True)
    blocked.blocked_rnn_grads(output, h, x, h, w_ih, w_hh, None, mask, layout, side, None, states, s, *step,
                                    *[True] * 5)


def instructions(cubin: bytes) -> list[str]:
    """Instructions with their predicates, in the order of their addresses."""
    return [predicate + text for _, predicate, text in code.instructions(cubin)]
