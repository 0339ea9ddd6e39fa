"""Reports what this installation runs on: as text for a bug report, and as a dictionary for JSON records.

    python -m moduli_kernels.env_report

The facts about the machine come from torch.utils.collect_env where it has them. Nothing here imports Triton or needs a
compiler, a GPU or git; the report says what is missing. This is a package with a __main__.py because `python -m` warns
if the module that it runs is already imported, as moduli_kernels imports this one.
"""
from __future__ import annotations

import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch
from torch.utils import collect_env

from .. import backends
from .._version import __version__

ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "asimd", "sve")


def environment() -> dict[str, Any]:
    """Returns the facts of this installation and machine as a dictionary that fits a JSON record beside a result.

    versions: package -> version, or None if it is absent.
    platform: the operating system and its version.
    device: the name of the GPU that torch would use, or "cpu".
    cpu: the name of the processor.
    isa: the vector instructions of the processor that the kernels can use.
    cores: how many cores this process may use.
    threads: how many threads torch uses.
    ram_gib: the memory of the machine in GiB.
    gpus: a dictionary for each GPU, with name, memory_gib and capability.
    compiler: the C++ compiler and its version, or None.
    backends: name -> [whether it is available, the reason].
    backend: the backend that serves tensors on `device`.
    commit: the revision of the git checkout that holds this package, or None outside one.
    dirty: whether tracked files differ from that revision, or None.
    """
    gpus = _gpus()
    processor = _processor()
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
        "platform": collect_env.get_python_platform(),
        "device": gpus[torch.cuda.current_device()]["name"] if gpus else "cpu",
        "cpu": processor.get("Model name") or platform.processor() or platform.machine(),
        "isa": [name for name in ISA if name in processor.get("Flags", "").split()],
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
    """Returns a text that says what is installed, what is missing and how to get it, for a bug report.

    The text is what `python -m moduli_kernels.env_report` prints.
    """
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
    except (RuntimeError, ValueError) as error:  # MODULI_KERNELS_BACKEND names a backend that is not available
        return f"none ({error})"


def _package_folder() -> pathlib.Path:
    return pathlib.Path(__file__).resolve().parent.parent


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """Returns the standard output of a command, or None if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> dict[str, str]:
    """Returns the fields that lscpu prints on Linux, such as "Model name" and "Flags"; on macOS the name only."""
    def run(command: str) -> tuple[int, str, str]:
        return collect_env.run(f"LC_ALL=C {command}")  # lscpu translates the names of its fields

    printed: str = collect_env.get_cpu_info(run)
    if sys.platform == "darwin":
        return {"Model name": printed}
    pairs = (line.split(":", 1) for line in printed.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


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
    """Returns the command and version of the C++ compiler that a build would use (build_support/toolchain.py)."""
    asked = os.environ.get("CXX")
    candidates = [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    command = next((each for each in candidates if shutil.which(each[0])), None)
    version = _run(*command, "--version") if command else None
    return f"{' '.join(command)}: {version.splitlines()[0]}" if command and version else None


def _git_state() -> tuple[str | None, bool | None]:
    """Returns the commit of the checkout that holds this package, and whether tracked files differ from it.

    Both are None outside a checkout. Files of results do not count, so that a run which appends to a tracked record can
    still call its own checkout clean.
    """
    root = _package_folder().parent
    if not (root / ".git").exists():
        return None, None
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    status = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no",
                  "--", ".", ":!benchmarks/results", ":!examples/results")
    return commit, bool(status) if commit is not None and status is not None else None
