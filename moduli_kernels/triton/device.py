"""What the launchers ask about the GPU they launch on. PyTorch knows all of it, so nothing here waits for the GPU."""
from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import runtime

if runtime.triton_interpreted:
    from . import interpreted  # noqa: F401 - repairs the interpreter


class Device(NamedTuple):
    """A GPU, or the one that Triton's interpreter stands in for.

    generation: the major compute capability
    multiprocessors: how many it has
    shared: bytes of shared memory that one program may use
    interpreted: whether the interpreter runs the kernels on the CPU, one program after the other
    """

    generation: int
    multiprocessors: int
    shared: int
    interpreted: bool = False


# CPU tensors get here in the interpreter alone. Its launches are those of an H100, so that tests see what a GPU would.
INTERPRETED = Device(9, 132, 227 * 1024, interpreted=True)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Numbers(NamedTuple):
    """How tensor cores multiply: constants of the kernels, under their names.

    DOT: the type of the factors
    PRECISION: what `tl.dot` does with factors of 4 bytes
    """

    DOT: tl.dtype
    PRECISION: str


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of x the current one, since Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def device_of(x: Tensor) -> Device:
    if not x.is_cuda:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(x.device)
    return Device(properties.major, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def numbers_for(x: Tensor) -> Numbers:
    """How to multiply numbers of x's type (float32, bfloat16 or float16).

    float32 follows torch.backends.cudnn.rnn.fp32_precision, which governs torch.nn.RNN: one product in tf32 by
    default, else three of them, which are about as exact as float32.
    """
    exact = x.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32"
    # the interpreter would multiply 16-bit numbers as the integers that have their bits
    return Numbers(tl.float32 if device_of(x).interpreted else TYPES[x.dtype], "tf32x3" if exact else "tf32")


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes that the kernels read."""
    return None if mask is None else mask.view(torch.uint8)
