"""Peak memory of one contestant beyond the weight and its gradients: on the CPU in a process of its own, on a GPU by
the counters of torch's allocator.

    python -m benchmarks.memory CASE [--peer NAME] [--quick]      prints a JSON record

The peak is the kernel's high-water mark of resident memory (Linux), which sees every allocation, whoever makes it.
It is exact to about 0.1 MB, since Linux counts pages in batches.
malloc is told to give back freed memory at once, so that nothing kept from the warm-up hides a later need.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import torch

from .cases import CASES
from .peers import Contestant, Peers

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def available() -> bool:
    return STATUS.exists() and CLEAR.exists()


def run(case: str, peer: str, quick: bool, threads: int) -> dict[str, Any]:
    """The record of a fresh process; raises RuntimeError with what it said where it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", case, "--peer", peer, "--threads", str(threads)]
    done = subprocess.run(command + ["--quick"] * quick, env=os.environ | GIVE_BACK, text=True, capture_output=True,
                          cwd=pathlib.Path(__file__).resolve().parent.parent)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {peer!r} in {case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _measure(name: str, peer: str, quick: bool) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    case = case.smaller() if quick else case
    weight, points = case.inputs()
    # the others' coefficients and buffers go with this list, before anything is measured
    one = next(c for c in Peers(case, weight, points).all() if c.name == peer)
    for _ in range(3):  # compiled, warm, and threads started
        one.step()
        one.release()
    highest = 0
    for _ in range(3):
        before = _status("VmRSS")
        CLEAR.write_text("5")  # the high-water mark starts again from what is resident now
        one.step()
        highest = max(highest, _status("VmHWM") - before)
        gradients = sum(leaf.grad.nbytes for leaf in (one.weight, one.points) if leaf.grad is not None)
        one.release()
    return {"case": name, "n": case.n, "columns": points.shape[1], "contestant": peer, "kind": one.kind,
            "weight": weight.nbytes, "gradients": gradients, "beyond": highest - gradients}


def on_gpu(name: str, one: Contestant) -> dict[str, Any]:
    """The record of a contestant that is warm."""
    one.step()
    one.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one.step()
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.grad.nbytes for leaf in (one.weight, one.points) if leaf.grad is not None)
    one.release()
    return {"case": name, "n": one.weight.shape[0], "columns": one.points.shape[1], "contestant": one.name,
            "kind": one.kind, "weight": one.weight.nbytes, "gradients": gradients, "beyond": highest - gradients}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--peer", default="ours")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(json.dumps(_measure(asked.case, asked.peer, asked.quick)))
