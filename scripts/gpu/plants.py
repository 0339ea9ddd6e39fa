"""Runs a bug that is planted for one tool of compute-sanitizer. A tool that does not report it proves nothing.

    python -m scripts.gpu.plants TOOL LIBRARY

TOOL is memcheck, initcheck, racecheck or synccheck, and LIBRARY is what build() made. The bug runs in a process with
torch, as the kernels do. The bad reads are planted in Triton, because its kernels are the ones to be watched; a race
and a bad barrier are planted in CUDA, because they cannot be written in Triton.
"""
from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys
import tempfile

CUDA = r"""
// All threads of a block write, then one thread reads what the others wrote, without a barrier in between.
__global__ void race(int *out) {
  __shared__ int shared[128];
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < 128; ++i) sum += shared[i];
    *out = sum;
  }
}

// Half of a warp waits at a barrier for the whole block.
__global__ void barrier(int *out) {
  __shared__ int shared[64];
  if (threadIdx.x < 16) {
    shared[threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) *out = shared[1];
  }
}

extern "C" int run_race(int *out) { race<<<1, 128>>>(out); return cudaDeviceSynchronize(); }
extern "C" int run_barrier(int *out) { barrier<<<1, 64>>>(out); return cudaDeviceSynchronize(); }
"""
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")


def build(library: pathlib.Path, nvcc: str, architecture: str) -> None:
    """Compiles the planted bugs of CUDA for an architecture such as "90". Raises RuntimeError with nvcc's message."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "plants.cu")
        source.write_text(CUDA)
        done = subprocess.run([nvcc, "-lineinfo", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{architecture}", "-o",
                               str(library), str(source)], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"nvcc could not compile the planted bugs: {(done.stderr or done.stdout)[-500:]}")


def run(tool: str, library: str) -> None:
    import torch

    if tool in ("racecheck", "synccheck"):
        out = torch.zeros(1, dtype=torch.int32, device="cuda")
        plants = ctypes.CDLL(library)
        call = plants.run_race if tool == "racecheck" else plants.run_barrier
        call(ctypes.c_void_p(out.data_ptr()))
        return
    from scripts.gpu import plants_triton

    # Each tensor is its own allocation (PYTORCH_NO_CUDA_MEMORY_CACHING=1), and this size does not fill its last page.
    count, out = 1_000_003, torch.zeros(1, device="cuda")
    numbers = torch.empty(count, device="cuda")
    if tool == "memcheck":
        numbers.zero_()
        plants_triton.add_up[(1,)](numbers[count - 512:], out, COUNT=1024)  # reads 512 numbers beyond the end
    else:
        plants_triton.add_up[(1,)](numbers, out, COUNT=1024)  # reads numbers that nothing has written
    torch.cuda.synchronize()


if __name__ == "__main__":
    run(*sys.argv[1:3])
