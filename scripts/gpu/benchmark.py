"""Runs the benchmarks on the GPU: several processes compile the contestants' kernels, then one process measures."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST_COMPILERS = 10  # processes at the same time, each of which starts compilers
# benchmarks/conftest.py reads these variables: that this is the process that measures, so that it starts no other; the
# record's file; when to stop.
ALLOCATOR, RECORD, DEADLINE = (f"MODULI_KERNELS_BENCHMARKS_{name}" for name in ("ALLOCATOR", "GPU_RECORD", "DEADLINE"))


@dataclass
class Outcome:
    """The result of the benchmarks.

    ok: whether the measurements could be made.
    summary: one line about it.
    rows: the table of goals, (case, goal, value, verdict).
    """

    ok: bool
    summary: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)


def dealt(names: list[str], hands: int) -> list[list[str]]:
    """Deals the names out to at most so many hands of about equal size."""
    return [names[k::hands] for k in range(min(hands, len(names)))]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | variables


def prepare(cores: int, seconds: float, log: pathlib.Path) -> None:
    """Fills the caches of torch and Triton.

    A kernel that fails or takes too long here is compiled when it is measured.
    """
    from benchmarks.penalty.cases_gpu import GPU_CASES

    hands = dealt([case.name for case in GPU_CASES], max(1, min(MOST_COMPILERS, cores // 2)))
    end = time.monotonic() + seconds
    with open(log, "w") as out:
        running = [subprocess.Popen([sys.executable, "-m", "benchmarks.penalty.bench_penalty_gpu", *hand], cwd=ROOT,
                                    env=environment(TORCHINDUCTOR_COMPILE_THREADS="2"), stdout=out,
                                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) for hand in hands]
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(record: pathlib.Path, seconds: float, log: pathlib.Path, arguments: list[str]) -> Outcome:
    """Runs the benchmarks, which write to `record`; `arguments` go to pytest."""
    margin = 0.15 * seconds  # the case that is under way at the deadline may finish in it
    variables = {ALLOCATOR: "retained", RECORD: str(record), DEADLINE: str(time.time() + seconds - margin)}
    with open(log, "w") as out:
        try:
            status = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rsf",
                 "benchmarks/penalty/bench_penalty_gpu.py", "benchmarks/rnn/bench_rnn_gpu.py", *arguments],
                cwd=ROOT, env=environment(**variables), stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = None
    return outcome(status, record, log)


def outcome(status: int | None, record: pathlib.Path, log: pathlib.Path) -> Outcome:
    """Judges a run by its record. It passes if the measurements could be made; goals that were missed are only counted.

    status: pytest's exit status, or None if it took too long and was ended.
    """
    from benchmarks import report_gpu
    from benchmarks.harness import records

    if not record.exists():
        last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-2:])
        return Outcome(False, f"measured nothing: {last[:300]}")
    rows = report_gpu.rows(records.load(record))
    reached, missed, absent = (sum(row[3] == verdict for row in rows)
                               for verdict in ("reached", "NOT reached", "not measured in this run"))
    summary = f"{reached} goals reached, {missed} not reached, {absent} not measured"
    if status is None:
        summary += "; ended, since its time was up"
    elif status:
        failed = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("FAILED")]
        summary += f"; pytest ended with status {status}: {'; '.join(failed)[:300] or 'see its log'}"
    return Outcome(status == 0, summary, rows)
