"""compute-sanitizer for scripts/gpu.py: its four tools over gpu_workload.py, each first proved on a planted bug."""
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

import gpu_plants

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKLOAD, PLANTS = ROOT / "scripts" / "gpu_workload.py", ROOT / "scripts" / "gpu_plants.py"
SEARCHED = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
DONE = "workload: "  # how the last line of the workload begins

Run = Callable[[list[str], float], "Output"]


@dataclass
class Output:
    """Of a command; status None where it was ended for taking too long."""

    status: int | None
    text: str


@dataclass
class Verdict:
    tool: str
    ok: bool
    told: str


def find(program: str) -> str | None:
    """Where a program of the CUDA toolkit lies: on the PATH, else at the usual place."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SEARCHED])
    return shutil.which(program, path=path)


def errors(text: str) -> int | None:
    """How many a tool counted in its summary; None where there is no summary, so nothing was watched."""
    found = [int(number) for number in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    found += [int(number) for number in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    return max(found) if found else None


def judge(tool: str, planted: Output, work: Output | None) -> Verdict:
    """work is None where the plant was missed and nothing else was run."""
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
    """The first finding in a tool's output, which begins its lines with =========."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    found = (line for line in lines if line and "COMPUTE-SANITIZER" not in line and "SUMMARY" not in line)
    return next(found, "?")[:200]


def command(sanitizer: str, tool: str, *program: str) -> list[str]:
    return [sanitizer, "--tool", tool, "--target-processes", "all", sys.executable, *program]


def execute(arguments: list[str], seconds: float) -> Output:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor is an allocation, with bounds that the tools know
        "CUDA_MODULE_LOADING": "LAZY", "OMP_NUM_THREADS": "2"}
    try:
        done = subprocess.run(arguments, cwd=ROOT, env=environment, text=True, errors="replace", timeout=seconds,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return Output(None, text if isinstance(text, str) else text.decode(errors="replace"))
    return Output(done.returncode, done.stdout)


def run(architecture: str, seconds: float, log: pathlib.Path, execute: Run = execute) -> list[Verdict]:
    """All tools side by side, for so many seconds in all. A first run without a tool fills Triton's cache."""
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
            gpu_plants.build(library, nvcc, architecture)
        except RuntimeError as error:
            return [Verdict("nvcc", False, str(error))]
        first = execute([sys.executable, str(WORKLOAD)], left())
        texts["no tool"] = first.text
        verdicts = []
        if first.status or DONE not in first.text:
            verdicts = [Verdict("the kernels", False, f"failed without any tool: {_last(first.text)}")]
        else:
            def one(tool: str) -> Verdict:
                planted = execute(command(sanitizer, tool, str(PLANTS), tool, str(library)), left())
                work = execute(command(sanitizer, tool, str(WORKLOAD)), left()) if errors(planted.text) else None
                texts[tool] = planted.text + ("" if work is None else "\n--- the kernels\n" + work.text)
                return judge(tool, planted, work)

            with ThreadPoolExecutor(len(gpu_plants.TOOLS)) as pool:
                verdicts = list(pool.map(one, gpu_plants.TOOLS))
    log.write_text("".join(f"--- {name}\n{text}\n" for name, text in texts.items()))
    return verdicts
