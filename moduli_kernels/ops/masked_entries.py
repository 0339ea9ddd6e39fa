"""The ops on the masked entries of a weight, which keep them at 0.

    any_masked_nonzero   whether a masked entry differs from 0
    zero_masked_         sets masked entries to 0 in place, and says whether one differed from 0

Both read weight and mask once and make no other tensor. The result is 0-d and bool. -0 counts as 0, NaN does not.
moduli_kernels/masks calls them, for the CPU alone: elsewhere the answer would have to be waited for.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Op, declare


class MaskedEntries(NamedTuple):
    """What both ops take.

    weight: any shape, contiguous, of 2, 4 or 8 bytes an element.
    mask: bool, of the weight's shape, contiguous, True = kept.
    """

    weight: Tensor
    mask: Tensor


def _any_masked_nonzero(a: MaskedEntries) -> Tensor:
    return a.weight.masked_fill(a.mask, 0).ne(0).any()


def _zero_masked_(a: MaskedEntries) -> Tensor:
    any_nonzero = _any_masked_nonzero(a)
    a.weight.masked_fill_(~a.mask, 0)
    return any_nonzero


def _fake(a: MaskedEntries) -> Tensor:
    return a.weight.new_empty((), dtype=torch.bool)


ANY_MASKED_NONZERO = declare(Op(
    name="any_masked_nonzero", arguments=(MaskedEntries,), returns="Tensor", fallback=_any_masked_nonzero, fake=_fake))

ZERO_MASKED_ = declare(Op(
    name="zero_masked_", arguments=(MaskedEntries,), returns="Tensor", fallback=_zero_masked_, fake=_fake,
    mutates="weight"))
