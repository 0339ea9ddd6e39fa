"""What every test runs under: poisoned memory, and hypothesis without a clock or chance."""
from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("moduli", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("moduli")


@pytest.fixture(autouse=True, scope="session")
def poisoned_heap():
    """malloc hands out 0x7f bytes (3e38 as float32, 1e306 as float64) instead of what lay there, so that
    scratch memory read before it is written shows. glibc only; blocks up to about 1 KB are exempt there."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        yield
        return
    m_perturb = -6
    libc.mallopt(m_perturb, 0x80)  # the complement is what fresh blocks hold
    yield
    libc.mallopt(m_perturb, 0)


@pytest.fixture(autouse=True)
def poisoned_empty():
    """torch.empty is NaN, also for the compiled kernels: torch::stable::empty goes through the same
    aten::empty (test_penalty.py::test_empty_is_poisoned_for_the_kernels)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
