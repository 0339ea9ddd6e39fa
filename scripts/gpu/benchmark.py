"""The benchmarks on a GPU for scripts/gpu.py: several processes compile what contestants need, one then measures."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_COMPILERS = 10  # processes at once, each with compilers of its own
# as benchmarks/conftest.py names them: in its child, so that it starts none itself; where to write; till when
ALLOCATOR, RECORD, DEADLINE = (f"MODULI_KERNELS_BENCHMARKS_{name}" for name in ("ALLOCATOR", "GPU_RECORD", "DEADLINE"))


@dataclass
class Outcome:
    """rows: the table of goals, (case, goal, value, verdict)."""

    ok: bool
    told: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)


def dealt(names: list[str], hands: int) -> list[list[str]]:
    """The names in so many hands at most, of about equal size."""
    return [names[k::hands] for k in range(min(hands, len(names)))]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | variables


def prepare(cores: int, seconds: float, log: pathlib.Path) -> None:
    """Fills the caches of torch and Triton. What fails or takes too long here is compiled when it is measured."""
    from benchmarks.cases_gpu import GPU_CASES

    hands = dealt([case.name for case in GPU_CASES], max(1, min(MOST_COMPILERS, cores // 2)))
    end = time.monotonic() + seconds
    with open(log, "w") as out:
        running = [subprocess.Popen([sys.executable, "-m", "benchmarks.bench_penalty_gpu", *hand], cwd=ROOT,
                                    env=environment(TORCHINDUCTOR_COMPILE_THREADS="2"), stdout=out,
                                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) for hand in hands]
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(record: pathlib.Path, seconds: float, log: pathlib.Path, arguments: list[str]) -> Outcome:
    """Runs the benchmark into `record`; `arguments` go to pytest."""
    margin = 0.15 * seconds  # for the case that is under way at the deadline
    variables = {ALLOCATOR: "retained", RECORD: str(record), DEADLINE: str(time.time() + seconds - margin)}
    with open(log, "w") as out:
        try:
            status = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rsf",
                 "benchmarks/bench_penalty_gpu.py", "benchmarks/bench_rnn_gpu.py", *arguments],
                cwd=ROOT, env=environment(**variables), stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = None
    return outcome(status, record, log)


def outcome(status: int | None, record: pathlib.Path, log: pathlib.Path) -> Outcome:
    """status: pytest's, None where it was ended. Passed are measurements that could be made, be the goals reached or
    not: how many were is told."""
    from benchmarks import records, report_gpu

    if not record.exists():
        last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-2:])
        return Outcome(False, f"measured nothing: {last[:300]}")
    rows = report_gpu.rows(records.load(record))
    reached, missed, absent = (sum(row[3] == verdict for row in rows)
                               for verdict in ("reached", "NOT reached", "not measured in this run"))
    told = f"{reached} goals reached, {missed} not reached, {absent} not measured"
    if status is None:
        told += "; ended, since its time was up"
    elif status:
        failed = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("FAILED")]
        told += f"; pytest ended with status {status}: {'; '.join(failed)[:300] or 'see its log'}"
    return Outcome(status == 0, told, rows)
