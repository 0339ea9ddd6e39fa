"""Runs a bug that is planted for sanitize_cpu.py. A sanitizer that does not report it proves nothing.

    python sanitize_plants.py KIND LIBRARY

KIND is a key of PLANTS, and LIBRARY is what build() made. The bug runs in a process with torch and the instrumented
package, on memory that torch allocated, as the kernels do.
"""
from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys
import tempfile

SOURCE = r"""
#include <cstdint>
#include <cstring>
#define PLANT extern "C" __attribute__((visibility("default"), noinline))

typedef float Pack __attribute__((vector_size(32)));

PLANT float address(const float *p, int64_t at) { return p[at]; }
PLANT float pack(const float *p, int64_t at) {  // as load_pack of csrc/math/simd.h
  Pack x;
  std::memcpy(&x, p + at, sizeof(x));
  return x[0] + x[7];
}
PLANT float undefined(const float *p, int64_t at) { return p[static_cast<int32_t>(at + 2147483000) * 4 - at]; }
PLANT float cast(const float *p, int64_t at) { return p[static_cast<int32_t>(p[0] * 1e30f) * 0 + at]; }
"""
# Each report contains these words.
PLANTS = {
    "address": "heap-buffer-overflow", "pack": "READ of size 32", "undefined": "signed integer overflow",
    "cast": "is outside the range of representable values",
}
STARTED = "plant: "


def build(library: pathlib.Path, cxx: list[str], flags: list[str]) -> None:
    """Compiles the planted bugs. Raises RuntimeError with the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "plants.cpp")
        source.write_text(SOURCE)
        done = subprocess.run([*cxx, "-std=c++20", "-O1", "-fPIC", "-shared", "-mavx", *flags, "-o", str(library),
                               str(source)], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{cxx[0]} could not compile the planted bugs: {done.stderr[-500:]}")


def run(kind: str, library: str) -> None:
    import torch

    from moduli_kernels import runtime

    if runtime.cpu_ops_error:
        raise SystemExit(f"the instrumented library was not loaded: {runtime.cpu_ops_error}")
    numbers = torch.ones(1003)
    call = getattr(ctypes.CDLL(library), kind)
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    print(STARTED + kind, flush=True)
    call(numbers.data_ptr(), {"address": 1003, "pack": 999}.get(kind, 1000))


if __name__ == "__main__":
    run(*sys.argv[1:3])
