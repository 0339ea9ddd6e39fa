"""The ops on masked entries: what they find and write, in each dtype and size, on each instruction set."""
from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from moduli_kernels import masks, runtime
from moduli_kernels.ops import torch_ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def case(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight that is 0 where it is masked (-0 in places), and its mask."""
    draw = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=draw) < 0.3
    weight = torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).mul_(mask)
    return weight, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4095, 4096, 4097, 65537, 200_003])
def test_what_is_found_and_written(size, dtype):
    weight, mask = case(size, dtype)
    before = weight.clone()
    assert not torch_ops.any_masked_nonzero(weight, mask) and not torch_ops.zero_masked_(weight, mask)
    assert torch.equal(weight, before)
    places = (~mask).nonzero()[:, 0]
    for place in {int(places[i]) for i in (0, len(places) // 2, -1)} if len(places) else ():
        for value in (1.0, -1.0, math.nan, math.inf, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 2):
            weight[place] = value
            assert torch_ops.any_masked_nonzero(weight, mask)
            assert torch_ops.zero_masked_(weight, mask)
            assert torch.equal(weight, before)
        weight[place] = -0.0
        assert not torch_ops.any_masked_nonzero(weight, mask)
        weight[place] = 0


def test_kept_entries_stay_as_they_are_whatever_they_are():
    weight = torch.tensor([math.nan, -0.0, math.inf, 1.0, 2.0])
    mask = torch.tensor([True, True, True, True, False])
    assert torch_ops.zero_masked_(weight, mask)
    assert weight.isnan()[0] and weight[1:].tolist() == [0, math.inf, 1, 0] and math.copysign(1, weight[1]) == -1


@pytest.mark.parametrize("weight, mask", [
    (torch.ones(4), torch.ones(5, dtype=torch.bool)), (torch.ones(4), torch.ones(4)),
    (torch.ones(4, 4).T[:, :2], torch.ones(4, 2, dtype=torch.bool)), (torch.ones(4).to(torch.int8),
                                                                      torch.ones(4, dtype=torch.bool))])
@pytest.mark.skipif(runtime.cpu_ops_error is not None, reason="needs the compiled ops")
def test_what_the_ops_refuse(weight, mask):
    for op in (torch_ops.any_masked_nonzero, torch_ops.zero_masked_):
        with pytest.raises(RuntimeError, match="weight and its bool mask must be contiguous and of one shape"):
            op(weight, mask)


@pytest.mark.parametrize("make", [lambda w: w, lambda w: w.T, lambda w: w[::2], lambda w: w[:, 1:]])
def test_the_functions_take_any_strides(make):
    weight = make(torch.ones(8, 6))
    mask = make(torch.arange(48).reshape(8, 6) % 3 == 0)
    version = weight._version
    assert not masks.is_zero_where_masked(weight, mask) and weight._version == version
    assert masks.zero_masked_(weight, mask) and weight._version > version
    assert torch.equal(weight, mask.float()) and masks.is_zero_where_masked(weight, mask)


def test_a_write_that_changes_nothing_does_not_count_in_the_version():
    weight, mask = torch.nn.Parameter(torch.zeros(4, 4)), torch.zeros(4, 4, dtype=torch.bool)
    assert not masks.zero_masked_(weight, mask) and weight._version == 0
    weight.data.fill_(1)
    assert masks.zero_masked_(weight, mask) and weight._version == 1


@pytest.mark.parametrize("op", [torch_ops.any_masked_nonzero, torch_ops.zero_masked_])
def test_opcheck(op):
    torch.library.opcheck(op.default, (torch.randn(5, 7), torch.rand(5, 7) < 0.5),
                          test_utils=("test_schema", "test_faketensor"))


CHECK = """
import torch, moduli_kernels
from moduli_kernels.ops import torch_ops
mask = torch.rand(70_001) < 0.3
for dtype in (torch.float16, torch.float32, torch.float64):
    weight = torch.randn(70_001).to(dtype)
    expected = weight * mask
    assert torch_ops.any_masked_nonzero(weight, mask) and torch_ops.zero_masked_(weight, mask)
    assert torch.equal(weight, expected) and not torch_ops.any_masked_nonzero(weight, mask)
print("same")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    run = subprocess.run([sys.executable, "-c", CHECK], env=os.environ | {"MODULI_KERNELS_ISA": isa},
                         capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr
