"""Runs the tests, compute-sanitizer and the benchmarks on this machine's CUDA GPU, and writes a record of it.

    make gpu    or    python -m scripts.gpu [all|tests|sanitize|bench] [--seconds S] [--quick] [-k EXPRESSION]

It needs torch >= 2.10 with CUDA, Triton, and what the tests import; `sanitize` also needs nvcc and compute-sanitizer.
It uses no network. A part that fails does not stop the others. The record goes to
benchmarks/results/<gpu>/<time>.json, whose name ends with "-tests" where nothing was timed, and the logs to build/gpu/.
If OUT names a folder, $OUT/<gpu>/ gets copies of both. A summary is printed last. The exit status is 1 if a part failed
and 2 if nothing could begin.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import benchmark, sanitizer, suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu"

PARTS = ("tests", "sanitize", "bench")
SECONDS = 520  # for all parts together, so that it takes under 9 minutes
# The share of the remaining time that a part may take when others follow it.
SHARES = {"build": 0.3, "tests": 0.6, "sanitize": 0.45}
MIN_TORCH = (2, 10)


@dataclass
class Part:
    """The result of a part.

    ok: whether it passed.
    summary: one line about it.
    lines: lines that are shown beside the summary.
    details: what the record holds of it.
    seconds: how long it took.
    """

    ok: bool
    summary: str
    lines: list[str] = field(default_factory=list)
    details: Any = None
    seconds: float = 0.0


def refusal() -> str | None:
    """Says in one sentence why nothing can begin here; returns None if all can."""
    try:
        import torch
    except ImportError:
        return (f"{sys.executable} has no torch; set PYTHON to a Python that has torch >= 2.10 with CUDA (without a "
                "GPU, `make test` is what to run).")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH:
        return f"torch >= 2.10 is needed, but {sys.executable} has {torch.__version__}; set PYTHON to another Python."
    if torch.version.cuda is None:
        return (f"a torch with CUDA is needed, but {sys.executable} has {torch.__version__}; set PYTHON to another "
                "Python (without a GPU, `make test` is what to run).")
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here; look at nvidia-smi (without a GPU, `make test` is what to run)."
    try:
        import triton  # noqa: F401
    except ImportError:
        return f"{sys.executable} has no Triton, which the kernels are written in; pip install triton."
    return None


# --- parts -----------------------------------------------------------------------------------------------------

def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(seconds: float) -> Part:
    """Compiles the C++ kernels in place, as `make build` does. The GPU's kernels work without them."""
    log = LOGS / "build.log"
    with open(log, "w") as out:
        done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, stdout=out,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=seconds,
                              env=os.environ | {"MODULI_KERNELS_BUILD": "cpu"})
    if done.returncode:
        return Part(False, "the C++ kernels do not compile", log.read_text(errors="replace").splitlines()[-3:])
    return Part(True, "the C++ kernels are compiled")


def tests(seconds: float) -> Part:
    import torch

    count = suite.shards(cores(), torch.cuda.mem_get_info()[0] / 2**30)
    outcome = suite.run(count, seconds, LOGS / "tests.log")
    return Part(outcome.ok, f"{outcome.summary()}; {count} processes", outcome.lines(), outcome.details())


def sanitize(seconds: float) -> Part:
    import torch

    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    verdicts = sanitizer.run(architecture, seconds, LOGS / "sanitize.log")
    good = sum(verdict.ok for verdict in verdicts)
    summary = f"{good} of {len(verdicts)} tools found their planted bug and nothing else"
    return Part(good == len(verdicts), summary, [f"{verdict.tool} {verdict.reason}" for verdict in verdicts],
                {verdict.tool: {"ok": verdict.ok, "told": verdict.reason} for verdict in verdicts})


def bench(seconds: float, record: pathlib.Path, arguments: list[str]) -> Part:
    outcome = benchmark.measure(record, seconds, LOGS / "bench.log", arguments)
    return Part(outcome.ok, outcome.summary, [], [list(row) for row in outcome.rows])


def guarded(work: Callable[[], Part]) -> Part:
    """Runs a part and turns whatever it raises into a failed result, so that the other parts go on."""
    begun = time.monotonic()
    try:
        part = work()
    except subprocess.TimeoutExpired as error:
        part = Part(False, f"was ended after {error.timeout:.0f} s")
    except Exception as error:  # noqa: BLE001
        part = Part(False, f"broke: {type(error).__name__}: {error}")
    part.seconds = time.monotonic() - begun
    return part


def run(asked: tuple[str, ...], seconds: float, record: pathlib.Path, arguments: list[str],
        done: Callable[[dict[str, Part]], None]) -> dict[str, Part]:
    """Runs the parts in turn, and calls `done` with the results so far after each of them.

    The benchmarks' kernels are compiled meanwhile on the CPU, while compute-sanitizer or nothing uses the GPU.
    """
    end = time.monotonic() + seconds
    parts: dict[str, Part] = {}

    def left() -> float:
        return max(1.0, end - time.monotonic())

    def take(name: str, work: Callable[[float], Part]) -> None:
        print(f"gpu: {name} ...", file=sys.stderr, flush=True)
        share = 1.0 if name == asked[-1] else SHARES[name]
        parts[name] = guarded(lambda: work(share * left()))
        done(parts)

    take("build", build)
    if "tests" in asked:
        take("tests", tests)
    compilers = None
    if "bench" in asked:
        compilers = threading.Thread(target=benchmark.prepare, args=(cores(), 0.4 * left(), LOGS / "compile.log"))
        compilers.start()
    if "sanitize" in asked:
        take("sanitize", sanitize)
    if compilers is not None:
        compilers.join()
        take("bench", lambda seconds: bench(seconds, record, arguments))
    return parts


# --- what is written and shown ---------------------------------------------------------------------------------

def write(record: pathlib.Path, header: dict[str, Any], parts: dict[str, Part]) -> None:
    """Adds the parts to the record, which the benchmarks may have begun. Readers never see it half written."""
    from examples.training.files import write_text  # brings filelock, which only a Python with torch is sure to have

    content = json.loads(record.read_text()) if record.exists() else header | {"penalty": [], "memory": []}
    content["parts"] = {name: {"ok": part.ok, "seconds": round(part.seconds, 1), "summary": part.summary,
                               "lines": part.lines, "details": part.details} for name, part in parts.items()}
    write_text(record, json.dumps(content, indent=1) + "\n")


def export(folder: pathlib.Path, record: pathlib.Path) -> None:
    """Copies the record and the logs to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (record, *sorted(LOGS.glob("*.log"))):
        if path.exists():
            shutil.copy(path, folder / path.name)


def summary(header: dict[str, Any], parts: dict[str, Part], record: pathlib.Path) -> list[str]:
    """Returns the lines that are printed last: the machine, what failed, the table of goals, a line for each part."""
    environment = header["environment"]
    versions = environment["versions"]
    commit = (environment["commit"] or "unknown")[:12] + (" with uncommitted changes" if environment["dirty"] else "")
    lines = ["", f"{environment['device']}, driver {header['driver'] or 'unknown'}, CUDA {versions['cuda']}, torch "
                 f"{versions['torch']}, Triton {versions['triton']}, commit {commit}", ""]
    for name, part in parts.items():
        lines += [f"{name}: {line}" for line in part.lines[:12]]
        if len(part.lines) > 12:
            lines.append(f"{name}: and {len(part.lines) - 12} more, see {os.path.relpath(LOGS, ROOT)}/{name}.log")
    rows = parts["bench"].details if "bench" in parts and parts["bench"].details else []
    if rows:
        width = max(len(row[0]) for row in rows)
        lines += ["", *(f"{row[0]:<{width}}  {row[1]:<14}  {row[3]:<12}  {row[2]}" for row in rows)]
    lines += ["", *(f"{name:<10}{'passed' if part.ok else 'FAILED':<8}{part.seconds:5.0f} s  {part.summary}"
                    for name, part in parts.items())]
    return [*lines, f"record    {os.path.relpath(record, ROOT)}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default {SECONDS})")
    parser.add_argument("--quick", action="store_true", help="benchmarks at small sizes, to see that all of it works")
    parser.add_argument("-k", dest="expression", help="only the benchmarks whose names match")
    asked = parser.parse_args()
    if reason := refusal():
        print(f"gpu: {reason}", file=sys.stderr)
        return 2

    from benchmarks.harness import records

    LOGS.mkdir(parents=True, exist_ok=True)
    for old in LOGS.glob("*.log"):
        old.unlink()
    header = records.gpu_header(asked.quick)
    name = records.gpu_machine(header["environment"]["device"])
    chosen = PARTS if asked.part == "all" else (asked.part,)
    timed = "" if "bench" in chosen and not asked.quick else "-quick" if "bench" in chosen else "-tests"
    record = records.RESULTS / name / time.strftime(f"%Y%m%d-%H%M%S{timed}.json")
    arguments = ["--quick"] * asked.quick + (["-k", asked.expression] if asked.expression else [])

    def done(parts: dict[str, Part]) -> None:
        write(record, header, parts)
        if "OUT" in os.environ:
            export(pathlib.Path(os.environ["OUT"], name), record)

    parts = run(chosen, asked.seconds, record, arguments, done)
    print("\n".join(summary(header, parts, record)))
    return 0 if all(part.ok for part in parts.values()) else 1
