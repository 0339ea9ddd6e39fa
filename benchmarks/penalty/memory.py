"""Measures a contestant's peak memory beyond the weight and its gradients.

    python -m benchmarks.penalty.memory CASE [--peer NAME] [--quick]      prints a JSON record

On the CPU each contestant has a process of its own. Its peak is Linux' high-water mark of resident memory, which sees
every allocation and is exact to about 0.1 MB, since Linux counts pages in batches. malloc is set to give freed memory
back at once, so that memory kept from the warm-up does not hide a later need. On a GPU, torch's allocator counts.
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
    """Returns whether peak memory can be measured here."""
    return STATUS.exists() and CLEAR.exists()


def run(case: str, peer: str, quick: bool, threads: int) -> dict[str, Any]:
    """Measures in a fresh process and returns its record. Raises RuntimeError with the process' words if it fails."""
    command = [sys.executable, "-m", "benchmarks.penalty.memory", case, "--peer", peer, "--threads", str(threads)]
    done = subprocess.run(command + ["--quick"] * quick, env=os.environ | GIVE_BACK, text=True, capture_output=True,
                          cwd=pathlib.Path(__file__).resolve().parents[2])
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {peer!r} in {case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """Reads VmRSS or VmHWM, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _measure(name: str, peer: str, quick: bool) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    case = case.smaller() if quick else case
    weight, points = case.inputs()
    # The list is dropped, so that the others' coefficients and buffers are gone before anything is measured.
    one = next(c for c in Peers(case, weight, points).all() if c.name == peer)
    for _ in range(3):  # so that everything is compiled and warm and threads have started
        one.step()
        one.release()
    highest = 0
    for _ in range(3):
        before = _status("VmRSS")
        CLEAR.write_text("5")  # the high-water mark starts again from what is resident now
        one.step()
        highest = max(highest, _status("VmHWM") - before)
        gradients = _gradients(one)
        one.release()
    return _record(name, one, highest, gradients)


def on_gpu(name: str, one: Contestant) -> dict[str, Any]:
    """Returns the record of a contestant on a GPU that is warm."""
    one.step()
    one.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one.step()
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated() - before
    gradients = _gradients(one)
    one.release()
    return _record(name, one, highest, gradients)


def _gradients(one: Contestant) -> int:
    """Returns the bytes of a contestant's gradients."""
    return sum(leaf.grad.nbytes for leaf in (one.weight, one.points) if leaf.grad is not None)


def _record(name: str, one: Contestant, highest: int, gradients: int) -> dict[str, Any]:
    return {"case": name, "n": one.weight.shape[0], "columns": one.points.shape[1], "contestant": one.name,
            "kind": one.kind, "weight": one.weight.nbytes, "gradients": gradients, "beyond": highest - gradients}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.penalty.memory", description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--peer", default="ours")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(json.dumps(_measure(asked.case, asked.peer, asked.quick)))
