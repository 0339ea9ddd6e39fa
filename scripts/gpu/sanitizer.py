"""Runs the four tools of compute-sanitizer over workload.py, each after it has found the bug that is planted for it."""
from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from . import plants

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKLOAD, PLANTS = "scripts.gpu.workload", "scripts.gpu.plants"  # the modules that run under the tools
SEARCHED = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # folders that are searched after the PATH
DONE = "workload: "  # the last line of the workload begins so

Run = Callable[[list[str], float], "Output"]


@dataclass
class Output:
    """What a command printed, and its exit status, or None if it took too long and was ended."""

    status: int | None
    text: str


@dataclass
class Verdict:
    """Whether a tool found its planted bug and nothing else, and the reason in words."""

    tool: str
    ok: bool
    reason: str


def find(program: str) -> str | None:
    """Looks for a program of the CUDA toolkit on the PATH, then in SEARCHED; returns its path, or None if absent."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SEARCHED])
    return shutil.which(program, path=path)


def errors(text: str) -> int | None:
    """Returns how many errors a tool counted in its summary, or None if it printed none and so watched nothing."""
    found = [int(number) for number in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    found += [int(number) for number in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    return max(found) if found else None


def judge(tool: str, planted: Output, work: Output | None) -> Verdict:
    """Judges a tool by its output on the planted bug and on the kernels.

    work is None if the tool missed the planted bug, because the kernels are not run then.
    """
    seen = errors(planted.text)
    if planted.status is None:
        return Verdict(tool, False, "took too long over its planted bug")
    if not seen:
        why = "ended without a summary" if seen is None else "did not report it"
        last = _last(planted.text)
        return Verdict(tool, False, f"was given a planted bug and {why}: its silence proves nothing ({last})")
    if work is None or work.status is None:
        return Verdict(tool, False, "found its planted bug, then took too long over the kernels")
    found = errors(work.text)
    if found:
        return Verdict(tool, False, f"found its planted bug and {found} in the kernels: {_first(work.text)}")
    if found is None or work.status or DONE not in work.text:
        last = _last(work.text)
        return Verdict(tool, False, f"found its planted bug, but the kernels did not run to their end ({last})")
    return Verdict(tool, True, "found its planted bug and nothing in the kernels")


def _last(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    return lines[-1][:200] if lines else "no output"


def _first(text: str) -> str:
    """Returns the first finding in a tool's output. The tool's own lines begin with =========."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    found = (line for line in lines if line and "COMPUTE-SANITIZER" not in line and "SUMMARY" not in line)
    return next(found, "?")[:200]


def command(sanitizer: str, tool: str, *module: str) -> list[str]:
    """Returns the command that runs a module with its arguments under a tool."""
    return [sanitizer, "--tool", tool, "--target-processes", "all", sys.executable, "-m", *module]


def execute(arguments: list[str], seconds: float) -> Output:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor is its own allocation, whose bounds the tools know
        "CUDA_MODULE_LOADING": "LAZY", "OMP_NUM_THREADS": "2"}
    try:
        done = subprocess.run(arguments, cwd=ROOT, env=environment, text=True, errors="replace", timeout=seconds,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return Output(None, text if isinstance(text, str) else text.decode(errors="replace"))
    return Output(done.returncode, done.stdout)


def run(architecture: str, seconds: float, log: pathlib.Path, execute: Run = execute) -> list[Verdict]:
    """Runs all tools side by side, for so many seconds in all.

    The workload runs first without a tool, to see that it passes and to fill Triton's cache.
    """
    end = time.monotonic() + seconds

    def left() -> float:
        return max(1.0, end - time.monotonic())

    sanitizer, nvcc = find("compute-sanitizer"), find("nvcc")
    for name, path in (("compute-sanitizer", sanitizer), ("nvcc", nvcc)):
        if path is None:
            return [Verdict(name, False, f"was not found on the PATH nor in {' nor '.join(SEARCHED)}; it comes with "
                                         "the CUDA toolkit")]
    texts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder, "plants.so")
        try:
            plants.build(library, nvcc, architecture)
        except RuntimeError as error:
            return [Verdict("nvcc", False, str(error))]
        first = execute([sys.executable, "-m", WORKLOAD], left())
        texts["no tool"] = first.text
        verdicts = []
        if first.status or DONE not in first.text:
            verdicts = [Verdict("the kernels", False, f"failed without any tool: {_last(first.text)}")]
        else:
            def one(tool: str) -> Verdict:
                planted = execute(command(sanitizer, tool, PLANTS, tool, str(library)), left())
                work = execute(command(sanitizer, tool, WORKLOAD), left()) if errors(planted.text) else None
                texts[tool] = planted.text + ("" if work is None else "\n--- the kernels\n" + work.text)
                return judge(tool, planted, work)

            with ThreadPoolExecutor(len(plants.TOOLS)) as pool:
                verdicts = list(pool.map(one, plants.TOOLS))
    log.write_text("".join(f"--- {name}\n{text}\n" for name, text in texts.items()))
    return verdicts
