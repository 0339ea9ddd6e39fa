"""Memory of the penalty beyond the weight and its gradient, counted byte by byte.

Resident memory is too coarse for this (kernels keep it in lots of hundreds of kilobytes), so a shared library
put before malloc counts what is live and its peak, in a process of its own.
"""
from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

from moduli_kernels.reference import penalty as reference_penalty
from tests.support.penalty_cases import needs_cpp

COUNTER = r"""
#include <errno.h>
#include <malloc.h>
#include <stddef.h>
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);
static long live, peak;
long bytes_live(void) { return live; }
long bytes_peak(void) { return peak; }
void reset_peak(void) { peak = live; }
static void *count(void *p) {
  if (!p) return p;
  long now = __atomic_add_fetch(&live, (long)malloc_usable_size(p), __ATOMIC_SEQ_CST), seen = peak;
  while (now > seen && !__atomic_compare_exchange_n(&peak, &seen, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
  {} return p;
}
static void uncount(void *p) {
  if (p) __atomic_sub_fetch(&live, (long)malloc_usable_size(p), __ATOMIC_SEQ_CST);
}
void *malloc(size_t n) { return count(__libc_malloc(n)); }
void *calloc(size_t n, size_t m) { return count(__libc_calloc(n, m)); }
void *realloc(void *p, size_t n) { uncount(p); return count(__libc_realloc(p, n)); }
void *memalign(size_t a, size_t n) { return count(__libc_memalign(a, n)); }
void *aligned_alloc(size_t a, size_t n) { return count(__libc_memalign(a, n)); }
int posix_memalign(void **p, size_t a, size_t n) { *p = count(__libc_memalign(a, n)); return *p || !n ? 0 :
ENOMEM; } void free(void *p) { uncount(p); __libc_free(p); }
"""

# Prints, for each case, the peak over the live bytes before, less what backward leaves in weight.grad.
PROBE = """
import ctypes, gc, json, sys
import torch
import moduli_kernels as mk
counter = ctypes.CDLL(None)
counter.bytes_live.restype = counter.bytes_peak.restype = ctypes.c_long
found = []
for name, manifold, n, trained, threads, backend in json.loads(sys.argv[1]):
    torch.set_num_threads(threads)
    with mk.backend(backend):
        for size in (256, n):  # a small one first: pools, lazily imported modules
            weight = torch.randn(size, size, requires_grad=True)
            rows = mk.manifold(manifold).sample(size).requires_grad_(trained)
            gc.collect()
            counter.reset_peak()
            before = counter.bytes_live()
            mk.moduli_penalty(weight, rows, manifold=manifold).backward()
            beyond = counter.bytes_peak() - before - weight.nbytes
        assert weight.grad.shape == weight.shape and weight.grad.is_contiguous()
    found.append([name, beyond / weight.nbytes])
print(json.dumps(found))
"""

# name: manifold, n, points trained, threads, backend
CASES = {
    "torus_4096": ("torus", 4096, True, 2, "cpp"),
    "torus_4096_frozen": ("torus", 4096, False, 2, "cpp"),
    "torus_2048": ("torus", 2048, True, 1, "cpp"),
    "torus_2048_two_threads": ("torus", 2048, True, 2, "cpp"),
    "circle_2048": ("circle", 2048, True, 1, "cpp"),
    "klein_2048": ("klein", 2048, True, 1, "cpp"),
    "torus6_2048": ("torus6", 2048, True, 1, "cpp"),
    "mixed_2048": ("mixed", 2048, True, 1, "cpp"),
    "reference_2048": ("torus", 2048, True, 1, "reference"),
}
COLUMNS = {"circle": 1, "torus": 2, "klein": 2, "torus6": 6, "mixed": 5}


@pytest.fixture(scope="module")
def beyond(tmp_path_factory) -> dict[str, float]:
    """Bytes beyond weight and weight.grad, as a part of the weight's, by case."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("counting takes Linux with glibc and a C compiler")
    folder = tmp_path_factory.mktemp("counter")
    (folder / "counter.c").write_text(COUNTER)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-fno-builtin", "-o", folder / "counter.so",
                    folder / "counter.c"],
                   check=True)
    root = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, "LD_PRELOAD": str(folder / "counter.so"), "PYTHONPATH": root}
    environment.pop("MODULI_KERNELS_BACKEND", None)
    cases = json.dumps([(name, *case) for name, case in CASES.items()])
    done = subprocess.run([sys.executable, "-c", PROBE, cases], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_cpp
@pytest.mark.parametrize("case", CASES)
def test_memory_beyond_the_gradient(beyond, case):
    """Under 1 % x columns of a point, of the weight; the reference takes a few strips whatever the weight's
    size."""
    manifold, n, *_, backend = CASES[case]
    allowed = 0.01 * COLUMNS[manifold] if backend == "cpp" else 16 * reference_penalty.TILE / n**2
    assert beyond[case] <= allowed
