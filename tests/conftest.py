"""What every test runs under: poisoned memory, and hypothesis without a clock or chance; and the device of the tests
that are marked `on_device` (support/penalty_cases.py)."""
from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch
from hypothesis import settings

import moduli_kernels as mk
from moduli_kernels import runtime
from tests.support.penalty_cases import DEVICE, KERNELS

settings.register_profile("moduli", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("moduli")

# Files whose subject has no device. Under MODULI_KERNELS_TEST_DEVICE=cuda they are skipped: the suite on the CPU runs
# them.
WITHOUT_A_DEVICE = ("examples/*.py", "triton/*.py", "test_setup.py", "test_packaging.py", "test_functors.py",
                    "test_plots.py", "test_gpu_scripts.py", "test_block_layout.py", "test_mask_table.py",
                    "test_rnn_cpp.py", "test_docs.py", "lightning/*.py", "test_distributed.py", "test_wheels.py",
                    "test_sanitizers.py", "test_tooling.py", "test_bitwise.py", "test_layers.py", "test_masks.py",
                    "test_three_places.py", "test_toy.py")


def pytest_configure(config):
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"MODULI_KERNELS_TEST_DEVICE must be cpu or cuda, got {DEVICE}; unset it for the CPU.")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("MODULI_KERNELS_TEST_DEVICE is cuda, but torch finds no CUDA GPU; unset it.")
    if DEVICE == "cuda":
        # poisoned_empty asks for deterministic algorithms, and cuBLAS then for this, before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # cuDNN's, of a pruned nn.RNN, whose weights torch.nn.utils.prune makes one by one
        config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")
    elif KERNELS == "triton":
        # NumPy's, under Triton's interpreter, of what is right there: log2(0), and inf - inf of poisoned points
        config.addinivalue_line(
            "filterwarnings", "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")


def pytest_collection_modifyitems(items):
    # Files with slow tests come first, so that the processes that share the suite end at about the same time.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if DEVICE == "cpu":
        return
    for item in items:
        if any(item.path.match(pattern) for pattern in WITHOUT_A_DEVICE):
            item.add_marker(pytest.mark.skip(reason="its subject has no device: the CPU's suite runs it"))


os.environ["MODULI_KERNELS_POISON"] = "1"  # csrc/cpu/common/aligned.h: reused scratch memory holds 0x7f bytes


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


@pytest.fixture
def on_triton():
    """For the files that run Triton's kernels on CPU tensors, in its interpreter."""
    assert runtime.triton_interpreted, "run with TRITON_INTERPRET=1"
    with mk.backend("triton"):
        yield


@pytest.fixture
def restored():
    """For tests of the examples: a Run sets the number of threads and seeds, and takes no care of who comes after."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture
def default_device():
    """Tensors, modules and generators of the test are made on DEVICE."""
    if DEVICE == "cpu":
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
