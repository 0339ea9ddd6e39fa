"""Which implementation runs: the device decides, or the user with `backend(...)` or MODULI_KERNELS_BACKEND."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import runtime

BACKENDS = ("reference", "cpp", "triton", "cuda")
_DEVICE = {"cpp": "cpu", "triton": "cpu" if runtime.triton_interpreted else "cuda", "cuda": "cuda"}
# The backend that the user has asked for, not yet checked; None leaves the choice to the package.
forced: str | None = os.environ.get("MODULI_KERNELS_BACKEND") or None


def availability() -> dict[str, tuple[bool, str]]:
    """{backend: (whether it can run here, why or why not in words)}."""
    return {
        "reference": (True, "plain PyTorch, any device"),
        "cpp": (runtime.cpu_ops_error is None, runtime.cpu_ops_error or "compiled CPU kernels are loaded"),
        "triton": _triton(),
        "cuda": (False, "its kernels are not part of this version"),
    }


def _triton() -> tuple[bool, str]:
    if not runtime.triton_installed:
        return False, "Triton is not installed (pip install triton; PyTorch's CUDA builds bring it along)"
    if runtime.triton_interpreted:
        return True, "Triton's interpreter runs its kernels on CPU tensors (TRITON_INTERPRET=1): slow, for tests"
    if not torch.cuda.is_available():
        return False, "Triton is installed, but PyTorch finds no CUDA GPU"
    return True, "Triton kernels, compiled at their first call"


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"backend (or MODULI_KERNELS_BACKEND) must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}; pick "
            "one of them."
        )
    available, reason = availability()[name]
    if not available:
        raise RuntimeError(
            f"backend {name!r} is not available: {reason}; python -m moduli_kernels.env_report says more.")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the package's ops on one backend inside a `with` block. It holds for the whole process, as does the
    environment variable MODULI_KERNELS_BACKEND.

    Args:
        name: "reference" (plain PyTorch), "cpp", "triton" or "cuda".

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not available here; inside the block, tensors on a device that it does not
            serve.
    """
    global forced
    before, forced = forced, _check(name)
    try:
        yield
    finally:
        forced = before


def active(device_type: str) -> str:
    """The backend that serves tensors on this type of device ("cpu", "cuda", ...).

    Raises:
        ValueError, RuntimeError: the user has asked for a backend that does not exist, is not available here, or does
            not serve this type of device.
    """
    if forced is None:
        if device_type == "cuda" and not runtime.triton_interpreted and _triton()[0]:
            return "triton"
        return "cpp" if device_type == "cpu" and runtime.cpu_ops_error is None else "reference"
    if _check(forced) != "reference" and _DEVICE[forced] != device_type:
        raise RuntimeError(
            f"backend {forced!r} runs on {_DEVICE[forced]} tensors, got one on {device_type}; move it or leave the "
            "choice to the package."
        )
    return forced
