"""What this installation runs on: one block to paste in a bug report, and the same facts for JSON records.

    python -m moduli_kernels.env_report

Nothing here imports Triton or needs a compiler, a GPU or git; what is missing is said to be missing. A folder
with a __main__.py, since `python -m` warns of a module that its package has imported already.
"""
from __future__ import annotations

import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from .. import backends
from .._version import __version__

ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "asimd", "sve")


def environment() -> dict[str, Any]:
    """The facts of this installation and machine, fit for a JSON record beside a result.

    Keys: versions (package -> version or None if absent), platform, device (name of the GPU that torch would
    use, else "cpu"), cpu (name), isa (vector instructions that the kernels can use), cores (usable by this
    process), threads (torch's), ram_gib, gpus (name, memory_gib and capability of each), compiler, backends
    (name -> [available, reason]), backend (the one that serves tensors on `device`), commit and dirty (of a
    git checkout: its revision, and whether tracked files differ from it; None outside one).
    """
    gpus = _gpus()
    commit, dirty = _git_state()
    return {
        "versions": {
            "moduli_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version_of("triton"),
            "numpy": _version_of("numpy"),
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        "device": gpus[torch.cuda.current_device()]["name"] if gpus else "cpu",
        "cpu": _cpu_name(),
        "isa": _isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "gpus": gpus,
        "compiler": _compiler(),
        "backends": {name: list(state) for name, state in backends.availability().items()},
        "backend": _active("cuda" if gpus else "cpu"),
        "commit": commit,
        "dirty": dirty,
    }


def env_report() -> str:
    """The facts of `environment` as lines of text, with what is missing and how to get it."""
    facts = environment()
    versions = facts["versions"]
    commit = f", commit {facts['commit'][:12]}" if facts["commit"] else ""
    commit += " with uncommitted changes" if facts["dirty"] else ""
    lines = [
        f"moduli_kernels  {versions['moduli_kernels']}{commit}",
        f"folder          {_package_folder()}",
        f"Python          {versions['python']} ({sys.executable})",
        f"torch           {versions['torch']}, {facts['threads']} threads",
        f"CUDA            {versions['cuda'] or 'torch was built without it'}",
        f"triton          {versions['triton'] or 'not installed (needed on CUDA GPUs only)'}",
        f"numpy           {versions['numpy']}",
        f"platform        {facts['platform']}",
        f"CPU             {facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB of memory",
        f"vector units    {' '.join(facts['isa']) or 'none that the kernels use'}",
        f"compiler        {facts['compiler'] or 'none found (set CXX, or install g++ or clang++)'}",
    ]
    lines += [
        f"GPU {index}           {gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}"
        for index, gpu in enumerate(facts["gpus"])
    ] or ["GPU             none that torch can use"]
    lines.append("backends")
    for name, (available, reason) in facts["backends"].items():
        lines.append(f"  {name:<12}  {'yes' if available else 'no '}  {reason}")
    for device_type in ("cpu", "cuda") if facts["gpus"] else ("cpu",):
        lines.append(f"active          {_active(device_type)} for {device_type} tensors")
    return "\n".join(lines)


def _active(device_type: str) -> str:
    try:
        return backends.active(device_type)
    except (RuntimeError, ValueError) as error:  # MODULI_KERNELS_BACKEND names one that cannot be had
        return f"none ({error})"


def _package_folder() -> pathlib.Path:
    return pathlib.Path(__file__).resolve().parent.parent


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """Standard output of a command, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo(field: str) -> str:
    """First value of a field in Linux's /proc/cpuinfo; "" elsewhere."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1) if match else ""


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _isa() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in ISA if name in flags]


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": each.name, "memory_gib": round(each.total_memory / 2**30, 1),
             "capability": f"{each.major}.{each.minor}"} for each in properties]


def _compiler() -> str | None:
    """The C++ compiler that a build would use (as scripts/native_build.py picks it) and its version."""
    asked = os.environ.get("CXX")
    candidates = [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    command = next((each for each in candidates if shutil.which(each[0])), None)
    version = _run(*command, "--version") if command else None
    return f"{' '.join(command)}: {version.splitlines()[0]}" if command and version else None


def _git_state() -> tuple[str | None, bool | None]:
    """(commit, tracked files differ from it) of the checkout around this package, else (None, None). Results are no
    source: a run that appends to a tracked record leaves its own checkout clean."""
    root = _package_folder().parent
    if not (root / ".git").exists():
        return None, None
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    status = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no",
                  "--", ".", ":!benchmarks/results", ":!examples/results")
    return commit, bool(status) if commit is not None and status is not None else None
