"""The compiled kernels give the same numbers as when tests/data/bitwise.json was written, to the last bit: moving and
renaming code changes no arithmetic. Another compiler may round otherwise, hence only for the one named there.

    python tests/support/bitwise_cases.py --record    writes the file anew, for a change that means to change results
"""
from __future__ import annotations

import json
import platform

import pytest
import torch

from moduli_kernels import runtime
from tests.support import bitwise_cases

RECORDED = json.loads(bitwise_cases.RECORD.read_text())


def processor_has(isa: str) -> bool:
    capability = {"portable": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
    ranks = list(capability.values())
    have = torch.backends.cpu.get_cpu_capability()
    return have in ranks and ranks.index(have) >= ranks.index(capability[isa])


@pytest.mark.skipif(runtime.cpu_ops_error is not None, reason="needs the compiled CPU kernels")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="recorded on x86-64")
@pytest.mark.parametrize("isa", bitwise_cases.ISAS)
def test_results_are_those_recorded(isa):
    compiler = bitwise_cases.compiler()
    if compiler != RECORDED["compiler"]:
        pytest.skip(f"recorded with {RECORDED['compiler']}, built with {compiler or 'an unnamed compiler'}")
    if not processor_has(isa):
        pytest.skip(f"this processor has no {isa}")
    want, got = RECORDED["digests"][isa], bitwise_cases.child(isa)
    assert list(got) == list(want)
    assert [name for name in want if got[name] != want[name]] == []


def test_instruction_sets_differ():
    """The digests see the arithmetic: each set rounds in its own way in most cases."""
    portable, newest = (RECORDED["digests"][isa] for isa in ("portable", "avx512"))
    assert sum(portable[name] != newest[name] for name in portable) > len(portable) / 2


def test_a_changed_bit_changes_a_digest():
    tensors = [torch.zeros(3), torch.ones(2, 2)]
    assert bitwise_cases.digest(tensors) == bitwise_cases.digest([t.clone() for t in tensors])
    assert bitwise_cases.digest(tensors) != bitwise_cases.digest([-tensors[0], tensors[1]])


