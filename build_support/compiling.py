"""Compiles csrc/: the flags, the list of sources, and an incremental build through ninja, or without it.

Uses the standard library only, and does not import torch (2 s): its headers and libraries lie in its package.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
MACOS = sys.platform == "darwin"
OPS_FILE = "_cpu_ops.dylib" if MACOS else "_cpu_ops.so"
MIN_TORCH = (2, 10)

COMMON_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-Wall", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    # No -ffast-math: NaN and Inf must reach the value. What is given up is errno, floating-point exception
    # flags, and the rounding between a product and its sum.
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd",
    "-Wno-maybe-uninitialized", "-Wno-uninitialized",  # false alarms from GCC's own intrinsics headers
    "-Wno-psabi",  # packs as arguments stay inside one translation unit
]
# no exceptions: their tables would put a symbol shared between files into code of one instruction set
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-fno-exceptions"]
AVX512_FLAGS = [
    *AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
]
ISA_FLAGS = {"_avx2.cpp": AVX2_FLAGS, "_avx512.cpp": AVX512_FLAGS}  # by the end of a file's name, x86-64 only


@dataclass(frozen=True)
class Product:
    """One shared library: its file name, and the sources, compiler flags and linker flags it is made with."""

    filename: str
    sources: list[Path]
    flags: list[str]
    link_flags: list[str]


def say(message: str) -> None:
    print(f"moduli_kernels: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"moduli_kernels: {message}")


# ---- What is on this machine --------------------------------------------------------------------------

def compiler() -> list[str] | None:
    """The C++ compiler's command line: $CXX, else the first of c++, g++, clang++ on the PATH, or None."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version(folder: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return match.group(1) if match else "0.0"


def obstacle() -> str | None:
    """Why the C++ kernels cannot be built here, as a sentence; None if they can."""
    if not (ROOT / "csrc" / "cpu").is_dir():
        return "the folder csrc/ is missing from this source tree; take the full one"
    if sys.platform == "win32":
        return "Windows is not supported yet; the PyTorch reference runs there, or use WSL"
    if compiler() is None:
        if os.environ.get("CXX"):
            return f"the compiler CXX={os.environ['CXX']} was not found; correct or unset CXX"
        return "no C++ compiler was found; install g++ or clang++, or name yours in CXX"
    folder = torch_folder()
    if folder is None:
        return (f"torch is not installed for {sys.executable}; install torch >= 2.10 first, "
                "then build with pip's --no-build-isolation")
    version = torch_version(folder)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        return f"torch {version} is too old; install torch >= 2.10"
    if not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        return f"torch {version} has come without its C++ headers ({folder}/include); install it with pip"
    return None


def functors_obstacle() -> str | None:
    """Why the pybind11 module cannot be built here, as a sentence; None if it can."""
    if not (ROOT / "csrc" / "functors_module.cpp").is_file():
        return "csrc/functors_module.cpp is missing"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing; install it with pip"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else "Python.h is missing; install python3-dev or its like"


# ---- What is built ------------------------------------------------------------------------------------

def isa_flags(source: Path) -> list[str]:
    return next((flags for ending, flags in ISA_FLAGS.items() if source.name.endswith(ending)), [])


def ops_library() -> Product:
    """The CPU operators: no Python module, torch.ops.load_library opens it. LibTorch's stable ABI only."""
    folder = torch_folder()
    assert folder is not None  # obstacle() has looked
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    if not X86:
        sources = [source for source in sources if not isa_flags(source)]
    flags = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10: runs on any later torch
        f"-I{ROOT / 'csrc'}", "-isystem", str(folder / "include"),
        f"-DMODULI_KERNELS_X86={int(X86)}",
    ]
    # No path to libtorch_cpu is stored: torch is loaded before this library, so the name is enough.
    libraries = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    link_flags = libraries if MACOS else ["-Wl,--no-undefined", "-Wl,--as-needed", *libraries]
    return Product(OPS_FILE, sources, flags, link_flags)


def functors_module() -> Product:
    """The pybind11 module moduli_kernels._functors: the functors of csrc/ over NumPy arrays."""
    spec = importlib.util.find_spec("pybind11")
    assert spec is not None and spec.origin is not None  # functors_obstacle() has looked
    flags = [
        f"-I{ROOT / 'csrc'}", "-isystem", str(Path(spec.origin).parent / "include"),
        "-isystem", sysconfig.get_paths()["include"],
    ]
    return Product(
        "_functors" + sysconfig.get_config_var("EXT_SUFFIX"), [ROOT / "csrc" / "functors_module.cpp"], flags,
        ["-undefined", "dynamic_lookup"] if MACOS else [],
    )


def remove_products(folder: Path) -> None:
    for pattern in ("_cpu_ops.*", "_functors.*"):
        for path in folder.glob(pattern):
            path.unlink()


# ---- How it is built ----------------------------------------------------------------------------------

def build(products: list[Product], build_folder: Path, target: Path) -> None:
    """Brings every product in `target` up to date; `build_folder` keeps the objects of each toolchain."""
    cxx = compiler()
    assert cxx is not None  # obstacle() has looked
    folder = torch_folder()
    # Each Python, torch and compiler has its own subfolder: switching between them rebuilds nothing twice.
    version = torch_version(folder) if folder else None
    toolchain = (sysconfig.get_config_var("EXT_SUFFIX"), folder, version, cxx)
    work = build_folder / f"native-{hashlib.sha256(repr(toolchain).encode()).hexdigest()[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    with exclusive(work / "lock"):
        ninja = find_ninja()
        if ninja:
            run_ninja(ninja, cxx, products, work)
        else:
            for product in products:
                build_without_ninja(cxx, product, work)
        for product in products:
            install(work / product.filename, target / product.filename)


@contextmanager
def exclusive(path: Path):
    """Two builds of one source tree at the same time wait for each other."""
    import fcntl

    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(built: Path, target: Path) -> None:
    """Copies by rename: a kill leaves the old file or the new one, and who uses the old one keeps it."""
    if target.exists() and target.stat().st_mtime_ns == built.stat().st_mtime_ns:
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.copy2(built, partial)
    os.replace(partial, target)


def object_name(product: Product, source: Path) -> str:
    return f"{product.filename.split('.')[0]}.{source.stem}.o"


def compile_command(cxx: list[str], product: Product, source: str, obj: str, isa: list[str]) -> list[str]:
    return [*cxx, *COMMON_FLAGS, *product.flags, *isa, "-MD", "-MF", f"{obj}.d", "-c", source, "-o", obj]


def link_command(cxx: list[str], product: Product, objects: list[str]) -> list[str]:
    shared = "-dynamiclib" if MACOS and product.filename == OPS_FILE else "-bundle" if MACOS else "-shared"
    return [*cxx, shared, *objects, *product.link_flags, "-o", product.filename]


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not asked.isdigit() or int(asked) < 1:
        fail(f"MAX_JOBS must be a positive whole number, got {asked!r}")
    return int(asked)


def find_ninja() -> list[str] | None:
    """The ninja on the PATH, or the one that the Python package `ninja` brings."""
    if shutil.which("ninja"):
        return ["ninja"]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def run_ninja(ninja: list[str], cxx: list[str], products: list[Product], work: Path) -> None:
    def escape(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "ninja_required_version = 1.3",
        "rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc", "  description = C++ $name",
        "rule link", "  command = $cmd", "  description = link $out",
    ]
    for product in products:
        objects = [object_name(product, source) for source in product.sources]
        for source, obj in zip(product.sources, objects):
            command = shlex.join(compile_command(cxx, product, str(source), obj, isa_flags(source)))
            lines += [f"build {escape(obj)}: compile {escape(source)}",
                      f"  cmd = {command.replace('$', '$$')}", f"  name = {source.name}"]
        command = shlex.join(link_command(cxx, product, objects))
        lines += [f"build {escape(product.filename)}: link {' '.join(map(escape, objects))}",
                  f"  cmd = {command.replace('$', '$$')}"]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    if subprocess.run([*ninja, "-C", str(work), "-j", str(jobs())]).returncode:
        fail("the C++ kernels did not compile; the compiler's messages are above")


def build_without_ninja(cxx: list[str], product: Product, work: Path) -> None:
    """One source after the other: all of them if any is newer than the library or a command has changed."""
    objects = [object_name(product, source) for source in product.sources]
    commands = [compile_command(cxx, product, str(source), obj, isa_flags(source))
                for source, obj in zip(product.sources, objects)]
    commands.append(link_command(cxx, product, objects))
    library, record = work / product.filename, work / f"{product.filename}.commands"
    inputs = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    if (library.exists() and record.exists() and record.read_text() == repr(commands)
            and all(path.stat().st_mtime_ns < library.stat().st_mtime_ns for path in inputs)):
        return
    record.unlink(missing_ok=True)
    say(f"compiling {product.filename} without ninja, one file after the other (pip install ninja is faster)")
    for command in commands:
        if subprocess.run(command, cwd=work).returncode:
            fail("the C++ kernels did not compile; the compiler's messages are above")
    record.write_text(repr(commands))  # last, so that an interrupted build is done again
