"""Which implementation runs: chosen by device, or by the user with `backend(...)` or MODULI_KERNELS_BACKEND."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import runtime

BACKENDS = ("reference", "cpp", "triton", "cuda")
_DEVICE = {"cpp": "cpu", "triton": "cpu" if runtime.triton_interpreted else "cuda", "cuda": "cuda"}
_forced: str | None = os.environ.get("MODULI_KERNELS_BACKEND") or None


def availability() -> dict[str, tuple[bool, str]]:
    """Backend -> (can it run here, why or why not in words)."""
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
    """Run the package's ops on one backend inside a `with` block. Process-wide, as is the environment variable
    MODULI_KERNELS_BACKEND.

    Args:
        name: "reference" (plain PyTorch), "cpp", "triton" or "cuda".

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not available here; inside the block, tensors on a device it does not serve.
    """
    global _forced
    before, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = before


def active(device_type: str) -> str:
    """The backend that serves tensors on this type of device ("cpu", "cuda", ...)."""
    if _forced is None:
        if device_type == "cuda" and not runtime.triton_interpreted and _triton()[0]:
            return "triton"
        return "cpp" if device_type == "cpu" and runtime.cpu_ops_error is None else "reference"
    if _check(_forced) != "reference" and _DEVICE[_forced] != device_type:
        raise RuntimeError(
            f"backend {_forced!r} runs on {_DEVICE[_forced]} tensors, got one on {device_type}; move it or leave the "
            "choice to the package."
        )
    return _forced
