"""One planted bug for each tool of compute-sanitizer, to be run under it: a tool that stays silent here proves nothing.

    python scripts/gpu_plants.py TOOL LIBRARY       memcheck, initcheck, racecheck or synccheck; LIBRARY: of build()

In a process with torch, as the kernels themselves run. The reads are planted in Triton, whose kernels are those to be
watched; a race and a bad barrier cannot be written in it.
"""
from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys
import tempfile

CUDA = r"""
// All of a block writes, one thread reads what the others wrote, with nothing between.
__global__ void race(int *out) {
  __shared__ int shared[128];
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < 128; ++i) sum += shared[i];
    *out = sum;
  }
}

// Half of a warp waits at a barrier of the whole block.
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
    """architecture: "90". Raises RuntimeError with what nvcc said."""
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
    import gpu_plants_triton

    # Each tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), of a size that is no whole page.
    count, out = 1_000_003, torch.zeros(1, device="cuda")
    numbers = torch.empty(count, device="cuda")
    if tool == "memcheck":
        numbers.zero_()
        gpu_plants_triton.add_up[(1,)](numbers[count - 512:], out, COUNT=1024)  # 512 beyond the end
    else:
        gpu_plants_triton.add_up[(1,)](numbers, out, COUNT=1024)  # nobody wrote them
    torch.cuda.synchronize()


if __name__ == "__main__":
    run(*sys.argv[1:3])
