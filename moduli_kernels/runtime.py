"""What could be loaded in this process: the compiled C++ library and Triton. backends.py decides which of them runs.

Importing this module loads the C++ library and finds out whether Triton is installed; it imports neither Triton nor
CUDA.
"""
from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

import torch


def load_cpu_ops() -> str | None:
    """Loads the shared library. Returns None, or in words why it cannot be loaded."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = pathlib.Path(__file__).with_name("_cpu_ops" + suffix)
    if not path.exists():
        return ("the extension is not built (run `make build`; or install torch first and then this package, with "
                "pip install --no-build-isolation and a C++ compiler)")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); rebuild it with `make build`"
    return None


cpu_ops_error = load_cpu_ops()

triton_installed = importlib.util.find_spec("triton") is not None
# Triton reads this variable once, when it is imported: its kernels then run on CPU tensors, for tests without a GPU.
triton_interpreted = triton_installed and os.environ.get("TRITON_INTERPRET") == "1"
