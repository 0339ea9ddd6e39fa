"""Runs the test suite on the GPU in several processes, without pytest-xdist.

Most tests wait for Triton to compile, which takes one core.
"""
from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST_SHARDS = 14
GPU_GIB_A_SHARD = 2.0  # a process needs it for its CUDA context, torch and small tensors
MOST_FAILURES = 20  # a shard stops after them: after an illegal access every later test of its process fails
ONLY_ON_A_GPU = "test_cuda_only"  # some of these tests must have passed, or nothing ran on the GPU


@dataclass
class Outcome:
    """The results of all shards together.

    passed, skipped: numbers of tests.
    failed: test -> the first line of its message.
    reasons: why tests were skipped -> how many.
    slowest: (seconds, test).
    broken: a sentence for each shard that made no report.
    on_gpu: number of passed tests that only a GPU can run.
    """

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    reasons: Counter = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    on_gpu: int = 0

    @property
    def ok(self) -> bool:
        return not self.failed and not self.broken and self.on_gpu > 0

    def summary(self) -> str:
        text = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        if self.broken:
            text += f"; {len(self.broken)} shares of the suite did not finish"
        return text if self.on_gpu or self.failed or self.broken else text + "; none of them ran on the GPU"

    def lines(self) -> list[str]:
        """Returns the lines that are shown beside the summary."""
        return [*self.broken, *(f"{test}: {why}" for test, why in self.failed.items())]

    def details(self) -> dict[str, Any]:
        return {"passed": self.passed, "skipped": self.skipped, "failed": self.failed, "broken": self.broken,
                "skipped_because": dict(self.reasons.most_common()),
                "slowest": sorted(self.slowest, reverse=True)[:15]}


def shards(cores: int, gpu_gib: float) -> int:
    """Returns how many processes fit a machine, given its cores and the free memory of its GPU in GiB."""
    return max(1, min(cores - 1, MOST_SHARDS, int(gpu_gib // GPU_GIB_A_SHARD)))


def read_report(path: pathlib.Path, outcome: Outcome) -> None:
    """Adds the JUnit file of a shard to the outcome."""
    for case in xml.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name')}"
        outcome.slowest.append((round(float(case.get("time", 0)), 1), name))
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            message = bad.get("message") or bad.text or ""
            outcome.failed[name] = (message.strip().splitlines() or ["no message"])[0][:300]
        elif skipped is not None:
            outcome.skipped += 1
            outcome.reasons[skipped.get("message") or "no reason given"] += 1
        else:
            outcome.passed += 1
            outcome.on_gpu += ONLY_ON_A_GPU in name


def run(count: int, seconds: float, log: pathlib.Path, tests: str = "tests", device: str = "cuda") -> Outcome:
    """Runs the suite in `count` processes. One that has not ended after so many seconds is killed and reported."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name, open(log, "w") as out:
        folder = pathlib.Path(name)
        processes = [_start(index, count, folder, tests, device) for index in range(count)]
        deadline = time.monotonic() + seconds
        for index, process in enumerate(processes):
            late = False
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # also kills the processes that its tests started
                process.wait()
                late = True
            text = (folder / f"{index}.log").read_text(errors="replace")
            out.write(f"--- share {index + 1} of {count}\n{text}\n")
            report, now = folder / f"{index}.xml", folder / f"{index}.now"
            at = now.read_text() if now.exists() else "its collection"
            if report.exists() and not late:
                read_report(report, outcome)
                if process.returncode not in (0, 1, 5):  # 1: failures, which the report names; 5: a share without tests
                    outcome.broken.append(f"share {index + 1} ended with status {process.returncode} after {at}")
            elif late:
                outcome.broken.append(f"share {index + 1} was ended after {seconds:.0f} s; it was at {at}")
            else:
                last = " / ".join(text.strip().splitlines()[-2:])
                outcome.broken.append(f"share {index + 1} died with status {process.returncode} at {at}: {last[:300]}")
    return outcome


def _start(index: int, count: int, folder: pathlib.Path, tests: str, device: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path, "MODULI_KERNELS_TEST_DEVICE": device, "MODULI_KERNELS_SHARD": f"{index}/{count}",
        "MODULI_KERNELS_SHARD_NOW": str(folder / f"{index}.now"), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{index}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "scripts.gpu.sharding", "-p", "no:cacheprovider", "--tb=short",
             f"--maxfail={MOST_FAILURES}", f"--junitxml={folder / f'{index}.xml'}", tests],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True)
