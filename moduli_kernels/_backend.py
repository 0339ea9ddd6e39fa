"""Which implementation runs: chosen by device, or by the user with `backend(...)` or MODULI_KERNELS_BACKEND."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import _library

BACKENDS = ("reference", "cpp", "triton", "cuda")
_DEVICE = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}
_forced: str | None = os.environ.get("MODULI_KERNELS_BACKEND") or None


def availability() -> dict[str, tuple[bool, str]]:
    """Backend -> (can it run here, why or why not in words)."""
    later = "its kernels are not part of this version"
    return {
        "reference": (True, "plain PyTorch, any device"),
        "cpp": (_library.cpu_ops_error is None, _library.cpu_ops_error or "compiled CPU kernels are loaded"),
        "triton": (False, later),
        "cuda": (False, later),
    }


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"backend (or MODULI_KERNELS_BACKEND) must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}; pick "
            "one of them."
        )
    available, reason = availability()[name]
    if not available:
        raise RuntimeError(f"backend {name!r} is not available: {reason}; python -m moduli_kernels.env_report says more.")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the package's ops on one backend inside a `with` block: "reference" (plain PyTorch), "cpp", "triton"
    or "cuda". Process-wide, also for the environment variable MODULI_KERNELS_BACKEND. Raises ValueError for an
    unknown name and RuntimeError for one that is not available here."""
    global _forced
    before, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = before


def active(device_type: str) -> str:
    """The backend that serves tensors on this type of device ("cpu", "cuda", ...)."""
    if _forced is None:
        return "cpp" if device_type == "cpu" and _library.cpu_ops_error is None else "reference"
    if _check(_forced) != "reference" and _DEVICE[_forced] != device_type:
        raise RuntimeError(
            f"backend {_forced!r} runs on {_DEVICE[_forced]} tensors, got one on {device_type}; move it or leave the "
            "choice to the package."
        )
    return _forced
